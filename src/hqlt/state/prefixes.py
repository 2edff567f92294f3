"""A cache of states after prompt prefixes, looked up by the tokens that each state has read."""

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
from hqlt.state.quantization import DTYPES, pack, unpack
from hqlt.state.storage import fingerprint, layers_of, unwrap

if TYPE_CHECKING:
    from hqlt.model import HQLTCache

Tokens = Sequence[int] | Tensor
"""Token ids of one text: [t] or [1, t]."""

BASE = 0x9E3779B97F4A7C15
"""Base of the rolling hash: odd and pseudorandom."""


class PrefixMatch(NamedTuple):
    """The longest stored prefix of a text."""

    length: int
    """Number of tokens in the prefix; 0 if none is stored."""
    states: tuple[MemoryState, ...]
    """States after the prefix, one per layer, with one row; () if none is stored."""


class StoreStatistics(NamedTuple):
    """Contents and hit counts of a `PrefixStore`."""

    hits: int
    """Number of calls of `find` that found a prefix."""
    misses: int
    """Number of calls of `find` that found none."""
    entries: int
    """Number of entries in memory."""
    bytes: int
    """Size of the entries in memory."""


Prefix = tuple[int, int]
"""Length and hash of a prefix. They rule out most prefixes of a text before any digest is computed."""


class Entry(NamedTuple):
    """The states after one prefix, in memory."""

    prefix: Prefix
    owner: str
    tensors: Mapping[str, Tensor]

    @property
    def bytes(self) -> int:
        return sum(x.nbytes for x in self.tensors.values())


class PrefixStore:
    """A cache of states by the tokens they have read, so that the longest stored prefix of a prompt is not read again.

    Continuing from a stored state equals reading the whole prompt, because the state is all that a model knows of its
    past. An entry's key is a digest of the model's fingerprint and dtype, the salt and the tokens, so states of another
    model or another salt (such as another user's) are never found. The time of a lookup grows with the prompt, not with
    the number of entries. All methods are thread-safe.

    Args:
        model: a language model of hqlt, whose weights must not change afterwards.
        max_bytes: maximum size of the states in memory; the least recently used are evicted. They are held on the CPU
            and returned on each layer's device.
        folder: a folder in which entries are kept as well, beyond the life of this process. Several processes may share
            it, for the same model or different ones. Damaged files are skipped with a warning from the logger
            `hqlt.state.folder`.
        max_disk_bytes: maximum size of all files in the folder; None for no limit.
        dtype: "bfloat16" or "int8" stores rounded states (see `pack`), which changes the continuation a little; None
            stores them exactly. States stored with one dtype are not found with another.

    Raises:
        ValueError: when the model has no layers of hqlt, the dtype is unknown, or `max_disk_bytes` is given without a
            folder.
        OSError: when the folder cannot be written.

    Example:
        >>> import torch
        >>> from hqlt import HQLTForCausalLM, preset
        >>> from hqlt.state import PrefixStore
        >>> model = HQLTForCausalLM(preset("tiny")).eval()
        >>> store, prompt = PrefixStore(model), torch.randint(0, 256, (1, 50))
        >>> cache = store.cache_for(prompt)  # has read the longest stored prefix
        >>> text = model.generate(prompt, past_key_values=cache, max_new_tokens=5)
        >>> store.put(text[:, :-1], cache.states)  # `generate` does not read the last token it generates
        >>> store.find(text).length
        54
    """

    def __init__(
        self,
        model: nn.Module,
        max_bytes: int = 1 << 30,
        folder: str | Path | None = None,
        max_disk_bytes: int | None = None,
        dtype: str | None = None,
    ) -> None:
        self.module = unwrap(model)
        self.layers = layers_of(self.module)
        if not self.layers:
            raise ValueError(
                f"model: expected a language model of hqlt, got a {type(self.module).__name__} without its layers"
            )
        if dtype is not None:
            check_choice("dtype", dtype, DTYPES)
        if folder is None and max_disk_bytes is not None:
            raise ValueError(f"max_disk_bytes: expected a folder as well, got {max_disk_bytes} without one")
        self.max_bytes, self.dtype = max_bytes, dtype
        self.folder = None if folder is None else PrefixFolder(folder, max_disk_bytes)
        self._model_key = f"{fingerprint(self.module)} {self.layers[0].like.dtype} {dtype}"
        self._lock = threading.Lock()
        self._entries: OrderedDict[str, Entry] = OrderedDict()
        """By key, least recently used first."""
        self._prefixes: defaultdict[str, Counter[Prefix]] = defaultdict(Counter)
        """By owner: the number of entries in memory with each prefix."""
        self._bytes = self._hits = self._misses = 0

    def put(self, tokens: Tokens, states: Sequence[MemoryState], salt: str = "") -> None:
        """Store the states after a text.

        Args:
            tokens (t): all tokens that the states have read, from the beginning of the text.
            states: one state per layer, with one row.
            salt: separates users; `find` needs the same one.

        Raises:
            ValueError: when the states are of another model, have several rows, or have read another number of tokens.
        """
        ids = token_ids(tokens)
        if not len(ids):
            return
        self._check(len(ids), states)
        owner, hashes = self._owner(salt), prefix_hashes(ids)
        key = prefix_keys(ids, owner, hashes, [len(ids)])[len(ids)]
        entry = Entry((len(ids), int(hashes[-1])), owner, compact_copies(pack(states, self.dtype)))
        with self._lock:
            self._insert(key, entry)
        if self.folder is not None:
            self.folder.write(owner, ids, key, entry.tensors)

    def find(self, tokens: Tokens, salt: str = "") -> PrefixMatch:
        """Find the longest stored prefix of a text that leaves at least one token to read.

        Args:
            tokens (t): the text.
            salt: the one that the states were stored with.

        Returns:
            Its length and states, of length 0 if no prefix is stored.
        """
        ids, owner = token_ids(tokens)[:-1], self._owner(salt)
        hashes = prefix_hashes(ids)
        with self._lock:
            lengths = matching_lengths(self._prefixes.get(owner, Counter()).keys(), hashes)
        if self.folder is not None:
            lengths |= matching_lengths(self.folder.prefixes(owner), hashes)
        for length, key in reversed(prefix_keys(ids, owner, hashes, sorted(lengths)).items()):
            if states := self._from_memory(key) or self._from_disk(ids[:length], owner, key):
                with self._lock:
                    self._hits += 1
                return PrefixMatch(length, states)
        with self._lock:
            self._misses += 1
        return PrefixMatch(0, ())

    def cache_for(self, tokens: Tokens, salt: str = "") -> HQLTCache:
        """Return a cache that has read the longest stored prefix of a text.

        Args:
            tokens (t): the text.
            salt: the one that the states were stored with.

        Returns:
            A cache to pass to `model.generate` together with the whole text; an empty one if no prefix is stored.
        """
        from hqlt.model import HQLTCache

        length, states = self.find(tokens, salt)
        return HQLTCache.from_states(states, seen_tokens=length) if length else HQLTCache()

    @property
    def statistics(self) -> StoreStatistics:
        """Hit counts, and number and size of the entries in memory."""
        with self._lock:
            return StoreStatistics(self._hits, self._misses, len(self._entries), self._bytes)

    def _owner(self, salt: str) -> str:
        """A digest of what entries must share to be found: the model, its dtype, the stored dtype and the salt."""
        return hashlib.blake2b(f"{self._model_key} {salt}".encode(), digest_size=32).hexdigest()

    def _check(self, length: int, states: Sequence[MemoryState]) -> None:
        if len(states) != len(self.layers):
            raise ValueError(f"states: expected {len(self.layers)}, one per layer, got {len(states)}")
        for layer, state in zip(self.layers, states, strict=True):
            layer.check_state(state, torch.empty(1, device=state.position.device))
            if state.position.item() != length:
                raise ValueError(
                    f"states: expected states that have read the {length} tokens given, got states that have read "
                    f"{state.position.item()} since their last reset (`generate` does not read the last token it "
                    f"generates)"
                )

    def _from_memory(self, key: str) -> tuple[MemoryState, ...]:
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                return ()
            self._entries.move_to_end(key)
        return self._on_layer_devices(unpack(entry.tensors, self.module))

    def _from_disk(self, ids: NDArray[np.int64], owner: str, key: str) -> tuple[MemoryState, ...]:
        if self.folder is None or (tensors := self.folder.read(owner, ids, key)) is None:
            return ()
        try:
            states = unpack(tensors, self.module)
            self._check(len(ids), states)
        except ValueError as error:
            self.folder.skip(owner, key, str(error))
            return ()
        with self._lock:
            self._insert(key, Entry((len(ids), int(prefix_hashes(ids)[-1])), owner, tensors))
        return self._on_layer_devices(states)

    def _on_layer_devices(self, states: tuple[MemoryState, ...]) -> tuple[MemoryState, ...]:
        return tuple(state.to(layer.like.device) for state, layer in zip(states, self.layers, strict=True))

    def _insert(self, key: str, entry: Entry) -> None:
        if key in self._entries:
            self._entries.move_to_end(key)
        elif entry.bytes <= self.max_bytes:
            self._entries[key] = entry
            self._prefixes[entry.owner][entry.prefix] += 1
            self._bytes += entry.bytes
            while self._bytes > self.max_bytes:
                self._evict_oldest()

    def _evict_oldest(self) -> None:
        _, oldest = self._entries.popitem(last=False)
        self._bytes -= oldest.bytes
        counts = self._prefixes[oldest.owner]
        counts[oldest.prefix] -= 1
        if not counts[oldest.prefix]:
            del counts[oldest.prefix]
        if not counts:
            del self._prefixes[oldest.owner]


def prefix_hashes(ids: NDArray[np.int64]) -> NDArray[np.uint64]:
    """A rolling hash of each prefix of a text: Σ (token_i + 1) Bⁱ modulo 2⁶⁴ over the tokens of the prefix. [t]"""
    powers = np.cumprod(np.full(len(ids), BASE, dtype=np.uint64))
    return np.cumsum((ids + 1).astype(np.uint64) * powers)


def matching_lengths(stored: Collection[Prefix], hashes: NDArray[np.uint64]) -> set[int]:
    """Lengths of the text's prefixes whose length and hash are stored, in time at most linear in the text."""
    if len(stored) < len(hashes):
        return {length for length, hash_ in stored if length <= len(hashes) and hashes[length - 1] == hash_}
    return {length for length, hash_ in enumerate(hashes.tolist(), start=1) if (length, hash_) in stored}


def prefix_keys(
    ids: NDArray[np.int64], owner: str, hashes: NDArray[np.uint64], lengths: Iterable[int]
) -> dict[int, str]:
    """The keys "LENGTH-HASH-DIGEST" of the prefixes of these lengths, which are in ascending order."""
    digest = hashlib.blake2b(key=bytes.fromhex(owner), digest_size=32)
    keys, before = {}, 0
    for length in lengths:
        digest.update(ids[before:length].astype("<u4").tobytes())
        keys[length], before = f"{length}-{int(hashes[length - 1]):016x}-{digest.copy().hexdigest()}", length
    return keys


def token_ids(tokens: Tokens) -> NDArray[np.int64]:
    """The tokens as an array [t]. Raises ValueError for several texts at once."""
    if isinstance(tokens, Tensor):
        tokens = tokens.detach().cpu()
    ids = np.asarray(tokens, dtype="<i8")
    if ids.ndim == 2 and len(ids) == 1:
        ids = ids[0]
    if ids.ndim != 1:
        raise ValueError(f"tokens: expected one text, [t] or [1, t], got shape {list(ids.shape)}")
    return ids


def compact_copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU, in one allocation per dtype.

    Views would keep the tensors they are slices of alive, and many small allocations fragment the heap: the memory of a
    server process grew 1.4 times as much as the states in it.
    """
    copies: dict[str, Tensor] = dict.fromkeys(tensors, torch.empty(0))  # keeps the order
    for dtype in {x.dtype for x in tensors.values()}:
        alike = {name: x.detach() for name, x in tensors.items() if x.dtype == dtype}
        whole = torch.cat([x.flatten() for x in alike.values()]).cpu()
        parts = whole.split([x.numel() for x in alike.values()])
        copies |= {name: part.view(x.shape) for (name, x), part in zip(alike.items(), parts, strict=True)}
    return copies
