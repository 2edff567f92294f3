"""Error messages for the user, and missing packages."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

EXTRAS = {
    **dict.fromkeys(("transformers", "huggingface_hub", "tokenizers", "datasets", "pyarrow"), "lm"),
    **dict.fromkeys(("matplotlib", "jinja2"), "report"),
    **dict.fromkeys(("lm_eval",), "eval"),
    **dict.fromkeys(("gymnasium",), "rl"),
    **dict.fromkeys(("fastapi", "uvicorn", "prometheus_client"), "serve"),
    **dict.fromkeys(("gguf", "accelerate", "peft"), "retrofit"),
    **dict.fromkeys(("popgym",), "popgym"),
    **dict.fromkeys(("minigrid",), "minigrid"),
    **dict.fromkeys(("shtab",), "completion"),
    **dict.fromkeys(("wandb",), "wandb"),
}
"""Optional packages, and the extra of hqlt that installs them."""

MAX_NAMES = 8
"""Maximum number of names that an error or a summary lists."""
OUT_OF_MEMORY = re.compile("out of memory|can't allocate memory|not enough memory", re.IGNORECASE)
"""Messages of torch, which raises its own error for GPUs, but a RuntimeError for a CPU."""


def explanation(error: BaseException) -> str | None:
    """The message for an error that the user of a command can fix; None: it is a bug."""
    if is_out_of_memory(error):
        requested = re.search(r"allocate ([\d.]+ \w+)", str(error))
        what = f"out of memory (tried to allocate {requested[1]})" if requested else "out of memory"
        return "; ".join([what, *getattr(error, "__notes__", ())])
    fixable = isinstance(error, ValueError | OSError) or extra_for(error) is not None
    return reason(error) if fixable else None


def reason(error: BaseException) -> str:
    """The message of an error: with the file of an OSError, and with how to install a missing package."""
    if isinstance(error, ModuleNotFoundError) and (extra := extra_for(error)):
        return f"expected the package {error.name}; {how_to_install(extra)}"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error) or type(error).__name__


def extra_for(error: BaseException) -> str | None:
    """The extra of hqlt that installs a missing package; None: the error is another one, or no extra installs it."""
    missing = error.name or "" if isinstance(error, ModuleNotFoundError) else ""
    return EXTRAS.get(missing.partition(".")[0])


def join_names(names: Sequence[str], count: int | None = None) -> str:
    """The first names, and the number of further ones. count: the number of all names; None: that of `names`."""
    more = (len(names) if count is None else count) - MAX_NAMES
    return ", ".join(names[:MAX_NAMES]) + (f" and {more:,} more" if more > 0 else "")


def require(*packages: str) -> None:
    """Raises ModuleNotFoundError if a package is missing; to be called before work that needs it."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise ModuleNotFoundError(f"expected the package {package}", name=package)


def how_to_install(*extras: str) -> str:
    """The pip command that installs extras of hqlt, from wherever hqlt itself was installed."""
    try:
        origin = json.loads(distribution("hqlt").read_text("direct_url.json") or "{}")
    except PackageNotFoundError:  # a checkout that is not installed
        origin = {"url": Path(__file__).parents[2].as_uri()}
    brackets = f"[{','.join(extras)}]"
    url = urlsplit(origin.get("url", ""))
    editable = "-e " if origin.get("dir_info", {}).get("editable") else ""
    if url.scheme == "file":
        place = Path(url2pathname(url.path))
        return f"pip install {editable}'{'.' if place == Path.cwd() else place}{brackets}'"
    if "vcs_info" in origin:
        return f"pip install 'hqlt{brackets} @ {origin['vcs_info']['vcs']}+{origin['url']}'"
    return f"pip install 'hqlt{brackets}{' @ ' + origin['url'] if url.scheme else ''}'"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error says that CPU or GPU memory is exhausted."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and OUT_OF_MEMORY.search(str(error)) is not None
    )


def first_line(error: BaseException) -> str:
    """The first line of a message; the type of the error if the message is empty."""
    message = str(error).strip()
    return message.splitlines()[0] if message else type(error).__name__
