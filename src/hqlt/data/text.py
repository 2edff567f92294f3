"""Text as it lies in files: UTF-8, perhaps with a byte order mark, perhaps compressed."""

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
"""By a file's last ending, in lower case."""
OTHER_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",  # begins as the mark of UTF-16 does
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


@contextlib.contextmanager
def opened(file: Path) -> Iterator[tuple[IO[bytes], Callable[[], int]]]:
    """What is in a file, uncompressed by its ending, and a function: how many bytes of the file were read so far.

    Raises ValueError for a compressed file that is damaged.
    """
    with file.open("rb") as raw:
        ending = file.suffix.lower()
        try:
            yield _uncompressed(raw, ending), raw.tell
        except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
            if ending not in COMPRESSIONS or (isinstance(error, OSError) and error.errno is not None):
                raise
            raise ValueError(
                f"{file}: expected a whole {COMPRESSIONS[ending]} file, got {error} after {raw.tell():,} bytes"
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
    """The beginning of a file without UTF-8's byte order mark. Raises ValueError for the mark of another encoding."""
    for mark, encoding in OTHER_MARKS.items():
        if data.startswith(mark):
            raise ValueError(
                f"{file}: expected text in UTF-8, got {encoding}, whose byte order mark it begins with; convert it "
                f"first, such as by: iconv -f {encoding} -t UTF-8"
            )
    return data.removeprefix(codecs.BOM_UTF8)


def decoded(data: bytes, file: Path) -> str:
    """Raises ValueError for what is not UTF-8."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: expected text in UTF-8, got {error}; convert it first, by iconv for one") from error


def read_text(file: Path) -> str:
    """A whole file. Raises ValueError for what is not UTF-8, OSError for what cannot be read."""
    with opened(file) as (content, _):
        return decoded(without_mark(content.read(), file), file)


def beginning_of(file: Path, size: int) -> tuple[str, bool]:
    """About as many bytes of a file, as text, and whether that is all of it. Raises what `read_text` raises."""
    with opened(file) as (content, _):
        data, more = content.read(size), content.read(4)
    for end in range(len(more) + 1):  # a character has at most four bytes
        with contextlib.suppress(UnicodeDecodeError):
            return without_mark(data + more[:end], file).decode(), end == len(more) < 4
    return decoded(without_mark(data + more, file), file), False


def printable(text: str) -> str:
    """The same text, with U+FFFD for what would control a terminal."""
    return "".join(letter if letter.isprintable() or letter in "\n\t" else "\ufffd" for letter in text)
