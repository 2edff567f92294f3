"""How well a text is predicted at each distance from its beginning, far beyond what a model was trained on."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from hqlt.evaluate.likelihood import scores
from hqlt.model import HQLTCache, HQLTForCausalLM

PIECE = 1024


class Bin(NamedTuple):
    begin: int
    end: int
    """Positions begin … end−1 of the text."""
    carried: float
    """Bits per token where everything before is remembered."""
    emptied: float
    """Bits per token of the same tokens where the memories are emptied from time to time."""


def bits_by_position(
    model: HQLTForCausalLM, tokens: Sequence[int], every: int = 2048, told: Callable[[int], None] | None = None
) -> list[Bin]:
    """Read a text once from its beginning, in pieces; bins grow with the position.

    Two rows read side by side: one remembers everything, the other's memories are emptied every `every` tokens, so
    that where the text is hard can be told from where memory is of use. What is held beside the text does not grow
    with it, but for full attention.

    told: called with the number of tokens read, after each piece. Raises ValueError for a text of fewer than two.
    """
    if len(tokens) < 2:
        raise ValueError(f"expected a text of at least two tokens, to predict one from the other, got {len(tokens)}")
    edges = bin_edges(len(tokens) - 1)
    sums = torch.zeros(2, len(edges) - 1, dtype=torch.float64, device=model.device)
    cache = HQLTCache()
    inner = torch.tensor(edges[1:-1])
    for begin in range(0, len(tokens) - 1, PIECE):
        given = torch.tensor(tokens[begin : begin + PIECE + 1], device=model.device)
        t = len(given) - 1
        position = torch.arange(begin, begin + t)
        resets = torch.zeros(2, t, dtype=torch.bool)
        resets[1] = position % every == 0
        with torch.no_grad():
            hidden = model.model(
                given[:-1].expand(2, -1), resets=resets.to(model.device), past_key_values=cache
            ).last_hidden_state
            log_p, _ = scores(model, hidden.flatten(0, 1), given[1:].repeat(2))
        where = torch.bucketize(position, inner, right=True).to(model.device)
        sums.index_add_(1, where, -log_p.view(2, t).double() / math.log(2))
        if told is not None:
            told(t)
    return [
        Bin(first, last, *(sums[:, i] / (last - first)).tolist())
        for i, (first, last) in enumerate(itertools.pairwise(edges))
    ]


def bin_edges(positions: int) -> list[int]:
    """0, then powers of two from 32 on and what lies halfway between them, up to the number of positions."""
    inner = (round(2 ** (i / 2)) for i in range(10, 128))
    return [0, *itertools.takewhile(lambda edge: edge < positions, inner), positions]
