"""Texts that begin alike are read once: the state after a prefix is kept, and found by the tokens that it has read."""

from __future__ import annotations

import hashlib
import threading
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Container, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hqlt.memory import MemoryState
from hqlt.state.storage import fingerprint, layers_of, states_from, tensors_of, unwrapped

if TYPE_CHECKING:
    from hqlt.model import HQLTCache

Tokens = Sequence[int] | Tensor
"""[t], or [1, t]: one text."""


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


class Entry(NamedTuple):
    """One stored state."""

    length: int
    salt: str
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
    another salt (another user's) is ever found. To find costs time that grows with the prompt, not with the entries.

    model: a language model of hqlt, whose weights stay as they are now. max_bytes: what the states in memory may take;
    the least recently used go first. Held on the CPU, and given out on the device where each layer is. All methods may
    be called from several threads at once.
    """

    def __init__(self, model: nn.Module, max_bytes: int = 1 << 30) -> None:
        module = unwrapped(model)
        self.layers = layers_of(module)
        if not self.layers:
            raise ValueError(f"model: expected one with layers of hqlt, got a {type(module).__name__} without")
        self.max_bytes = max_bytes
        self.maker = f"{fingerprint(module)} {self.layers[0].like.dtype}"
        self._lock = threading.Lock()
        self._entries: OrderedDict[bytes, Entry] = OrderedDict()
        """By key, the least recently used first."""
        self._lengths: defaultdict[str, Counter[int]] = defaultdict(Counter)
        """By salt: how many entries have each length."""
        self._bytes = self._hits = self._misses = 0

    def put(self, tokens: Tokens, states: Sequence[MemoryState], salt: str = "") -> None:
        """Keep the states, one a layer, of one row, that have read exactly these tokens from the beginning of a text.

        Raises ValueError for states of another model, of several rows, or that have read another number of tokens.
        """
        ids = as_ids(tokens)
        if not len(ids):
            return
        self._check(ids, states)
        (key,) = self._keys(ids, salt, {len(ids)}).values()
        entry = Entry(len(ids), salt, {name: on_cpu(x) for name, x in tensors_of(states).items()})
        with self._lock:
            self._insert(key, entry)

    def find(self, tokens: Tokens, salt: str = "") -> Found:
        """The longest stored prefix of these tokens that leaves at least one of them to read."""
        keys = self._keys(as_ids(tokens)[:-1], salt, self._lengths.get(salt, ()))
        with self._lock:
            key = next((key for key in reversed(keys.values()) if key in self._entries), None)
            if key is None:
                self._misses += 1
                return Found(0, ())
            self._hits += 1
            self._entries.move_to_end(key)
            entry = self._entries[key]
        states = states_from(entry.tensors, self.layers)
        there = tuple(state.to(layer.like.device) for state, layer in zip(states, self.layers, strict=True))
        return Found(entry.length, there)

    def cache_for(self, tokens: Tokens, salt: str = "") -> HQLTCache:
        """A cache that has read the longest stored prefix, for `model.generate` together with all of these tokens."""
        from hqlt.model import HQLTCache

        length, states = self.find(tokens, salt)
        return HQLTCache.from_states(states, seen_tokens=length) if length else HQLTCache()

    @property
    def statistics(self) -> Statistics:
        with self._lock:
            return Statistics(self._hits, self._misses, len(self._entries), self._bytes)

    def _check(self, ids: NDArray[np.int64], states: Sequence[MemoryState]) -> None:
        if len(states) != len(self.layers):
            raise ValueError(f"states: expected one for each of {len(self.layers)} layers, got {len(states)}")
        for layer, state in zip(self.layers, states, strict=True):
            layer.check_state(state, torch.empty(1, device=state.position.device))
            if state.position.item() != len(ids):
                raise ValueError(
                    f"states: expected to have read the {len(ids)} tokens given, got states that have read "
                    f"{state.position.item()} since their last reset (`generate` does not read the last token that it "
                    f"makes)"
                )

    def _keys(self, ids: NDArray[np.int64], salt: str, lengths: Container[int]) -> dict[int, bytes]:
        """The keys of those prefixes of a text that have one of these lengths, by length, the shortest first."""
        owner = hashlib.blake2b(f"{self.maker} {salt}".encode()).digest()
        digest = hashlib.blake2b(key=owner, digest_size=32)
        keys, before = {}, 0
        for length in range(1, len(ids) + 1):
            if length in lengths:
                digest.update(ids[before:length].tobytes())
                keys[length], before = digest.copy().digest(), length
        return keys

    def _insert(self, key: bytes, entry: Entry) -> None:
        if key in self._entries:
            self._entries.move_to_end(key)
        elif entry.bytes <= self.max_bytes:
            self._entries[key] = entry
            self._lengths[entry.salt][entry.length] += 1
            self._bytes += entry.bytes
            while self._bytes > self.max_bytes:
                self._drop_oldest()

    def _drop_oldest(self) -> None:
        _, oldest = self._entries.popitem(last=False)
        self._bytes -= oldest.bytes
        lengths = self._lengths[oldest.salt]
        lengths[oldest.length] -= 1
        if not lengths[oldest.length]:
            del lengths[oldest.length]
        if not lengths:
            del self._lengths[oldest.salt]


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


def on_cpu(x: Tensor) -> Tensor:
    """In memory of its own size: a view would keep all that it is a part of."""
    x = x.detach().cpu().contiguous()
    return x if x.untyped_storage().nbytes() == x.nbytes else x.clone()
