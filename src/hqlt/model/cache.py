"""The cache of a model: the states of its memories between calls, as a transformers cache."""

from __future__ import annotations

import copy
import sys
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from transformers import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast

from hqlt import registry
from hqlt.memory import MemoryState
from hqlt.model.rollback import ASSISTED, Columns, History, Snapshot

if TYPE_CHECKING:
    from hqlt.model.language_model import HQLTModel

CACHE = "cache" if "cache" in {field.name for field in fields(BaseModelOutputWithPast)} else "past_key_values"
"""Name of the cache argument and output field in the installed transformers: `cache` from 5.24 on, else
`past_key_values`."""

MASK_MISMATCH = (
    "attention_mask: expected its first columns to match what the cache has read, got a different mask; start it with "
    "the cache's own mask: torch.cat([cache.attention_mask, new_columns], dim=1), or with ones if "
    "cache.attention_mask is None."
)


class HQLTCache(Cache):
    """The memory states of a model, one `MemoryState` per layer, and the attention mask of the tokens read so far.

    A forward pass replaces the states; the states themselves are immutable. `fork()` is therefore free, and a fork can
    be used to return to an earlier point. `crop` removes the last tokens without a fork, at a cost and with memory
    that do not depend on the length of the context (`hqlt.model.rollback.History`).

    The caches of transformers cannot be used here: they drop a recurrent state that has no convolution, and they
    reorder only the tensors they know.

    Args:
        rollback (tokens): maximum number of tokens that `crop` can remove, counted from the furthest token that was
            read.

    Raises:
        ValueError: when rollback is negative.

    Example:
        >>> import torch
        >>> from hqlt.model import HQLTCache, HQLTForCausalLM, preset
        >>> model, tokens = HQLTForCausalLM(preset("tiny")).eval(), torch.arange(12)[None]
        >>> cache = model(tokens, past_key_values=HQLTCache(rollback=8)).past_key_values
        >>> cache.crop(-5)  # as if the last five tokens had not been read
        >>> cache.seen_tokens
        7
    """

    def __init__(self, rollback: int = 0) -> None:
        super().__init__(layers=[])
        if rollback < 0:
            raise ValueError(f"rollback: expected a number of tokens, at least 0, got {rollback}")
        self.states: tuple[MemoryState, ...] = ()
        """One state per layer; empty before the first call."""
        self._seen: int | Tensor = 0
        self._mask: Tensor | None = None
        self._past_is_unknown = False
        self._history: History | None = None
        self._reader: weakref.ref[HQLTModel] | None = None
        self._start_history(rollback)

    def _start_history(self, rollback: int) -> None:
        """Record history from here on, so that up to `rollback` tokens can be removed."""
        self._history = History(rollback, (Snapshot(self.seen_tokens, self.states),)) if rollback else None

    @property
    def rollback(self) -> int:
        """Maximum number of tokens that `crop` can remove."""
        return self._history.rollback if self._history is not None else 0

    @property
    def seen_tokens(self) -> int:
        """Number of columns read so far, padding included: the length of an attention mask over the past."""
        if self._mask is not None:
            return self._mask.shape[1]
        return int(self._seen) if isinstance(self._seen, Tensor) else self._seen

    @property
    def attention_mask(self) -> Tensor | None:
        """Bool[b, seen_tokens], True for tokens and False for padding; None if there was no padding.

        The mask of the next call starts with it: torch.cat([cache.attention_mask, new], dim=1).
        """
        return self._mask

    @classmethod
    def from_states(
        cls,
        states: Sequence[MemoryState],
        seen_tokens: int | None = None,
        attention_mask: Tensor | None = None,
        rollback: int = 0,
    ) -> HQLTCache:
        """Build a cache from states: loaded ones, or those of selected or concatenated rows.

        Args:
            states: one state per layer.
            seen_tokens (tokens): length of the attention mask over the past. Default: the number of tokens since the
                last reset, of the longest row.
            attention_mask (bool, [b, seen_tokens]): which columns of the past were tokens. If None, this is unknown,
                and the first attention mask passed to the model is trusted.
            rollback (tokens): maximum number of the following tokens that `crop` can remove.

        Returns:
            A cache from which the model continues.

        Raises:
            TypeError: when a state is not a `MemoryState`.
            ValueError: when the shape of attention_mask does not match.
        """
        for state in states:
            if not isinstance(state, MemoryState):
                raise TypeError(f"states: expected one MemoryState per layer, got a {type(state).__name__}")
        cache = cls()
        cache.states = tuple(states)
        cache._past_is_unknown = attention_mask is None
        if attention_mask is not None:
            b, seen = cache.batch_size, attention_mask.shape[-1] if seen_tokens is None else seen_tokens
            if tuple(attention_mask.shape) != (b, seen):
                raise ValueError(
                    f"attention_mask: expected [b, seen_tokens] = [{b}, {seen}], got {list(attention_mask.shape)}"
                )
            cache._mask, seen_tokens = attention_mask.bool(), seen
        if seen_tokens is None:
            seen_tokens = int(states[0].position.max()) if states and cache.batch_size else 0
        cache._seen = seen_tokens
        cache._start_history(rollback)
        return cache

    def check_past(self, mask: Tensor) -> None:
        """Check that an attention mask agrees with what the cache has read.

        Args:
            mask ([b, at least seen_tokens]): an attention mask over past and new columns.

        Raises:
            ValueError: when it marks a token that was read as padding, or the other way round.
        """
        past = mask[:, : self.seen_tokens].bool()
        if self._past_is_unknown:
            self._mask = None if not torch.compiler.is_compiling() and past.all() else past
            self._past_is_unknown = False
            return
        same = past.all() if self._mask is None else (past == self._mask).all()
        if torch.compiler.is_compiling():
            torch._assert_async(same, MASK_MISMATCH)
        elif not same:
            other = ~past if self._mask is None else past != self._mask
            row, column = other.nonzero()[0].tolist()
            read = "a token" if self._mask is None or self._mask[row, column] else "padding"
            raise ValueError(f"{MASK_MISMATCH} Column {column} of row {row} was read as {read}.")

    def advance(
        self,
        states: Sequence[MemoryState],
        tokens: int,
        new: Tensor | None = None,
        columns: Columns | None = None,
        reader: HQLTModel | None = None,
    ) -> None:
        """Store the states after more columns were read.

        Args:
            states: the new states, one per layer.
            tokens: number of columns that were read.
            new (bool, [b, tokens]): True for tokens, False for padding. If None, all are tokens.
            columns: the inputs that were read. Required with rollback.
            reader: the model, which reads them again after a rollback. Required with rollback.
        """
        if new is not None and self._mask is None and (torch.compiler.is_compiling() or not new.all()):
            self._mask = new.new_ones(new.shape[0], self.seen_tokens)
        if self._mask is not None:
            new = self._mask.new_ones(self._mask.shape[0], tokens) if new is None else new
            self._mask = torch.cat([self._mask, new], dim=1)
        self.states = tuple(states)
        self._seen = self._seen + tokens
        if self._history is not None:
            assert columns is not None and reader is not None, "a cache with rollback needs columns and reader"
            self._history, self._reader = self._history.appended(self.states, columns), weakref.ref(reader)

    def fork(self) -> HQLTCache:
        """Return an independent cache with the same states. No tensors are copied."""
        return copy.copy(self)

    def detach(self) -> HQLTCache:
        """Detach the states from the autograd graph, in place, for truncated backpropagation through time.

        Returns:
            The cache itself.
        """
        self._map(MemoryState.detach, Tensor.detach)
        return self

    def _map(self, states: Callable[[MemoryState], MemoryState], rows: Callable[[Tensor], Tensor]) -> None:
        """Apply the same row operation to all states and to all tensors [b, …]."""
        self.states = tuple(map(states, self.states))
        if self._mask is not None:
            self._mask = rows(self._mask)
        if self._history is not None:
            self._history = self._history.map(states, rows)

    # The interface of transformers.Cache.

    def __len__(self) -> int:
        return len(self.states)

    def __repr__(self) -> str:
        return f"HQLTCache(layers={len(self)}, batch_size={self.batch_size}, seen_tokens={self.seen_tokens})"

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of columns read so far, padding included."""
        return self.seen_tokens

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Return -1: there is no maximum length."""
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Length and offset of a mask over past and new tokens."""
        return self.seen_tokens + query_length, 0

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        """Whether anything has been read."""
        return bool(self.states)

    @property
    def batch_size(self) -> int:
        """Number of rows, or -1 before the first call."""
        return len(self.states[0].position) if self.states else -1

    @property
    def is_compileable(self) -> bool:
        """False: `generate` must neither compile nor build static masks."""
        return False

    @property
    def is_initialized(self) -> bool:
        """Whether anything has been read."""
        return bool(self.states)

    @property
    def is_croppable(self) -> bool:
        """Whether `crop` can remove the last tokens."""
        return self.rollback > 0

    def activate_past_recording(self) -> None:
        """Enable `crop`. transformers calls this before assisted generation and prompt lookup."""
        if self._history is None:
            self._start_history(ASSISTED)
        elif self.rollback < ASSISTED:
            self._history = replace(self._history, rollback=ASSISTED)

    @property
    def is_linear(self) -> list[bool]:
        """False for every layer: all track a sequence length, so `generate` passes only the unread columns."""
        return [False] * max(len(self), 1)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replace row i by row beam_idx[i], in every part of every state."""
        self._map(lambda state: state.select(beam_idx), lambda x: x.index_select(0, beam_idx.to(x.device).long()))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows, given as indices or as a boolean mask over the batch."""
        self.reorder_cache(indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times, as `torch.repeat_interleave` does."""
        self._map(lambda state: state.repeat(repeats), lambda x: x.repeat_interleave(repeats, dim=0))

    def reset(self) -> None:
        """Clear all memories."""
        self.states = ()
        self._seen, self._mask, self._past_is_unknown = 0, None, False
        self._start_history(self.rollback)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last -tokens_to_remove columns, as if they had not been read.

        The cache returns to an earlier snapshot, and the model that filled it reads what followed again, without
        gradients.

        Args:
            tokens_to_remove (tokens, negative): at most `rollback` of the columns read since rollback was enabled, or
                all columns.

        Raises:
            ValueError: for any other number, because a matrix cannot be restored to an arbitrary earlier time.
        """
        columns, seen = -tokens_to_remove, self.seen_tokens
        most = self._history.available() if self._history is not None else 0
        if columns >= seen:
            self.reset()
        elif not 0 <= columns <= most:
            few = f"0 to -{most}" if most else "0"
            raise ValueError(
                f"crop: expected {few}, or -{seen} (everything), got {tokens_to_remove}: rollback is {self.rollback}, "
                f"and a matrix cannot be restored to an arbitrary earlier time. Create the cache with "
                f"HQLTCache(rollback=n) to remove up to n tokens, or keep a `cache.fork()` from before them."
            )
        elif columns:
            self._roll_back(columns)

    def _roll_back(self, columns: int) -> None:
        assert self._history is not None
        mask = None if self._mask is None else self._mask[:, : self.seen_tokens - columns]
        past, unread = self._history.rolled_back(columns)
        self.states, self._seen, self._history = past.snapshots[-1].states, past.seen, past
        self._mask = None if mask is None else mask[:, : past.seen]
        if unread is not None:
            reader = None if self._reader is None else self._reader()
            if reader is None:
                raise ValueError("crop: expected the model that read these tokens to still exist, but it was deleted")
            with torch.no_grad():
                reader(
                    inputs_embeds=unread.x, resets=unread.resets, attention_mask=mask, use_cache=True, **{CACHE: self}
                )

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Raise TypeError: an HQLTCache is updated by its model, not by attention layers."""
        raise TypeError(
            "HQLTCache holds hqlt.MemoryState values and works with hqlt's models only; "
            "give an attention layer of transformers a cache of transformers, such as DynamicCache"
        )


def cache_argument(past_key_values: object, cache: object) -> HQLTCache | None:
    """The cache that was passed under either of its two names."""
    if past_key_values is not None and cache is not None and past_key_values is not cache:
        raise ValueError(
            "past_key_values, cache: expected one of them, because they are two names of one argument, got both"
        )
    given = past_key_values if cache is None else cache
    if given is not None and not isinstance(given, HQLTCache):
        raise TypeError(
            f"past_key_values: expected an HQLTCache (one that this model returned, hqlt.model.HQLTCache(), or "
            f"HQLTCache.from_states(states)), got {type(given).__name__}, which cannot hold both memories"
        )
    return given


def register_cache_for_export() -> None:
    """Register `HQLTCache` as a pytree, so that torch.export accepts it as input and output.

    This is not done on import, because FSDP and other users of pytrees rebuild registered containers on their way into
    a model. A cache passed to such a model would not be updated in place; only the returned one would be. Call it again
    after registering a rule or retention outside this package.

    Example:
        >>> from torch.utils import _pytree
        >>> from hqlt.model import HQLTCache, register_cache_for_export
        >>> register_cache_for_export()
        >>> HQLTCache in _pytree.SUPPORTED_NODES
        True
    """
    torch.serialization.add_safe_globals([HQLTCache, *named_tuples()])  # to load an exported program's example inputs
    for cls in named_tuples() - pytree.SUPPORTED_NODES.keys():
        package = cls.__module__.partition(".")[0]
        pytree._register_namedtuple(cls, serialized_type_name=f"{package}.{cls.__name__}")
    if HQLTCache not in pytree.SUPPORTED_NODES:
        pytree.register_pytree_node(
            HQLTCache,
            _flatten,
            _unflatten,
            serialized_type_name="hqlt.model.HQLTCache",
            flatten_with_keys_fn=lambda cache: ([*zip(PARTS, _flatten(cache)[0], strict=True)], cache._past_is_unknown),
        )


def named_tuples() -> set[Any]:
    """All NamedTuples that a state can consist of: those in the modules of registered rules and retentions."""
    classes = [registry.find(kind, name) for kind in ("rule", "retention") for name in registry.names(kind)]
    modules = {base.__module__ for cls in [MemoryState, *classes] for base in cls.__mro__}
    known = [value for module in modules for value in vars(sys.modules[module]).values() if isinstance(value, type)]
    return {cls for cls in known if issubclass(cls, tuple) and hasattr(cls, "_fields")}


PARTS: tuple[Any, ...] = tuple(map(pytree.MappingKey, ("states", "seen_tokens", "attention_mask")))


def _flatten(cache: HQLTCache) -> tuple[list[Any], bool]:
    if cache.rollback:
        raise ValueError(f"torch.export: expected a cache without rollback, got rollback={cache.rollback}")
    seen = cache._seen if isinstance(cache._seen, Tensor) else torch.tensor(cache._seen)
    return [list(cache.states), seen, cache._mask], cache._past_is_unknown


def _unflatten(parts: Iterable[Any], past_is_unknown: bool) -> HQLTCache:
    cache = HQLTCache()
    states, cache._seen, cache._mask = parts
    cache.states, cache._past_is_unknown = tuple(states), past_is_unknown
    return cache
