"""A model's memories between two calls, in the shape in which transformers hands caches around."""

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
"""What the installed transformers calls a cache, in arguments and outputs: past_key_values, and cache from 5.24 on."""

OTHER_PAST = (
    "attention_mask: expected it to say of the columns that the cache has read what they were read as, got something "
    "else; begin it with what the cache knows: torch.cat([cache.attention_mask, new_columns], dim=1), or ones where "
    "cache.attention_mask is None."
)


class HQLTCache(Cache):
    """One `MemoryState` for each layer, how many columns the model has seen, and which of them were padding.

    A call of the model puts new states in place of the old; the states themselves are values that never change. So
    `fork()` costs nothing, and a fork kept from before is a return to where it was made:

    >>> out = model(prompt, use_cache=True)
    >>> before = out.past_key_values.fork()
    >>> model(answer, past_key_values=out.past_key_values)   # `before` still ends at the prompt

    rollback: how many of the last tokens `crop` can take back, counted from the furthest that was read, at a cost and
    memory that do not depend on the context (`hqlt.model.rollback.History`):

    >>> cache = HQLTCache(rollback=16)
    >>> model(tokens, past_key_values=cache)
    >>> cache.crop(-5)                                       # as if the last five had not been read

    transformers' own caches cannot serve: they forget a recurrent state that has no convolution beside it, and reorder
    only the parts that they know.
    """

    def __init__(self, rollback: int = 0) -> None:
        super().__init__(layers=[])
        if rollback < 0:
            raise ValueError(f"rollback: expected a number of tokens, at least 0, got {rollback}")
        self.states: tuple[MemoryState, ...] = ()
        """One state a layer; none before the first call."""
        self._seen: int | Tensor = 0
        self._mask: Tensor | None = None
        self._any_past = False
        self._history: History | None = None
        self._reader: weakref.ref[HQLTModel] | None = None
        self._remember(rollback)

    def _remember(self, rollback: int) -> None:
        """From now on, be able to take back this many tokens."""
        self._history = History(rollback, (Snapshot(self.seen_tokens, self.states),)) if rollback else None

    @property
    def rollback(self) -> int:
        """How many of the last tokens `crop` can take back."""
        return self._history.rollback if self._history is not None else 0

    @property
    def seen_tokens(self) -> int:
        """Columns that the model has been given so far: the length of an attention mask over the past."""
        if self._mask is not None:
            return self._mask.shape[1]
        return int(self._seen) if isinstance(self._seen, Tensor) else self._seen

    @property
    def attention_mask(self) -> Tensor | None:
        """Bool[b, seen_tokens], True for the columns that were read as tokens; None where there was no padding.

        A mask for the next call begins with it: torch.cat([cache.attention_mask, new], dim=1).
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
        """A cache that resumes from these states, one a layer: loaded ones, or those of selected or joined rows.

        seen_tokens: the length of the attention mask over the past, where masks are used; None: the longest row's
        tokens since its last reset. attention_mask: [b, seen_tokens], what the columns of the past were; None: that is
        not known, and the first attention mask that the model is given is believed. rollback: how many of the tokens
        that follow `crop` can take back.
        """
        for state in states:
            if not isinstance(state, MemoryState):
                raise TypeError(f"states: expected one MemoryState for each layer, got a {type(state).__name__}")
        cache = cls()
        cache.states = tuple(states)
        cache._any_past = attention_mask is None
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
        cache._remember(rollback)
        return cache

    def check_past(self, mask: Tensor) -> None:
        """Refuse an attention mask, [b, at least seen_tokens], that says of the past something else than what was read.

        Raises ValueError.
        """
        past = mask[:, : self.seen_tokens].bool()
        if self._any_past:
            self._mask = None if not torch.compiler.is_compiling() and past.all() else past
            self._any_past = False
            return
        same = past.all() if self._mask is None else (past == self._mask).all()
        if torch.compiler.is_compiling():
            torch._assert_async(same, OTHER_PAST)
        elif not same:
            other = ~past if self._mask is None else past != self._mask
            row, column = other.nonzero()[0].tolist()
            read = "a token" if self._mask is None or self._mask[row, column] else "padding"
            raise ValueError(f"{OTHER_PAST} Column {column} of row {row} was read as {read}.")

    def advance(
        self,
        states: Sequence[MemoryState],
        tokens: int,
        new: Tensor | None = None,
        columns: Columns | None = None,
        reader: HQLTModel | None = None,
    ) -> None:
        """Put in the states after `tokens` more columns, which were tokens where new, Bool[b, tokens], is True.

        columns, reader: what was read, and who can read it again, where tokens may be taken back.
        """
        if new is not None and self._mask is None and (torch.compiler.is_compiling() or not new.all()):
            self._mask = new.new_ones(new.shape[0], self.seen_tokens)
        if self._mask is not None:
            new = self._mask.new_ones(self._mask.shape[0], tokens) if new is None else new
            self._mask = torch.cat([self._mask, new], dim=1)
        self.states = tuple(states)
        self._seen = self._seen + tokens
        if self._history is not None:
            assert columns is not None and reader is not None, "whoever advances a cache with a history gives both"
            self._history, self._reader = self._history.after(self.states, columns), weakref.ref(reader)

    def fork(self) -> HQLTCache:
        """Another cache with the same memories. What is done to one does not show in the other."""
        return copy.copy(self)

    def detach(self) -> HQLTCache:
        """Forget how the states came about, in place: truncated back-propagation through time."""
        self._change(MemoryState.detach, Tensor.detach)
        return self

    def _change(self, states: Callable[[MemoryState], MemoryState], rows: Callable[[Tensor], Tensor]) -> None:
        """The same change to the rows of all that is held: states, and tensors [b, …]."""
        self.states = tuple(map(states, self.states))
        if self._mask is not None:
            self._mask = rows(self._mask)
        if self._history is not None:
            self._history = self._history.map(states, rows)

    # What transformers asks of a cache.

    def __len__(self) -> int:
        return len(self.states)

    def __repr__(self) -> str:
        return f"HQLTCache(layers={len(self)}, batch_size={self.batch_size}, seen_tokens={self.seen_tokens})"

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns seen so far, padding included."""
        return self.seen_tokens

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """No maximum, which transformers writes as -1."""
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Length and offset of a mask over past and new tokens."""
        return self.seen_tokens + query_length, 0

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        return bool(self.states)

    @property
    def batch_size(self) -> int:
        """Rows, or -1 before the first call."""
        return len(self.states[0].position) if self.states else -1

    @property
    def is_compileable(self) -> bool:
        """Whether `generate` should compile and build static masks: no, there is no mask."""
        return False

    @property
    def is_initialized(self) -> bool:
        return bool(self.states)

    @property
    def is_croppable(self) -> bool:
        """Whether the latest tokens can be taken back."""
        return self.rollback > 0

    def activate_past_recording(self) -> None:
        """What transformers calls where it is about to take tokens back: assisted generation, prompt lookup."""
        if self._history is None:
            self._remember(ASSISTED)
        elif self.rollback < ASSISTED:
            self._history = replace(self._history, rollback=ASSISTED)

    @property
    def is_linear(self) -> list[bool]:
        """No layer is one that has no sequence length: `generate` passes on the columns that are not read yet."""
        return [False] * max(len(self), 1)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row beam_idx[i] was, in every part of every state."""
        self._change(lambda state: state.select(beam_idx), lambda x: x.index_select(0, beam_idx.to(x.device).long()))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows: indices, or a boolean mask over the batch."""
        self.reorder_cache(indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times, copies side by side."""
        self._change(lambda state: state.repeat(repeats), lambda x: x.repeat_interleave(repeats, dim=0))

    def reset(self) -> None:
        """Empty memories."""
        self.states = ()
        self._seen, self._mask, self._any_past = 0, None, False
        self._remember(self.rollback)

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last -tokens_to_remove columns: as if they had not been read.

        Possible for as many as `rollback`, of those read since it was asked for, and for all of them. The cache returns
        to an earlier state and what followed it is read again, without gradients, by the model that read it.

        Raises ValueError for others: a matrix does not tell what it held some tokens ago.
        """
        columns, seen = -tokens_to_remove, self.seen_tokens
        most = self._history.most() if self._history is not None else 0
        if columns >= seen:
            self.reset()
        elif not 0 <= columns <= most:
            few = f"0 to -{most}" if most else "0"
            raise ValueError(
                f"crop: expected {few}, or -{seen} (everything), got {tokens_to_remove}: rollback is {self.rollback}, "
                f"and a matrix does not tell what it held earlier. Make the cache with HQLTCache(rollback=n) to take "
                f"back up to n tokens, or keep `cache.fork()` from before them."
            )
        elif columns:
            self._go_back(columns)

    def _go_back(self, columns: int) -> None:
        assert self._history is not None
        mask = None if self._mask is None else self._mask[:, : self.seen_tokens - columns]
        past, again = self._history.back(columns)
        self.states, self._seen, self._history = past.snapshots[-1].states, past.seen, past
        self._mask = None if mask is None else mask[:, : past.seen]
        if again is not None:
            reader = None if self._reader is None else self._reader()
            if reader is None:
                raise ValueError("crop: expected the model that read these tokens to be there still, but it is gone")
            with torch.no_grad():
                reader(inputs_embeds=again.x, resets=again.resets, attention_mask=mask, use_cache=True, **{CACHE: self})

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(
            "HQLTCache holds hqlt.MemoryState values and serves hqlt's models only; "
            "give an attention layer of transformers a cache of transformers, such as DynamicCache"
        )


def one_cache(past_key_values: object, cache: object) -> HQLTCache | None:
    """The cache that a caller gave, under whichever of its two names."""
    if past_key_values is not None and cache is not None and past_key_values is not cache:
        raise ValueError("past_key_values, cache: expected one of them, because both name the same thing, got both")
    given = past_key_values if cache is None else cache
    if given is not None and not isinstance(given, HQLTCache):
        raise TypeError(
            f"past_key_values: expected an HQLTCache (one that this model returned, hqlt.model.HQLTCache(), or "
            f"HQLTCache.from_states(states)), got {type(given).__name__}, which cannot hold both memories"
        )
    return given


def register_cache_for_export() -> None:
    """Let torch.export take an HQLTCache as input and output: from now on torch sees the tensors in it.

    A call of its own, because FSDP and other users of torch's pytrees build what is registered anew on its way
    into a model: a cache given to such a model would not be brought up to date, only the one that it returns.
    A rule or retention that is registered later, outside this package, asks for another call.
    """
    torch.serialization.add_safe_globals([HQLTCache, *named_tuples()])  # of the example that a program's file holds
    for cls in named_tuples() - pytree.SUPPORTED_NODES.keys():
        package = cls.__module__.partition(".")[0]
        pytree._register_namedtuple(cls, serialized_type_name=f"{package}.{cls.__name__}")
    if HQLTCache not in pytree.SUPPORTED_NODES:
        pytree.register_pytree_node(
            HQLTCache,
            _flatten,
            _unflatten,
            serialized_type_name="hqlt.model.HQLTCache",
            flatten_with_keys_fn=lambda cache: ([*zip(PARTS, _flatten(cache)[0], strict=True)], cache._any_past),
        )


def named_tuples() -> set[Any]:
    """What states can be made of: the NamedTuples that the modules of all registered rules and retentions know."""
    classes = [registry.find(kind, name) for kind in ("rule", "retention") for name in registry.names(kind)]
    modules = {base.__module__ for cls in [MemoryState, *classes] for base in cls.__mro__}
    known = [value for module in modules for value in vars(sys.modules[module]).values() if isinstance(value, type)]
    return {cls for cls in known if issubclass(cls, tuple) and hasattr(cls, "_fields")}


PARTS: tuple[Any, ...] = tuple(map(pytree.MappingKey, ("states", "seen_tokens", "attention_mask")))


def _flatten(cache: HQLTCache) -> tuple[list[Any], bool]:
    if cache.rollback:
        raise ValueError(f"torch.export: expected a cache without rollback, got rollback={cache.rollback}")
    seen = cache._seen if isinstance(cache._seen, Tensor) else torch.tensor(cache._seen)
    return [list(cache.states), seen, cache._mask], cache._any_past


def _unflatten(parts: Iterable[Any], any_past: bool) -> HQLTCache:
    cache = HQLTCache()
    states, cache._seen, cache._mask = parts
    cache.states, cache._any_past = tuple(states), any_past
    return cache
