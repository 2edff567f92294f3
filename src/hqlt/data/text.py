"""Reading text files: UTF-8, optionally with a byte order mark, optionally compressed."""

from __future__ import annotations

import bz2
import codecs
import contextlib
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

COMPRESSIONS = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "Zstandard"}
"""Compression formats by the last suffix of a file name, in lower case."""
OTHER_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",  # starts with the byte order mark of UTF-16
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


@contextlib.contextmanager
def opened(file: Path) -> Iterator[tuple[IO[bytes], Callable[[], int]]]:
    """Open a file, decompressed by its suffix. Also yields a function that returns the position in the file in bytes.

    Raises ValueError if a compressed file is damaged.
    """
    with file.open("rb") as raw:
        ending = file.suffix.lower()
        try:
            yield _uncompressed(raw, ending), raw.tell
        except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
            if ending not in COMPRESSIONS or (isinstance(error, OSError) and error.errno is not None):
                raise
            raise ValueError(
                f"{file}: expected a complete {COMPRESSIONS[ending]} file, got {error} after {raw.tell():,} bytes"
            ) from error


def _uncompressed(raw: Any, ending: str) -> Any:
    match ending:
        case ".gz":
            return gzip.GzipFile(fileobj=raw)
        case ".bz2":
            return bz2.BZ2File(raw)
        case ".xz":
            return lzma.LZMAFile(raw)
        case ".zst":
            from pyarrow import CompressedInputStream

            return io.BufferedReader(CompressedInputStream(raw, "zstd"))
        case _:
            return raw


def without_mark(data: bytes, file: Path) -> bytes:
    """Strip the UTF-8 byte order mark from the start of a file. Raises ValueError for that of another encoding."""
    for mark, encoding in OTHER_MARKS.items():
        if data.startswith(mark):
            raise ValueError(
                f"{file}: expected text in UTF-8, got {encoding} (according to its byte order mark); convert it "
                f"first, for example: iconv -f {encoding} -t UTF-8"
            )
    return data.removeprefix(codecs.BOM_UTF8)


def decoded(data: bytes, file: Path) -> str:
    """Decode UTF-8. Raises ValueError if the data is not UTF-8."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file}: expected text in UTF-8, got {error}; convert it first, for example with iconv"
        ) from error


def read_text(file: Path) -> str:
    """Read a whole text file. Raises ValueError if it is not UTF-8, OSError if it cannot be read."""
    with opened(file) as (content, _):
        return decoded(without_mark(content.read(), file), file)


def beginning_of(file: Path, size: int) -> tuple[str, bool]:
    """The text of about the first `size` bytes, and whether this is the whole file. Raises what `read_text` raises."""
    with opened(file) as (content, _):
        data, more = content.read(size), content.read(4)
    for end in range(len(more) + 1):  # a character has at most four bytes
        with contextlib.suppress(UnicodeDecodeError):
            return without_mark(data + more[:end], file).decode(), end == len(more) < 4
    return decoded(without_mark(data + more, file), file), False


def printable(text: str) -> str:
    """Replace control characters, which could affect a terminal, with U+FFFD."""
    return "".join(letter if letter.isprintable() or letter in "\n\t" else "\ufffd" for letter in text)
