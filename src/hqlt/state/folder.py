"""Stored prefixes in a folder: a safetensors file each, found by its name, believed after a look at its contents."""

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
OURS = re.compile(r"[0-9]+-[0-9a-f]{16}-[0-9a-f]{64}\.safetensors")
TOKENS = "tokens"

REMOVED_AT_ONCE = 0.1
"""Share of what the files may take, so that not all of them are looked at for each new one."""

log = logging.getLogger(__name__)


@dataclass
class Listing:
    """An owner's files."""

    changed: int
    """When their folder last changed."""
    keys: set[str] = field(default_factory=set)
    places: set[tuple[int, int]] = field(default_factory=set)

    def add(self, key: str) -> None:
        self.keys.add(key)
        length, mark, _ = key.split("-")
        self.places.add((int(length), int(mark, base=16)))


class PrefixFolder:
    """Files FOLDER/OWNER/KEY.safetensors: the tensors of a state, and the tokens that it has read.

    Each file appears whole or not at all, and never changes. Writers take turns, whether threads or processes; what a
    killed one left unfinished is removed by the next. Readers wait for nobody. What is damaged or foreign is skipped,
    with one warning of the logger `hqlt.state.folder` a file, and so is what cannot be written.

    max_bytes: what the files may take in all; the least recently used are removed before a new one is written, a tenth
    of all at once. A file FOLDER/bytes says what they take. Nothing but files of these names is ever removed. Only the
    folder's owner may read what is made there: it holds the texts.
    """

    def __init__(self, path: str | Path, max_bytes: int | None = None) -> None:
        self.path = Path(path)
        self.max_bytes = max_bytes
        check_writable(self.path, folder=True)
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._listed: dict[str, Listing] = {}
        self._skipped: set[Path] = set()

    def places(self, owner: str) -> set[tuple[int, int]]:
        """The lengths and marks of an owner's stored prefixes; listed again where another process has written."""
        return self._list(owner).places

    def read(self, owner: str, ids: NDArray[np.int64], key: str) -> dict[str, Tensor] | None:
        """The tensors that were stored for these tokens; None where there are none, or none that can be believed."""
        path = self._place(owner, key)
        if key not in self._list(owner).keys or path in self._skipped:
            return None
        try:
            tensors = _checked(path, owner, ids)
            os.utime(path)  # used now
        except FileNotFoundError:  # another process has removed it
            return None
        except (OSError, ValueError) as error:
            self._skip(path, reason(error))
            return None
        return tensors

    def skip(self, owner: str, key: str, why: str) -> None:
        """Report a file that cannot be believed, and leave it alone until it is written anew."""
        self._skip(self._place(owner, key), why)

    def _skip(self, path: Path, why: str) -> None:
        self._skipped.add(path)
        log.warning("%s is skipped: %s", path, why)

    def write(self, owner: str, ids: NDArray[np.int64], key: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep these tensors, which are on the CPU, for these tokens."""
        path = self._place(owner, key)
        try:
            if self._is_there(path):
                return
            told = {"format": FORMAT, "owner": owner, "checksum": _checksum(tensors)}
            data = save({TOKENS: torch.from_numpy(ids)} | {name: x.clone() for name, x in tensors.items()}, told)
            with folder_lock(self.path, wait=True):
                if not self._is_there(path) and self._make_room(len(data)):
                    path.parent.mkdir(mode=0o700, exist_ok=True)
                    listing = self._list(owner)
                    for killed in path.parent.glob(f"*{ENDING}{UNFINISHED}"):
                        killed.unlink()
                    write_atomic(path, data)
                    listing.add(key)
                    listing.changed = path.parent.stat().st_mtime_ns  # as nobody else has changed it meanwhile
                    self._skipped.discard(path)
        except OSError as error:
            log.warning("%s is not written: %s", path, reason(error))

    def _is_there(self, path: Path) -> bool:
        """And used now, if it is."""
        with contextlib.suppress(FileNotFoundError):
            if path not in self._skipped:
                os.utime(path)
                return True
        return False

    def _place(self, owner: str, key: str) -> Path:
        return self.path / owner / f"{key}{ENDING}"

    def _list(self, owner: str) -> Listing:
        place = self.path / owner
        try:
            changed = place.stat().st_mtime_ns
            if owner not in self._listed or self._listed[owner].changed != changed:
                listing = Listing(changed)
                for name in os.listdir(place):
                    if OURS.fullmatch(name):
                        listing.add(name.removesuffix(ENDING))
                self._listed[owner] = listing
        except OSError as error:
            if not isinstance(error, FileNotFoundError) and place not in self._skipped:
                self._skip(place, reason(error))
            return Listing(0)
        return self._listed[owner]

    def _make_room(self, new: int) -> bool:
        """Count the new bytes in, and remove the least recently used files where they do not fit. False: too many."""
        count = self.path / "bytes"
        most = math.inf if self.max_bytes is None else self.max_bytes
        if new > most:
            return False
        try:
            total = int(count.read_text())
        except (FileNotFoundError, ValueError):
            total = None
        if total is None or total + new > most:
            files = sorted(self._files(), key=lambda file: file[1].st_mtime_ns)
            total = sum(stat.st_size for _, stat in files)
            left = total if total + new <= most else min(most - new, (1 - REMOVED_AT_ONCE) * most)
            for path, stat in files:
                if total <= left:
                    break
                path.unlink(missing_ok=True)
                with contextlib.suppress(OSError):  # not empty
                    path.parent.rmdir()
                total -= stat.st_size
        count.write_text(str(total + new))
        return True

    def _files(self) -> Iterator[tuple[Path, os.stat_result]]:
        for path in self.path.glob(f"*/*{ENDING}"):
            with contextlib.suppress(FileNotFoundError):
                if OURS.fullmatch(path.name) and path.is_file():
                    yield path, path.stat()


def _checked(path: Path, owner: str, ids: NDArray[np.int64]) -> dict[str, Tensor]:
    """What a file holds. Raises ValueError where it is not what its name says."""
    try:
        with safe_open(path, framework="pt") as file:
            told = file.metadata() or {}
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"expected a safetensors file, got {error}") from error
    if told.get("format") != FORMAT:
        raise ValueError(f"expected format {FORMAT!r}, got {told.get('format')!r}")
    if told.get("owner") != owner:
        raise ValueError("expected an entry of the model and the salt that its folder is of, got another's")
    tokens = tensors.pop(TOKENS, torch.empty(0))
    if tokens.dtype != torch.int64 or not torch.equal(tokens, torch.from_numpy(ids)):
        raise ValueError("expected the tokens that its name is the digest of, got others")
    if told.get("checksum") != _checksum(tensors):
        raise ValueError("expected the numbers that were written, got others")
    return tensors


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, x in sorted(tensors.items()):
        digest.update(f"{name} {x.dtype} {list(x.shape)} ".encode())
        digest.update(x.flatten().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
