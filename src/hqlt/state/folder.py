"""Stored prefixes on disk: one safetensors file each, looked up by name and verified by content."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from hqlt.disk import UNFINISHED, check_writable, folder_lock, write_atomic
from hqlt.errors import reason

FORMAT = "hqlt-prefix-1"
ENDING = ".safetensors"
FILE_NAME = re.compile(r"[0-9]+-[0-9a-f]{16}-[0-9a-f]{64}\.safetensors")
TOKENS = "tokens"

EVICTED_SHARE = 0.1
"""Share of the byte budget that is freed at once, so that the folder is not scanned for every new file."""

log = logging.getLogger(__name__)


@dataclass
class Listing:
    """The files of one owner."""

    modified: int
    """Modification time of their folder (nanoseconds)."""
    keys: set[str] = field(default_factory=set)
    prefixes: set[tuple[int, int]] = field(default_factory=set)
    """Length and hash of each stored prefix."""

    def add(self, key: str) -> None:
        self.keys.add(key)
        length, hash_, _ = key.split("-")
        self.prefixes.add((int(length), int(hash_, base=16)))


class PrefixFolder:
    """Files FOLDER/OWNER/KEY.safetensors, each with the tensors of a state and the tokens it has read.

    Files are written atomically and never change. One writer, thread or process, holds a lock at a time and removes
    what a killed writer left unfinished; readers take no lock. Damaged and foreign files are skipped, with one warning
    per file from the logger `hqlt.state.folder`; a failed write is logged likewise. Only files with names of this form
    are ever removed. The folder can be read by its owner alone, because it contains the texts.

    Args:
        path: the folder, which is created if necessary.
        max_bytes: maximum total size of the files; None for no limit. If a new file does not fit, the least recently
            used ones are removed first, at least a tenth of the budget at once. FOLDER/bytes holds the current total.

    Raises:
        OSError: when the folder cannot be written.
    """

    def __init__(self, path: str | Path, max_bytes: int | None = None) -> None:
        self.path = Path(path)
        self.max_bytes = max_bytes
        check_writable(self.path, folder=True)
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._listed: dict[str, Listing] = {}
        self._skipped: set[Path] = set()

    def prefixes(self, owner: str) -> set[tuple[int, int]]:
        """Length and hash of each stored prefix of an owner; the folder is listed again if it has been modified."""
        return self._list(owner).prefixes

    def read(self, owner: str, ids: NDArray[np.int64], key: str) -> dict[str, Tensor] | None:
        """The tensors stored for these tokens; None if there are none, or if their file is damaged or foreign."""
        path = self._path(owner, key)
        if key not in self._list(owner).keys or path in self._skipped:
            return None
        try:
            tensors = _verified(path, owner, ids)
            os.utime(path)  # marks it as recently used
        except FileNotFoundError:  # removed by another process
            return None
        except (OSError, ValueError) as error:
            self._skip(path, reason(error))
            return None
        return tensors

    def skip(self, owner: str, key: str, why: str) -> None:
        """Log a file that is damaged or foreign, and ignore it until it is written again."""
        self._skip(self._path(owner, key), why)

    def _skip(self, path: Path, why: str) -> None:
        self._skipped.add(path)
        log.warning("%s is skipped: %s", path, why)

    def write(self, owner: str, ids: NDArray[np.int64], key: str, tensors: Mapping[str, Tensor]) -> None:
        """Store tensors, which are on the CPU, for these tokens."""
        path = self._path(owner, key)
        try:
            if self._exists(path):
                return
            metadata = {"format": FORMAT, "owner": owner, "checksum": _checksum(tensors)}
            data = save({TOKENS: torch.from_numpy(ids)} | {name: x.clone() for name, x in tensors.items()}, metadata)
            with folder_lock(self.path, wait=True):
                if not self._exists(path) and self._make_room(len(data)):
                    path.parent.mkdir(mode=0o700, exist_ok=True)
                    listing = self._list(owner)
                    for unfinished in path.parent.glob(f"*{ENDING}{UNFINISHED}"):
                        unfinished.unlink()
                    write_atomic(path, data)
                    listing.add(key)
                    listing.modified = path.parent.stat().st_mtime_ns  # the lock excludes other writers
                    self._skipped.discard(path)
        except OSError as error:
            log.warning("%s was not written: %s", path, reason(error))

    def _exists(self, path: Path) -> bool:
        """Whether the file exists; if so, it is marked as recently used."""
        with contextlib.suppress(FileNotFoundError):
            if path not in self._skipped:
                os.utime(path)
                return True
        return False

    def _path(self, owner: str, key: str) -> Path:
        return self.path / owner / f"{key}{ENDING}"

    def _list(self, owner: str) -> Listing:
        folder = self.path / owner
        try:
            modified = folder.stat().st_mtime_ns
            if owner not in self._listed or self._listed[owner].modified != modified:
                listing = Listing(modified)
                for name in os.listdir(folder):
                    if FILE_NAME.fullmatch(name):
                        listing.add(name.removesuffix(ENDING))
                self._listed[owner] = listing
        except OSError as error:
            if not isinstance(error, FileNotFoundError) and folder not in self._skipped:
                self._skip(folder, reason(error))
            return Listing(0)
        return self._listed[owner]

    def _make_room(self, new: int) -> bool:
        """Add the new bytes to the total, removing the least recently used files if they do not fit.

        Returns False if they exceed the whole budget.
        """
        total_file = self.path / "bytes"
        budget = math.inf if self.max_bytes is None else self.max_bytes
        if new > budget:
            return False
        try:
            total = int(total_file.read_text())
        except (FileNotFoundError, ValueError):
            total = None
        if total is None or total + new > budget:
            files = sorted(self._files(), key=lambda file: file[1].st_mtime_ns)
            total = sum(stat.st_size for _, stat in files)
            target = total if total + new <= budget else min(budget - new, (1 - EVICTED_SHARE) * budget)
            for path, stat in files:
                if total <= target:
                    break
                path.unlink(missing_ok=True)
                with contextlib.suppress(OSError):  # not empty
                    path.parent.rmdir()
                total -= stat.st_size
        total_file.write_text(str(total + new))
        return True

    def _files(self) -> Iterator[tuple[Path, os.stat_result]]:
        for path in self.path.glob(f"*/*{ENDING}"):
            with contextlib.suppress(FileNotFoundError):
                if FILE_NAME.fullmatch(path.name) and path.is_file():
                    yield path, path.stat()


def _verified(path: Path, owner: str, ids: NDArray[np.int64]) -> dict[str, Tensor]:
    """The tensors in a file. Raises ValueError if its contents do not match its name."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"expected a safetensors file, got {error}") from error
    if metadata.get("format") != FORMAT:
        raise ValueError(f"expected format {FORMAT!r}, got {metadata.get('format')!r}")
    if metadata.get("owner") != owner:
        raise ValueError("expected a state of the model and salt that the folder belongs to, got one of another")
    tokens = tensors.pop(TOKENS, torch.empty(0))
    if tokens.dtype != torch.int64 or not torch.equal(tokens, torch.from_numpy(ids)):
        raise ValueError("expected the tokens whose digest is in the file name, got other tokens")
    if metadata.get("checksum") != _checksum(tensors):
        raise ValueError("expected tensors that match the checksum, got other values")
    return tensors


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, x in sorted(tensors.items()):
        digest.update(f"{name} {x.dtype} {list(x.shape)} ".encode())
        digest.update(x.flatten().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
