"""The rows that are decoded together, and the prompts that are yet to join them."""

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
        self.made: list[int] = []
        self.is_sound = True
        """Whether its state has read `tokens()`: not where its last token failed."""
        seed = request.seed
        self.draw = random.Random(None if seed is None else f"{seed} {choice}").random

    def sampling(self) -> Sampling:
        asked = self.request
        return Sampling(asked.temperature, asked.top_p, self.draw() if asked.temperature > 0 else 0.0)

    def tokens(self) -> Tensor:
        """What its state has read: everything but the last token."""
        return torch.cat([torch.from_numpy(self.request.prompt), torch.tensor(self.made, dtype=torch.long)])[:-1]


class Batch(NamedTuple):
    """The rows that are decoded together."""

    rows: list[Row]
    unread: list[int]
    """Each row's last token."""
    states: tuple[MemoryState, ...]
    """One a layer, of as many rows."""

    def select(self, index: Sequence[int]) -> Batch:
        """These rows."""
        if not index:
            return NO_ROWS
        states = tuple(state.select(list(index)) for state in self.states)
        return Batch([self.rows[i] for i in index], [self.unread[i] for i in index], states)


NO_ROWS = Batch([], [], ())


def joined(batches: Sequence[Batch]) -> Batch:
    """The rows of all."""
    batches = [batch for batch in batches if batch.rows]
    if len(batches) < 2:
        return batches[0] if batches else NO_ROWS
    rows, unread = (list(itertools.chain(*of)) for of in list(zip(*batches, strict=True))[:2])
    states = tuple(map(MemoryState.concatenate, zip(*(batch.states for batch in batches), strict=True)))
    return Batch(rows, unread, states)


class Reading:
    """A prompt that is being read, up to its last token."""

    def __init__(self, request: Request, length: int, states: tuple[MemoryState, ...]) -> None:
        self.request, self.length, self.states = request, length, states
        self.end = len(request.prompt) - 1

    def next_stop(self, budget: int) -> int:
        """Where the next chunk ends: at a mark, if one comes first."""
        stop = min(self.length + budget, self.end)
        return min([stop, *(mark for mark in self.request.marks if self.length < mark < stop)])
