"""Documents in text files, JSON lines and Parquet."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hqlt.data.source import Files, without_lone_surrogates


class TextFiles(Files):
    """A file is a document; with a separator, what stands between two lines that equal it is one ("": blank lines)."""

    options = frozenset({"separator"})

    def __init__(self, files: Sequence[Path], root: Path, separator: str | None = None) -> None:
        super().__init__(files, root)
        self.separator = separator

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "separator": self.separator}

    def texts_of(self, file: Path) -> Iterator[tuple[str, int]]:
        if self.separator is None:
            data = file.read_bytes()
            yield _decoded(data, file), len(data)
            return
        border, lines, position = self.separator.strip(), list[bytes](), 0
        with file.open("rb") as opened:
            for line in opened:
                position += len(line)
                if line.strip() != border.encode():
                    lines.append(line)
                elif lines:
                    yield _decoded(b"".join(lines), file), position
                    lines = []
        if lines:
            yield _decoded(b"".join(lines), file), position


class JsonLines(Files):
    """A line is a JSON object, and one of its fields a document."""

    options = frozenset({"text_field"})

    def __init__(self, files: Sequence[Path], root: Path, text_field: str = "text") -> None:
        super().__init__(files, root)
        self.text_field = text_field

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "text_field": self.text_field}

    def texts_of(self, file: Path) -> Iterator[tuple[str, int]]:
        number = 0
        with file.open("rb") as opened:
            lines: Iterable[bytes] = gzip.GzipFile(fileobj=opened) if file.suffix == ".gz" else opened
            try:
                for number, line in enumerate(lines, start=1):
                    if line.strip():
                        text = text_of(json.loads(line), self.text_field, f"{file}, line {number}")
                        yield text, opened.tell()
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise ValueError(f"{file}, line {number}: expected a JSON object, got {error}") from error
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                raise ValueError(f"{file}: expected a whole gzip file, got {error} after line {number}") from error


class Parquet(Files):
    """A row is a document, in one of its columns."""

    options = frozenset({"text_field"})

    def __init__(self, files: Sequence[Path], root: Path, text_field: str = "text") -> None:
        super().__init__(files, root)
        self.text_field = text_field

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "text_field": self.text_field}

    def texts_of(self, file: Path) -> Iterator[tuple[str, int]]:
        try:
            import pyarrow.parquet as parquet
            from pyarrow import ArrowException
        except ImportError as error:
            raise ValueError(f"{file}: Parquet is read by pyarrow; install it with: pip install 'hqlt[lm]'") from error
        size = file.stat().st_size
        try:
            with parquet.ParquetFile(file) as opened:
                columns = opened.schema_arrow.names
                if self.text_field not in columns:
                    raise ValueError(_no_such_field(str(file), self.text_field, columns))
                rows = 0
                for batch in opened.iter_batches(columns=[self.text_field], batch_size=1024):
                    for row in batch.to_pylist():
                        rows += 1
                        text = text_of(row, self.text_field, f"{file}, row {rows}")
                        yield text, size * rows // opened.metadata.num_rows
        except (ArrowException, OSError) as error:
            raise ValueError(f"{file}: expected a whole Parquet file, got {error}") from error


KINDS: dict[str, type[TextFiles | JsonLines | Parquet]] = {
    ".txt": TextFiles,
    ".md": TextFiles,
    ".jsonl": JsonLines,
    ".jsonl.gz": JsonLines,
    ".parquet": Parquet,
}


NOT_TEXT = (".json", ".csv", ".tsv", ".gz", ".bz2", ".xz", ".zst", ".zip", ".tar")
"""Endings of files that hold documents in a way that is not known here."""


@dataclass(frozen=True, kw_only=True)
class LocalFormat:
    text_field: str = "text"
    """Of JSON lines and Parquet."""
    separator: str | None = None
    """A line between two documents of a text file; "": a blank one; None: a file is one document."""
    pattern: str | None = None
    """Which files of a folder; None: all of the known kinds. A file of no known kind is text."""

    def source_in(self, path: Path, without: Sequence[Path] = ()) -> Files:
        """The source in a file or folder, but for some files that have another use.

        Raises ValueError for a folder with no such files, or with files of several kinds, and for a table or archive.
        """
        if path.is_file():
            if _ending(path) not in KINDS and path.suffix in NOT_TEXT:
                raise ValueError(
                    f"{path}: expected text or one of {', '.join(KINDS)}, got {path.suffix}; turn it into JSON lines, "
                    f'one {{"text": "…"}} a document, or take it as text as it is by its folder and --pattern'
                )
            files, root = [path], path.parent
        else:
            used = {other.resolve() for other in without}
            found = [file for file in path.rglob(self.pattern or "*") if file.is_file()]
            kept = (file for file in found if not used & {file.resolve(), *file.resolve().parents})
            files, root = sorted(file for file in kept if self.pattern or _ending(file) in KINDS), path
        kinds = {KINDS.get(_ending(file), TextFiles) for file in files}
        if len(kinds) != 1:
            what = " and ".join(sorted(kind.__name__ for kind in kinds)) or "none"
            raise ValueError(
                f"{path}: expected files of one kind among {', '.join(KINDS)}, found {what}; choose by --pattern, "
                f'such as --pattern="*.txt"'
            )
        (kind,) = kinds
        return TextFiles(files, root, self.separator) if kind is TextFiles else kind(files, root, self.text_field)


def text_of(row: Any, field: str, place: str) -> str:
    """The text of a row; null is an empty one."""
    if not isinstance(row, dict) or field not in row:
        raise ValueError(_no_such_field(place, field, row if isinstance(row, dict) else [type(row).__name__]))
    text = "" if row[field] is None else row[field]
    if not isinstance(text, str):
        raise ValueError(f"{place}: expected a text in {field!r}, got {type(text).__name__}")
    return without_lone_surrogates(text)


def _no_such_field(place: str, field: str, fields: Any) -> str:
    there = ", ".join(map(repr, fields)) or "none"
    return f"{place}: expected a field {field!r}, got {there}; name the one with the text by --text-field"


def _ending(file: Path) -> str:
    return "".join(file.suffixes[-2:]) if file.suffix == ".gz" else file.suffix


def _decoded(data: bytes, file: Path) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: expected text in UTF-8, got {error}; convert it first, by iconv for one") from error
