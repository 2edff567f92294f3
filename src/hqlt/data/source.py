"""Sources of documents: iterables of texts that know how far they have been read."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar


class Source:
    """Documents in a fixed order. `state_dict` returns the position; a new source can resume from it."""

    options: ClassVar[frozenset[str]] = frozenset()
    """Names of the options of `parts_of` that this source uses; each one is an attribute."""

    def __init__(self) -> None:
        self.seen = 0
        """Documents yielded so far."""
        self.size: int | None = None
        """Total size in bytes; None: unknown."""
        self.passed = 0
        """Bytes read so far."""
        self.skipped: list[str] = []
        """Files of a folder that are not read because their format is unknown."""

    def identity(self) -> dict[str, Any]:
        """What the documents depend on, as JSON: names and sizes of files, but not the folder that contains them."""
        return {"kind": type(self).__name__, **{name: getattr(self, name) for name in self.options}}

    def documents(self, skip: int) -> Iterator[str]:
        """All documents except the first `skip`."""
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
    """Documents in local files, read one file after another.

    text_field: the field with the text, for formats with fields. separator: the line between documents, for text files.
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
        """Yield the documents of one file, each with the number of bytes of the file read so far."""
        raise NotImplementedError


def without_lone_surrogates(text: str) -> str:
    """Replace lone surrogates, which JSON can contain but UTF-8 cannot encode, with U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
