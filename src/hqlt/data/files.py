"""Reading a folder of token files: memory-mapped and checked against the manifest."""

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

RECOVERY_HINT = "restore the file from a copy, or prepare the data again in another folder"


class TokenFiles:
    """One split of a folder written by `hqlt data prepare`, as one sequence of concatenated documents.

    Opening the split checks the size of each file against the manifest; `hqlt data check` also checks the contents.

    Args:
        folder: a folder written by `prepare`.
        split: "train", "validation" or "test".

    Raises:
        ValueError: if the folder has no such split, or if a file is missing or has the wrong size.

    Example:
        >>> import pathlib
        >>> from hqlt.data import TokenFiles, prepare
        >>> _ = pathlib.Path("text.txt").write_text("some text")
        >>> _ = prepare("text.txt", "data", validation_share=0, test_share=0)
        >>> tokens, begins = TokenFiles("data").read(0, 4)
        >>> tokens.tolist(), begins.tolist()
        ([115, 111, 109, 101], [True, False, False, False])
    """

    def __init__(self, folder: str | Path, split: Split = "train") -> None:
        self.folder, self.split = Path(folder), split
        self.manifest, _ = read_manifest(self.folder)
        shards = self.manifest.splits.get(split, [])
        if not shards:
            present = [name for name, shards in self.manifest.splits.items() if shards]
            raise ValueError(f"split: expected {' or '.join(present)}, the splits of {self.folder}, got {split!r}")
        self.ends = np.cumsum([shard.tokens for shard in shards])
        self._tokens = [_open(self.folder, shard, ".tokens", self.manifest.dtype) for shard in shards]
        self._starts = [_open(self.folder, shard, ".starts", "uint64") for shard in shards]

    def __len__(self) -> int:
        """Number of tokens, including those that end documents."""
        return int(self.ends[-1])

    @property
    def bytes(self) -> int:
        """Size of the text in UTF-8, in bytes."""
        return self.manifest.bytes(self.split)

    @property
    def documents(self) -> int:
        """Number of documents."""
        return self.manifest.documents(self.split)

    @property
    def vocab_size(self) -> int:
        """Vocabulary size of the tokenizer."""
        return int(self.manifest.tokenizer["vocab_size"])

    @functools.cached_property
    def digest(self) -> str:
        """Identifies the data: changes if the tokens, the document boundaries or the tokenizer change."""
        shards = [(shard.sha256_tokens, shard.sha256_starts) for shard in self.manifest.splits[self.split]]
        content = json.dumps([self.manifest.tokenizer["digest"], self.manifest.dtype, shards])
        return hashlib.sha256(content.encode()).hexdigest()

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that produced the tokens, loaded from the folder."""
        return tokenizer_of(self.folder, self.manifest)

    def read(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Read a range of tokens.

        Args:
            start: index of the first token.
            stop: index after the last token.

        Returns:
            The tokens ([t] int64), and whether each one begins a document ([t] bool), with t = stop − start.

        Raises:
            IndexError: if the range is empty or exceeds the split.
            ValueError: if a token is not in the vocabulary, because the file is damaged.
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
                    f"`hqlt data check {self.folder}`; {RECOVERY_HINT}"
                )
            tokens[to : to + high - low] = found
            first, last = np.searchsorted(self._starts[i], np.array([low, high], np.uint64))
            begins[self._starts[i][first:last].astype(np.int64) + offset - start] = True
        return torch.from_numpy(tokens), torch.from_numpy(begins)


def check(folder: str | Path) -> Iterator[tuple[str, str | None]]:
    """Compare all files of a data folder with the checksums in its manifest.

    Args:
        folder: a folder written by `prepare`.

    Returns:
        An iterator that yields, for each file, its name and a description of the fault, or None if it is intact.

    Example:
        >>> import pathlib
        >>> from hqlt.data import check, prepare
        >>> _ = pathlib.Path("text.txt").write_text("some text")
        >>> _ = prepare("text.txt", "data", validation_share=0, test_share=0)
        >>> list(check("data"))
        [('train-00000.tokens', None), ('train-00000.starts', None), ('tokenizer', None)]
    """
    folder = Path(folder)
    manifest, _ = read_manifest(folder)
    for shards in manifest.splits.values():
        for shard in shards:
            yield f"{shard.name}.tokens", _fault(folder, shard, ".tokens", manifest.dtype, shard.sha256_tokens)
            yield f"{shard.name}.starts", _fault(folder, shard, ".starts", "uint64", shard.sha256_starts)
    try:
        found = tokenizer_of(folder, manifest).digest
        expected = manifest.tokenizer["digest"]
        fault = None if found == expected else f"expected the digest {expected}, found {found}; {RECOVERY_HINT}"
    except ValueError as error:
        fault = str(error)
    yield "tokenizer", fault


def tokenizer_of(folder: Path, manifest: Manifest) -> Tokenizer:
    """The tokenizer that is saved in a data folder."""
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
    return None if found == sha256 else f"{path}: expected the checksum {sha256}, found {found}; {RECOVERY_HINT}"


def _open(folder: Path, shard: Shard, ending: str, dtype: str) -> NDArray[Any]:
    path = folder / f"{shard.name}{ending}"
    numbers = shard.tokens if ending == ".tokens" else shard.documents
    expected = numbers * stored(dtype).itemsize
    if not path.is_file():
        raise ValueError(f"{path}: expected a file of {expected} bytes, found none; {RECOVERY_HINT}")
    found = path.stat().st_size
    if found != expected:
        raise ValueError(f"{path}: expected {expected} bytes, found {found}; {RECOVERY_HINT}")
    mapped = torch.from_file(str(path), size=found, dtype=torch.uint8)  # unlike np.memmap, this keeps no file open
    return mapped.numpy().view(stored(dtype))
