"""What an error says, in a line."""

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
"""Packages that only some commands need, and the extra of hqlt that brings them."""

SHOWN = 8
"""Names that an error or a summary lists."""
OUT_OF_MEMORY = re.compile("out of memory|can't allocate memory|not enough memory", re.IGNORECASE)
"""How torch says it: an error of its own for GPUs, any RuntimeError for a CPU."""


def explanation(error: BaseException) -> str | None:
    """A sentence about what the user of a command can mend; None for an error of the program."""
    if is_out_of_memory(error):
        asked = re.search(r"allocate ([\d.]+ \w+)", str(error))
        what = f"out of memory ({asked[1]} more were asked for)" if asked else "out of memory"
        return "; ".join([what, *getattr(error, "__notes__", ())])
    mendable = isinstance(error, ValueError | OSError) or extra_for(error) is not None
    return reason(error) if mendable else None


def reason(error: BaseException) -> str:
    """Without its number, with its file; of a missing package, how to get it."""
    if isinstance(error, ModuleNotFoundError) and (extra := extra_for(error)):
        return f"expected the package {error.name}; {how_to_install(extra)}"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error) or type(error).__name__


def extra_for(error: BaseException) -> str | None:
    """The extra of hqlt that brings the package that is missing; None where nothing is, or no extra does."""
    missing = error.name or "" if isinstance(error, ModuleNotFoundError) else ""
    return EXTRAS.get(missing.partition(".")[0])


def join_names(names: Sequence[str], count: int | None = None) -> str:
    """The first of some names, and how many more there are. count: of all; None: as many as are given."""
    more = (len(names) if count is None else count) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more:,} more" if more > 0 else "")


def require(*packages: str) -> None:
    """Raises ModuleNotFoundError for one that is missing, before anything is done that will be of no use without it."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise ModuleNotFoundError(f"expected the package {package}", name=package)


def how_to_install(*extras: str) -> str:
    """What to type for extras of hqlt: by its name where it came from an index, else by where it was installed from."""
    try:
        told = json.loads(distribution("hqlt").read_text("direct_url.json") or "{}")
    except PackageNotFoundError:  # run from a checkout that is not installed
        told = {"url": Path(__file__).parents[2].as_uri()}
    wanted = f"[{','.join(extras)}]"
    url = urlsplit(told.get("url", ""))
    editable = "-e " if told.get("dir_info", {}).get("editable") else ""
    if url.scheme == "file":
        place = Path(url2pathname(url.path))
        return f"pip install {editable}'{'.' if place == Path.cwd() else place}{wanted}'"
    if "vcs_info" in told:
        return f"pip install 'hqlt{wanted} @ {told['vcs_info']['vcs']}+{told['url']}'"
    return f"pip install 'hqlt{wanted}{' @ ' + told['url'] if url.scheme else ''}'"


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and OUT_OF_MEMORY.search(str(error)) is not None
    )


def first_line(error: BaseException) -> str:
    """Of what a library says; its name where it says nothing."""
    said = str(error).strip()
    return said.splitlines()[0] if said else type(error).__name__
