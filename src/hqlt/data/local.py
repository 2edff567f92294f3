"""Documents in text files, JSON Lines and Parquet."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hqlt.data.source import Files, without_lone_surrogates
from hqlt.data.text import COMPRESSIONS, decoded, opened, without_mark
from hqlt.data.walk import files_below, hidden
from hqlt.errors import join_names, require


class TextFiles(Files):
    """Each file is a document; with a separator, a document ends at each line equal to it ("": at blank lines)."""

    options = frozenset({"separator"})

    def texts_of(self, file: Path) -> Iterator[tuple[str, int]]:
        separator = None if self.separator is None else self.separator.strip().encode()
        with opened(file) as (content, position):
            if separator is None:
                yield decoded(without_mark(content.read(), file), file), position()
                return
            lines = list[bytes]()
            for number, line in enumerate(content):
                content_line = line if number else without_mark(line, file)
                if content_line.strip() != separator:
                    lines.append(content_line)
                elif lines:
                    yield decoded(b"".join(lines), file), position()
                    lines = []
            if lines:
                yield decoded(b"".join(lines), file), position()


class JsonLines(Files):
    """Each line is a JSON object, with the document in one of its fields."""

    options = frozenset({"text_field"})

    def texts_of(self, file: Path) -> Iterator[tuple[str, int]]:
        with opened(file) as (content, position):
            for number, line in enumerate(content, start=1):
                row = line if number > 1 else without_mark(line, file)
                if not row.strip():
                    continue
                try:
                    record = json.loads(row)
                except (ValueError, RecursionError) as error:
                    raise ValueError(
                        f"{file}, line {number}: expected a JSON object, got {error}; each line must be one "
                        f"(`jq -c '.[]'` turns an array into lines)"
                    ) from error
                yield text_of(record, self.text_field, f"{file}, line {number}"), position()


class Parquet(Files):
    """Each row is a document, in one of the columns."""

    options = frozenset({"text_field"})

    def texts_of(self, file: Path) -> Iterator[tuple[str, int]]:
        import pyarrow.parquet as parquet
        from pyarrow import ArrowException

        size = file.stat().st_size
        try:
            with parquet.ParquetFile(file) as opened:
                columns = opened.schema_arrow.names
                if self.text_field not in columns:
                    raise ValueError(_no_such_field(str(file), self.text_field, columns))
                batches = opened.iter_batches(columns=[self.text_field], batch_size=1024)
                rows = (row for batch in batches for row in batch.to_pylist())
                for number, row in enumerate(rows, start=1):
                    text = text_of(row, self.text_field, f"{file}, row {number}")
                    yield text, size * number // opened.metadata.num_rows
        except (ArrowException, OSError) as error:
            raise ValueError(f"{file}: expected a valid Parquet file, got {error}") from error


KINDS: dict[str, type[Files]] = {
    ".txt": TextFiles, ".md": TextFiles, ".jsonl": JsonLines, ".ndjson": JsonLines, ".parquet": Parquet,
}  # fmt: skip
"""Formats by file suffix in lower case. Text and JSON Lines may have a suffix of COMPRESSIONS after it."""
NAMED_KINDS = {**KINDS, ".json": JsonLines}
"""Formats of files that are named explicitly or by a pattern. In a folder, a .json file is usually metadata."""
NOT_TEXT = (".arrow", ".csv", ".tsv", ".zip", ".tar", ".tgz", ".7z")
"""Suffixes of files that contain documents in a format that is not supported."""


@dataclass(frozen=True, kw_only=True)
class LocalFormat:
    """How local files are read as documents."""

    text_field: str = "text"
    """The field with the text, in JSON Lines and Parquet."""
    separator: str | None = None
    """The line between two documents of a text file; "": a blank line; None: each file is one document."""
    pattern: str | None = None
    """Which files of a folder are read; None: all with a known suffix. Unknown suffixes are read as text."""

    def source_in(self, path: Path, without: Sequence[Path] = ()) -> Files:
        """The source that reads a file or folder, except the files `without`.

        Raises ValueError for a folder without such files or with several formats, and for an unsupported format.
        """
        files, root, names = [path], path.parent, list[str]()
        if path.is_dir():
            used = {other.resolve() for other in without}
            found, broken = files_below(path, self.pattern)
            found = [file for file in found if not used & {file.resolve(), *file.resolve().parents}]
            files, root = [file for file in found if self.pattern or kind_of(file, KINDS)], path
            skipped = (file.relative_to(path) for file in sorted({*broken, *found} - {*files}))
            names = [file.as_posix() for file in skipped if not hidden(file)]
        elif not path.is_file():
            raise ValueError(f"{path}: expected a file or a folder, got neither")
        kinds = {kind_of(file, NAMED_KINDS) or text_or_error(file) for file in files}
        if len(kinds) != 1:
            others = f" (skipped because of an unknown format: {join_names(names)})" if names else ""
            what = " and ".join(sorted(kind.__name__ for kind in kinds)) or f"none{others}"
            raise ValueError(
                f"{path}: expected files of one format among {', '.join(KINDS)}, found {what}; choose with --pattern, "
                f'for example --pattern="*.txt"'
            )
        (kind,) = kinds
        if kind is Parquet or any(ending_of(file)[1] == ".zst" for file in files):
            require("pyarrow")
        source: Files = kind(files, root, text_field=self.text_field, separator=self.separator)
        source.skipped = names
        return source


def kind_of(file: Path, kinds: Mapping[str, type[Files]]) -> Any:
    """The format of a file by its suffix; None: unknown."""
    ending, compression = ending_of(file)
    kind = kinds.get(ending)
    return None if kind is Parquet and compression else kind


def text_or_error(file: Path) -> type[TextFiles]:
    """Files with an unknown suffix are read as text. Raises ValueError for tables and archives."""
    ending, compression = ending_of(file)
    if ending in NOT_TEXT or (ending == ".parquet" and compression):
        raise ValueError(
            f"{file}: expected text or one of {', '.join(NAMED_KINDS)} (all except Parquet also with "
            f"{', '.join(COMPRESSIONS)}), got {ending}{compression}; convert it to JSON Lines, with one "
            f'{{"text": "…"}} per document'
        )
    return TextFiles


def ending_of(file: Path) -> tuple[str, str]:
    """The suffix without that of a compression, and that of the compression, both in lower case."""
    *_, before, last = ["", "", *(suffix.lower() for suffix in file.suffixes)]
    return (before, last) if last in COMPRESSIONS else (last, "")


def text_of(row: Any, field: str, place: str) -> str:
    """The text in a field of a row; null is read as an empty text."""
    if not isinstance(row, dict) or field not in row:
        raise ValueError(_no_such_field(place, field, row if isinstance(row, dict) else [type(row).__name__]))
    text = "" if row[field] is None else row[field]
    if not isinstance(text, str):
        raise ValueError(f"{place}: expected a string in {field!r}, got {type(text).__name__}")
    return without_lone_surrogates(text)


def _no_such_field(place: str, field: str, fields: Any) -> str:
    there = ", ".join(map(repr, fields)) or "none"
    return f"{place}: expected a field {field!r}, got {there}; name the field that contains the text with --text-field"
