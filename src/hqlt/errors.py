"""What an error says, in a line."""

from __future__ import annotations

EXTRAS = {
    **dict.fromkeys(("transformers", "huggingface_hub", "tokenizers", "datasets", "pyarrow"), "lm"),
    **dict.fromkeys(("matplotlib", "jinja2"), "report"),
    **dict.fromkeys(("lm_eval",), "eval"),
    **dict.fromkeys(("gymnasium",), "rl"),
}
"""Packages that only some commands need, and the extra of hqlt that brings them."""


def reason(error: BaseException) -> str:
    """Without its number, with its file; of a missing package, how to get it."""
    if isinstance(error, ModuleNotFoundError) and error.name in EXTRAS:
        return f"expected the package {error.name}; pip install 'hqlt[{EXTRAS[error.name]}]'"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)


def first_line(error: BaseException) -> str:
    """Of what a library says; its name where it says nothing."""
    said = str(error).strip()
    return said.splitlines()[0] if said else type(error).__name__
