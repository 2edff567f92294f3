"""A shard: some complete documents of a split, in two files that are written atomically."""

from __future__ import annotations

import contextlib
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hqlt.disk import explain_write_errors, unfinished_path, write_synced


@dataclass(frozen=True, kw_only=True)
class Shard:
    """The manifest's entry for NAME.tokens (concatenated documents) and NAME.starts (their first positions, uint64)."""

    name: str
    tokens: int
    documents: int
    bytes: int
    """Size of the text in UTF-8, in bytes."""
    sha256_tokens: str
    sha256_starts: str


class ShardWriter:
    """Writes documents to temporary files; `finish` renames them to their final names, `abandon` removes them."""

    def __init__(self, folder: Path, name: str, dtype: str) -> None:
        self.name = name
        self.dtype = stored(dtype)
        self.paths = [folder / f"{name}{ending}" for ending in (".tokens", ".starts")]
        self.tokens = self.bytes = 0
        self.starts: list[int] = []
        self.digest = hashlib.sha256()
        with explain_write_errors(self.paths[0]):
            self.file = unfinished_path(self.paths[0]).open("wb", buffering=1 << 20)

    def add(self, ids: NDArray[Any], text_bytes: int) -> None:
        """Append one document."""
        data = ids.astype(self.dtype).tobytes()
        with explain_write_errors(self.paths[0]):
            self.file.write(data)
        self.digest.update(data)
        self.starts.append(self.tokens)
        self.tokens += len(ids)
        self.bytes += text_bytes

    def finish(self) -> Shard:
        """Move the files to their final names and return the manifest's entry."""
        starts = np.array(self.starts, dtype=stored("uint64")).tobytes()
        with explain_write_errors(self.paths[0]):
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()
        with explain_write_errors(self.paths[1]):
            write_synced(unfinished_path(self.paths[1]), starts)
            for path in self.paths:
                unfinished_path(path).replace(path)
        return Shard(
            name=self.name,
            tokens=self.tokens,
            documents=len(self.starts),
            bytes=self.bytes,
            sha256_tokens=self.digest.hexdigest(),
            sha256_starts=hashlib.sha256(starts).hexdigest(),
        )

    def abandon(self) -> None:
        """Remove the temporary files."""
        with contextlib.suppress(OSError):  # the disk may be too full for the remaining buffer
            self.file.close()
        for path in self.paths:
            unfinished_path(path).unlink(missing_ok=True)


def stored(dtype: str) -> np.dtype[Any]:
    """The dtype in the file: little-endian on every machine."""
    return np.dtype(dtype).newbyteorder("<")
