"""The files below a folder, behind links too."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn


def files_below(folder: Path, pattern: str | None = None) -> tuple[list[Path], list[Path]]:
    """The files of a folder and of all folders in it, in order; and links that lead nowhere.

    Links to files and folders are followed. What can be reached in several ways is listed once: a link to a folder that
    holds it ends there.

    pattern: of names, such as "*.py", or of the ends of paths, "en/*.txt". Raises ValueError for one that is none,
    OSError for a folder that cannot be read.
    """
    roots: list[Path] = []
    candidates: list[Path] = []
    for root, files in _trees(folder):
        roots.append(root)
        candidates += files
    if pattern is not None:
        try:
            if not pattern:
                raise ValueError("it is empty")
            candidates = [file for root in roots for file in root.rglob(pattern) if not file.is_dir()]
        except (ValueError, NotImplementedError) as error:
            raise ValueError(f'pattern: expected one such as "*.txt", got {pattern!r}: {error}') from None
    found: dict[Path, Path] = {}
    broken = []
    for file in sorted(set(candidates)):
        if file.is_file():
            found.setdefault(file.resolve(), file)
        else:
            broken.append(file)
    return list(found.values()), broken


def hidden(path: Path) -> bool:
    """Whether it, or a folder that it is in, begins with a dot."""
    return any(name.startswith(".") for name in path.parts)


def _trees(folder: Path) -> Iterator[tuple[Path, list[Path]]]:
    """The folder, and each folder that a link leads to, each once: with the files that no further link hides."""
    seen = {folder.resolve()}
    waiting = [folder]
    while waiting:
        root = waiting.pop()
        files = []
        for place, folders, names in os.walk(root, onerror=_raise):
            files += [Path(place, name) for name in names]
            links = [link for name in folders if (link := Path(place, name)).is_symlink()]
            for link in links:
                if (real := link.resolve()) not in seen:
                    seen.add(real)
                    waiting.append(link)
        yield root, files


def _raise(error: OSError) -> NoReturn:
    raise error
