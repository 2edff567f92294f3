"""Where documents come from: a source is an iterable of texts that knows how far it was read."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar


class Source:
    """Documents in a fixed order. Once iterated, `state_dict` says how far; a new source resumes from it."""

    options: ClassVar[frozenset[str]] = frozenset()
    """Those of `parts_of` that say how it is read: its attributes of these names."""

    def __init__(self) -> None:
        self.seen = 0
        """Documents handed out."""
        self.size: int | None = None
        """Bytes in all; None: nobody knows."""
        self.passed = 0
        """Bytes that were read."""
        self.skipped: list[str] = []
        """Files of a folder that are not read, as their kind is not known."""

    def identity(self) -> dict[str, Any]:
        """What the documents depend on, in JSON; the place of a file is not part of it, its name and size are."""
        return {"kind": type(self).__name__, **{name: getattr(self, name) for name in self.options}}

    def documents(self, skip: int) -> Iterator[str]:
        """All documents but the first `skip`."""
        raise NotImplementedError

    def __iter__(self) -> Iterator[str]:
        for text in self.documents(self.seen):
            self.seen += 1
            yield text

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen = state["seen"]


class Files(Source):
    """Documents in local files, one file after another.

    text_field: of files that have such. separator: of text.
    """

    def __init__(
        self, files: Sequence[Path], root: Path, *, text_field: str = "text", separator: str | None = None
    ) -> None:
        super().__init__()
        self.files, self.root, self.text_field, self.separator = files, root, text_field, separator
        self.sizes = [file.stat().st_size for file in files]
        self.size = sum(self.sizes)

    def identity(self) -> dict[str, Any]:
        sized = zip(self.files, self.sizes, strict=True)
        names = (f"{file.relative_to(self.root).as_posix()} {size}\n" for file, size in sized)
        digest = hashlib.sha256("".join(names).encode()).hexdigest()
        return {**super().identity(), "files": len(self.files), "names and sizes": digest}

    def documents(self, skip: int) -> Iterator[str]:
        return itertools.islice(self._from_the_first(), skip, None)

    def _from_the_first(self) -> Iterator[str]:
        before = 0
        for file, size in zip(self.files, self.sizes, strict=True):
            for text, position in self.texts_of(file):
                self.passed = before + position
                yield text
            before += size

    def texts_of(self, file: Path) -> Iterator[tuple[str, int]]:
        """The documents of one file, and how many of its bytes were read."""
        raise NotImplementedError


def without_lone_surrogates(text: str) -> str:
    """JSON can spell halves of characters, which UTF-8 cannot: each becomes U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
