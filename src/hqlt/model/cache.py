"""A model's memories between two calls, in the shape in which transformers hands caches around."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from hqlt.memory import MemoryState


class HQLTCache(Cache):
    """One `MemoryState` for each layer, and how many tokens the model has seen, padding included.

    A call of the model puts new states in place of the old; the states themselves are values that never change. So
    `fork()` costs nothing, and a fork kept from before is a rollback:

    >>> out = model(prompt, use_cache=True)
    >>> before = out.past_key_values.fork()
    >>> model(answer, past_key_values=out.past_key_values)   # `before` still ends at the prompt

    transformers' own caches cannot serve: they forget a recurrent state that has no convolution beside it, and reorder
    only the parts that they know.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.states: tuple[MemoryState, ...] = ()
        """One state a layer; none before the first call."""
        self.seen_tokens = 0
        """Columns that the model has been given so far: the length of an attention mask over the past."""

    @classmethod
    def from_states(cls, states: Sequence[MemoryState], seen_tokens: int | None = None) -> HQLTCache:
        """A cache that goes on from these states, one a layer: loaded ones, or those of selected or joined rows.

        seen_tokens: the length of the attention mask over the past, where masks are used; None: the longest row's
        tokens since its last reset.
        """
        for state in states:
            if not isinstance(state, MemoryState):
                raise TypeError(f"states: expected one MemoryState for each layer, got a {type(state).__name__}")
        cache = cls()
        cache.states = tuple(states)
        if seen_tokens is None and states:
            seen_tokens = int(states[0].position.max())
        cache.seen_tokens = seen_tokens or 0
        return cache

    def advance(self, states: Sequence[MemoryState], tokens: int) -> None:
        """Put in the states after `tokens` more columns."""
        self.states = tuple(states)
        self.seen_tokens += tokens

    def fork(self) -> HQLTCache:
        """Another cache with the same memories. What is done to one does not show in the other."""
        return HQLTCache.from_states(self.states, self.seen_tokens)

    def detach(self) -> HQLTCache:
        """Forget how the states came about, in place: truncated back-propagation through time."""
        self.states = tuple(state.detach() for state in self.states)
        return self

    # What transformers asks of a cache.

    def __len__(self) -> int:
        return len(self.states)

    def __repr__(self) -> str:
        return f"HQLTCache(layers={len(self)}, batch_size={self.batch_size}, seen_tokens={self.seen_tokens})"

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen so far, padding included."""
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
        return False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row beam_idx[i] was, in every part of every state."""
        self.states = tuple(state.select(beam_idx) for state in self.states)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows: indices, or a boolean mask over the batch."""
        self.reorder_cache(indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times, copies side by side."""
        self.states = tuple(state.repeat(repeats) for state in self.states)

    def reset(self) -> None:
        """Empty memories."""
        self.states = ()
        self.seen_tokens = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last -tokens_to_remove tokens: possible for none and for all.

        Raises ValueError otherwise: a matrix does not tell what it held some tokens ago.
        """
        if -tokens_to_remove >= self.seen_tokens:
            self.reset()
        elif tokens_to_remove != 0:
            raise ValueError(
                f"crop: expected 0 or -{self.seen_tokens} (everything), got {tokens_to_remove}: fast weights cannot "
                f"take tokens back. Keep `cache.fork()` from before the tokens that you may want to take back."
            )

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(
            "HQLTCache holds hqlt.MemoryState values and serves hqlt's models only; "
            "give an attention layer of transformers a cache of transformers, such as DynamicCache"
        )
