"""Reading a folder of tokens: memory-mapped, and checked against its manifest."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hqlt.data.manifest import Manifest, read_manifest
from hqlt.data.shard import Shard, stored
from hqlt.data.tokenizer import Tokenizer, load_tokenizer
from hqlt.task.task import Split

ADVICE = "restore it from a copy, or prepare the data anew into another folder"


class TokenFiles:
    """One split of a folder that `hqlt data prepare` wrote: its documents end to end.

    Opening it compares the sizes of all files with the manifest; `hqlt data check` compares their contents.
    Raises ValueError that names the file, what was expected and what was found.
    """

    def __init__(self, folder: str | Path, split: Split = "train") -> None:
        self.folder, self.split = Path(folder), split
        self.manifest, _ = read_manifest(self.folder)
        shards = self.manifest.splits.get(split, [])
        if not shards:
            there = [name for name, shards in self.manifest.splits.items() if shards]
            raise ValueError(f"split: expected one that {self.folder} holds, {' or '.join(there)}, got {split!r}")
        self.ends = np.cumsum([shard.tokens for shard in shards])
        self._tokens = [_open(self.folder, shard, ".tokens", self.manifest.dtype) for shard in shards]
        self._starts = [_open(self.folder, shard, ".starts", "uint64") for shard in shards]

    def __len__(self) -> int:
        """Tokens, with those that end documents."""
        return int(self.ends[-1])

    @property
    def bytes(self) -> int:
        """Of the text, in UTF-8."""
        return self.manifest.bytes(self.split)

    @property
    def documents(self) -> int:
        return self.manifest.documents(self.split)

    @property
    def vocab_size(self) -> int:
        return int(self.manifest.tokenizer["vocab_size"])

    @functools.cached_property
    def digest(self) -> str:
        """Names the data: other tokens, borders or meaning of a token give another digest."""
        shards = [(shard.sha256_tokens, shard.sha256_starts) for shard in self.manifest.splits[self.split]]
        told = json.dumps([self.manifest.tokenizer["digest"], self.manifest.dtype, shards])
        return hashlib.sha256(told.encode()).hexdigest()

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The one that made the tokens, from the folder itself."""
        return tokenizer_of(self.folder, self.manifest)

    def read(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """The tokens start … stop − 1, [t] int64, and where a document begins among them, [t] bool.

        Raises ValueError where they cannot be this tokenizer's: the file was damaged.
        """
        if not 0 <= start < stop <= len(self):
            raise IndexError(f"start, stop: expected 0 ≤ start < stop ≤ {len(self)}, got {start} and {stop}")
        tokens = np.empty(stop - start, dtype=np.int64)
        begins = np.zeros(stop - start, dtype=bool)
        for i in range(int(np.searchsorted(self.ends, start, side="right")), len(self.ends)):
            offset = int(self.ends[i - 1]) if i else 0
            if offset >= stop:
                break
            low, high = max(start - offset, 0), min(stop - offset, len(self._tokens[i]))
            to = low + offset - start
            found = self._tokens[i][low:high]
            if found.max() >= self.vocab_size:
                name = self.manifest.splits[self.split][i].name
                raise ValueError(
                    f"{self.folder / name}.tokens: expected tokens below {self.vocab_size}, found {found.max()}; see "
                    f"`hqlt data check {self.folder}`; {ADVICE}"
                )
            tokens[to : to + high - low] = found
            first, last = np.searchsorted(self._starts[i], np.array([low, high], np.uint64))
            begins[self._starts[i][first:last].astype(np.int64) + offset - start] = True
        return torch.from_numpy(tokens), torch.from_numpy(begins)


def check(folder: str | Path) -> Iterator[tuple[str, str | None]]:
    """Read every file of a folder of tokens; yields its name, and None or what is wrong with it."""
    folder = Path(folder)
    manifest, _ = read_manifest(folder)
    for shards in manifest.splits.values():
        for shard in shards:
            yield f"{shard.name}.tokens", _fault(folder, shard, ".tokens", manifest.dtype, shard.sha256_tokens)
            yield f"{shard.name}.starts", _fault(folder, shard, ".starts", "uint64", shard.sha256_starts)
    try:
        found = tokenizer_of(folder, manifest).digest
        expected = manifest.tokenizer["digest"]
        wrong = None if found == expected else f"expected the digest {expected}, found {found}; {ADVICE}"
    except ValueError as error:
        wrong = str(error)
    yield "tokenizer", wrong


def tokenizer_of(folder: Path, manifest: Manifest) -> Tokenizer:
    name = manifest.tokenizer["name"]
    return load_tokenizer("bytes" if name == "bytes" else folder / "tokenizer")


def _fault(folder: Path, shard: Shard, ending: str, dtype: str, sha256: str) -> str | None:
    try:
        _open(folder, shard, ending, dtype)
    except ValueError as error:
        return str(error)
    path = folder / f"{shard.name}{ending}"
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    return None if found == sha256 else f"{path}: expected the checksum {sha256}, found {found}; {ADVICE}"


def _open(folder: Path, shard: Shard, ending: str, dtype: str) -> NDArray[Any]:
    path = folder / f"{shard.name}{ending}"
    numbers = shard.tokens if ending == ".tokens" else shard.documents
    expected = numbers * stored(dtype).itemsize
    if not path.is_file():
        raise ValueError(f"{path}: expected a file of {expected} bytes, found none; {ADVICE}")
    found = path.stat().st_size
    if found != expected:
        raise ValueError(f"{path}: expected {expected} bytes, found {found}; {ADVICE}")
    mapped = torch.from_file(str(path), size=found, dtype=torch.uint8)  # keeps no file open, unlike np.memmap
    return mapped.numpy().view(stored(dtype))
