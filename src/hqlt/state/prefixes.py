"""Texts that begin alike are read once: the state after a prefix is kept, and found by the tokens that it has read."""

from __future__ import annotations

import hashlib
import threading
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hqlt.memory import MemoryState
from hqlt.registry import check_choice
from hqlt.state.folder import PrefixFolder
from hqlt.state.small import DTYPES, pack, unpack
from hqlt.state.storage import fingerprint, layers_of, unwrapped

if TYPE_CHECKING:
    from hqlt.model import HQLTCache

Tokens = Sequence[int] | Tensor
"""[t], or [1, t]: one text."""

BASE = 0x9E3779B97F4A7C15
"""Of `marks_of`: odd, and as good as random."""


class Found(NamedTuple):
    """The longest stored prefix of a text."""

    length: int
    """How many of the text's tokens it has; 0 where none is stored."""
    states: tuple[MemoryState, ...]
    """One a layer, of one row, after these tokens; () where none is stored."""


class Statistics(NamedTuple):
    """What a store holds, and how often it was of use."""

    hits: int
    """Calls of `find` that found a prefix."""
    misses: int
    """Those that found none."""
    entries: int
    """States in memory."""
    bytes: int
    """What they take."""


Place = tuple[int, int]
"""A prefix's length, and its mark: by these a text's prefixes that may be stored are told from the others."""


class Entry(NamedTuple):
    """States in memory."""

    place: Place
    owner: str
    tensors: Mapping[str, Tensor]

    @property
    def bytes(self) -> int:
        return sum(x.nbytes for x in self.tensors.values())


class PrefixStore:
    """States by the tokens that they have read: the longest stored prefix of a prompt need not be read again.

    >>> store = hqlt.state.PrefixStore(model)
    >>> cache = store.cache_for(prompt)              # what is stored of the prompt has been read already
    >>> text = model.generate(prompt, past_key_values=cache)
    >>> store.put(text[0, :-1], cache.states)        # `generate` does not read the last token that it makes

    What follows equals reading anew, because a state is all that a model knows of its past. An entry's key is a digest
    of the model's fingerprint and dtype, the salt and the tokens, so that neither another model's state nor one of
    another salt (another user's) is ever found. The time to find grows with the prompt, not with what is stored.

    model: a language model of hqlt, whose weights stay as they are now. max_bytes: what the states in memory may take;
    the least recently used go first. They are held on the CPU, and given out on the device where each layer is.

    folder: where entries are kept, too, beyond memory and this process: other processes may use the same folder at the
    same time, for the same model or others (`hqlt.state.folder.PrefixFolder`; what is damaged there is skipped with a
    warning of the logger `hqlt.state.folder`). max_disk_bytes: what all files in it may take; None: without end.

    dtype: "bfloat16" or "int8" stores rounded states (`hqlt.state.pack`), which changes the continuation a little; None
    stores them exactly. What was stored in one dtype is not found in another.

    All methods may be called from several threads at once.

    Raises ValueError for a model without layers of hqlt, and OSError for a folder that cannot be written.
    """

    def __init__(
        self,
        model: nn.Module,
        max_bytes: int = 1 << 30,
        folder: str | Path | None = None,
        max_disk_bytes: int | None = None,
        dtype: str | None = None,
    ) -> None:
        self.module = unwrapped(model)
        self.layers = layers_of(self.module)
        if not self.layers:
            raise ValueError(f"model: expected one with layers of hqlt, got a {type(self.module).__name__} without")
        if dtype is not None:
            check_choice("dtype", dtype, DTYPES)
        if folder is None and max_disk_bytes is not None:
            raise ValueError(f"max_disk_bytes: expected together with a folder, got {max_disk_bytes} without")
        self.max_bytes, self.dtype = max_bytes, dtype
        self.folder = None if folder is None else PrefixFolder(folder, max_disk_bytes)
        self._maker = f"{fingerprint(self.module)} {self.layers[0].like.dtype} {dtype}"
        self._lock = threading.Lock()
        self._entries: OrderedDict[str, Entry] = OrderedDict()
        """By key, the least recently used first."""
        self._places: defaultdict[str, Counter[Place]] = defaultdict(Counter)
        """By owner: how many entries in memory have each place."""
        self._bytes = self._hits = self._misses = 0

    def put(self, tokens: Tokens, states: Sequence[MemoryState], salt: str = "") -> None:
        """Keep the states, one a layer, of one row, that have read exactly these tokens from the beginning of a text.

        Raises ValueError for states of another model, of several rows, or that have read another number of tokens.
        """
        ids = as_ids(tokens)
        if not len(ids):
            return
        self._check(len(ids), states)
        owner, marks = self._owner(salt), marks_of(ids)
        key = keys_of(ids, owner, marks, [len(ids)])[len(ids)]
        entry = Entry((len(ids), int(marks[-1])), owner, side_by_side(pack(states, self.dtype)))
        with self._lock:
            self._insert(key, entry)
        if self.folder is not None:
            self.folder.write(owner, ids, key, entry.tensors)

    def find(self, tokens: Tokens, salt: str = "") -> Found:
        """The longest stored prefix of these tokens that leaves at least one of them to read."""
        ids, owner = as_ids(tokens)[:-1], self._owner(salt)
        marks = marks_of(ids)
        with self._lock:
            lengths = known_among(self._places.get(owner, Counter()).keys(), marks)
        if self.folder is not None:
            lengths |= known_among(self.folder.places(owner), marks)
        for length, key in reversed(keys_of(ids, owner, marks, sorted(lengths)).items()):
            if states := self._held(key) or self._on_disk(ids[:length], owner, key):
                with self._lock:
                    self._hits += 1
                return Found(length, states)
        with self._lock:
            self._misses += 1
        return Found(0, ())

    def cache_for(self, tokens: Tokens, salt: str = "") -> HQLTCache:
        """A cache that has read the longest stored prefix, for `model.generate` together with all of these tokens."""
        from hqlt.model import HQLTCache

        length, states = self.find(tokens, salt)
        return HQLTCache.from_states(states, seen_tokens=length) if length else HQLTCache()

    @property
    def statistics(self) -> Statistics:
        with self._lock:
            return Statistics(self._hits, self._misses, len(self._entries), self._bytes)

    def _owner(self, salt: str) -> str:
        """Names what may be found together: of one model, dtype, form and salt."""
        return hashlib.blake2b(f"{self._maker} {salt}".encode(), digest_size=32).hexdigest()

    def _check(self, length: int, states: Sequence[MemoryState]) -> None:
        if len(states) != len(self.layers):
            raise ValueError(f"states: expected one for each of {len(self.layers)} layers, got {len(states)}")
        for layer, state in zip(self.layers, states, strict=True):
            layer.check_state(state, torch.empty(1, device=state.position.device))
            if state.position.item() != length:
                raise ValueError(
                    f"states: expected to have read the {length} tokens given, got states that have read "
                    f"{state.position.item()} since their last reset (`generate` does not read the last token that it "
                    f"makes)"
                )

    def _held(self, key: str) -> tuple[MemoryState, ...]:
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                return ()
            self._entries.move_to_end(key)
        return self._there(unpack(entry.tensors, self.module))

    def _on_disk(self, ids: NDArray[np.int64], owner: str, key: str) -> tuple[MemoryState, ...]:
        if self.folder is None or (tensors := self.folder.read(owner, ids, key)) is None:
            return ()
        try:
            states = unpack(tensors, self.module)
            self._check(len(ids), states)
        except ValueError as error:
            self.folder.skip(owner, key, str(error))
            return ()
        with self._lock:
            self._insert(key, Entry((len(ids), int(marks_of(ids)[-1])), owner, tensors))
        return self._there(states)

    def _there(self, states: tuple[MemoryState, ...]) -> tuple[MemoryState, ...]:
        """Each on its layer's device."""
        return tuple(state.to(layer.like.device) for state, layer in zip(states, self.layers, strict=True))

    def _insert(self, key: str, entry: Entry) -> None:
        if key in self._entries:
            self._entries.move_to_end(key)
        elif entry.bytes <= self.max_bytes:
            self._entries[key] = entry
            self._places[entry.owner][entry.place] += 1
            self._bytes += entry.bytes
            while self._bytes > self.max_bytes:
                self._drop_oldest()

    def _drop_oldest(self) -> None:
        _, oldest = self._entries.popitem(last=False)
        self._bytes -= oldest.bytes
        places = self._places[oldest.owner]
        places[oldest.place] -= 1
        if not places[oldest.place]:
            del places[oldest.place]
        if not places:
            del self._places[oldest.owner]


def marks_of(ids: NDArray[np.int64]) -> NDArray[np.uint64]:
    """A number for each prefix of a text, by which the few that may be stored are told from the rest.

    Σ (token_i + 1) Bⁱ modulo 2⁶⁴ over the tokens of the prefix. Two prefixes seldom have the same one.
    """
    powers = np.cumprod(np.full(len(ids), BASE, dtype=np.uint64))
    return np.cumsum((ids + 1).astype(np.uint64) * powers)


def known_among(known: Collection[Place], marks: NDArray[np.uint64]) -> set[int]:
    """The lengths of a text's prefixes whose places are known, in a time that grows no faster than the text."""
    if len(known) < len(marks):
        return {length for length, mark in known if length <= len(marks) and marks[length - 1] == mark}
    return {length for length, mark in enumerate(marks.tolist(), start=1) if (length, mark) in known}


def keys_of(ids: NDArray[np.int64], owner: str, marks: NDArray[np.uint64], lengths: Iterable[int]) -> dict[int, str]:
    """The keys "LENGTH-MARK-DIGEST" of a text's prefixes of these lengths, in their order, the shortest first."""
    digest = hashlib.blake2b(key=bytes.fromhex(owner), digest_size=32)
    keys, before = {}, 0
    for length in lengths:
        digest.update(ids[before:length].astype("<u4").tobytes())
        keys[length], before = f"{length}-{int(marks[length - 1]):016x}-{digest.copy().hexdigest()}", length
    return keys


def as_ids(tokens: Tokens) -> NDArray[np.int64]:
    """[t]. Raises ValueError for several texts at once."""
    if isinstance(tokens, Tensor):
        tokens = tokens.detach().cpu()
    ids = np.asarray(tokens, dtype="<i8")
    if ids.ndim == 2 and len(ids) == 1:
        ids = ids[0]
    if ids.ndim != 1:
        raise ValueError(f"tokens: expected one text, [t] or [1, t], got shape {list(ids.shape)}")
    return ids


def side_by_side(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU, those of a dtype in one piece of memory.

    Views would keep all that they are parts of, and small pieces that stay would lie between others that come and go:
    the memory of a process that serves grew 1.4 times as much as the states in it.
    """
    copies: dict[str, Tensor] = dict.fromkeys(tensors, torch.empty(0))  # in the same order
    for dtype in {x.dtype for x in tensors.values()}:
        alike = {name: x.detach() for name, x in tensors.items() if x.dtype == dtype}
        whole = torch.cat([x.flatten() for x in alike.values()]).cpu()
        parts = whole.split([x.numel() for x in alike.values()])
        copies |= {name: part.view(x.shape) for (name, x), part in zip(alike.items(), parts, strict=True)}
    return copies
