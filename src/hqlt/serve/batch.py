"""The rows that are decoded together, and the prompts that will join them."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hqlt.memory import MemoryState
from hqlt.serve.request import Request
from hqlt.serve.sampling import Sampling


class Row:
    """One continuation of a request."""

    def __init__(self, request: Request, choice: int) -> None:
        self.request, self.choice = request, choice
        self.generated: list[int] = []
        self.state_is_valid = True
        """Whether its state has read `tokens_read()`; not if its last token failed."""
        seed = request.seed
        self.draw = random.Random(None if seed is None else f"{seed} {choice}").random

    def sampling(self) -> Sampling:
        request = self.request
        return Sampling(request.temperature, request.top_p, self.draw() if request.temperature > 0 else 0.0)

    def tokens_read(self) -> Tensor:
        """The tokens that its state has read: all except the last."""
        return torch.cat([torch.from_numpy(self.request.prompt), torch.tensor(self.generated, dtype=torch.long)])[:-1]


class Batch(NamedTuple):
    """The rows that are decoded together."""

    rows: list[Row]
    unread: list[int]
    """The last token of each row."""
    states: tuple[MemoryState, ...]
    """One per layer, with a row for each row of the batch."""

    def select(self, index: Sequence[int]) -> Batch:
        """The batch of these rows."""
        if not index:
            return EMPTY
        states = tuple(state.select(list(index)) for state in self.states)
        return Batch([self.rows[i] for i in index], [self.unread[i] for i in index], states)


EMPTY = Batch([], [], ())


def concatenate(batches: Sequence[Batch]) -> Batch:
    """One batch with the rows of all."""
    batches = [batch for batch in batches if batch.rows]
    if len(batches) < 2:
        return batches[0] if batches else EMPTY
    rows, unread = (list(itertools.chain(*of)) for of in list(zip(*batches, strict=True))[:2])
    states = tuple(map(MemoryState.concatenate, zip(*(batch.states for batch in batches), strict=True)))
    return Batch(rows, unread, states)


class Prefill:
    """A prompt that is being read, up to its last token.

    Args:
        request: the request.
        length: number of tokens read so far.
        states: the states after them.
    """

    def __init__(self, request: Request, length: int, states: tuple[MemoryState, ...]) -> None:
        self.request, self.length, self.states = request, length, states
        self.end = len(request.prompt) - 1

    def next_stop(self, budget: int) -> int:
        """Where the next chunk of at most `budget` tokens ends: at a checkpoint, if one comes first."""
        stop = min(self.length + budget, self.end)
        return min([stop, *(place for place in self.request.checkpoints if self.length < place < stop)])
