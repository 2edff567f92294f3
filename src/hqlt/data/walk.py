"""Listing the files below a folder, following links."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn


def files_below(folder: Path, pattern: str | None = None) -> tuple[list[Path], list[Path]]:
    """All files below a folder, sorted, and all broken links.

    Links to files and folders are followed. A file that can be reached in several ways is listed once, so cyclic links
    are harmless.

    pattern: a glob for file names such as "*.py", or for the end of paths such as "en/*.txt". Raises ValueError for an
    invalid pattern, OSError for a folder that cannot be read.
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
    """Whether the name of the file or of a folder in its path starts with a dot."""
    return any(name.startswith(".") for name in path.parts)


def _trees(folder: Path) -> Iterator[tuple[Path, list[Path]]]:
    """The folder and every linked folder, each once, with the files below it that are not behind another link."""
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
