"""Bits per token by position in a text, far beyond the length that a model was trained on."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from hqlt.evaluate.likelihood import score_tokens
from hqlt.model import HQLTCache, HQLTForCausalLM

CHUNK = 1024
"""Tokens per forward pass."""


class Bin(NamedTuple):
    """Mean bits per token over positions begin … end − 1 of a text."""

    begin: int
    end: int
    carried: float
    """Bits per token with memories carried from the beginning of the text."""
    emptied: float
    """Bits per token of the same tokens with memories that are emptied at regular intervals."""


def bits_by_position(
    model: HQLTForCausalLM,
    tokens: Sequence[int],
    reset_every: int = 2048,
    on_progress: Callable[[int], None] | None = None,
) -> list[Bin]:
    """Read a text once, in chunks, and average bits per token over bins that grow with the position.

    The text is read in two rows at the same time: one carries its memories all the way, the other empties them every
    `reset_every` tokens. The difference shows where memory helps, independent of how hard the text is. Memory use does
    not grow with the text, except for full attention.

    Args:
        model: the model, in evaluation mode.
        tokens: the text.
        reset_every: tokens between two resets of the second row.
        on_progress: called after each chunk with its number of tokens.

    Returns:
        The bins, in order.

    Raises:
        ValueError: if the text has fewer than two tokens.
    """
    if len(tokens) < 2:
        raise ValueError(f"tokens: expected at least two tokens, to predict one from the other, got {len(tokens)}")
    edges = bin_edges(len(tokens) - 1)
    sums = torch.zeros(2, len(edges) - 1, dtype=torch.float64, device=model.device)
    cache = HQLTCache()
    inner = torch.tensor(edges[1:-1])
    for begin in range(0, len(tokens) - 1, CHUNK):
        chunk = torch.tensor(tokens[begin : begin + CHUNK + 1], device=model.device)
        t = len(chunk) - 1
        position = torch.arange(begin, begin + t)
        resets = torch.zeros(2, t, dtype=torch.bool)
        resets[1] = position % reset_every == 0
        with torch.no_grad():
            hidden = model.model(
                chunk[:-1].expand(2, -1), resets=resets.to(model.device), past_key_values=cache
            ).last_hidden_state
            log_p, _ = score_tokens(model, hidden.flatten(0, 1), chunk[1:].repeat(2))
        where = torch.bucketize(position, inner, right=True).to(model.device)
        sums.index_add_(1, where, -log_p.view(2, t).double() / math.log(2))
        if on_progress is not None:
            on_progress(t)
    return [
        Bin(first, last, *(sums[:, i] / (last - first)).tolist())
        for i, (first, last) in enumerate(itertools.pairwise(edges))
    ]


def bin_edges(positions: int) -> list[int]:
    """Return bin edges: 0, then powers of √2 from 32 on, then the number of positions."""
    inner = (round(2 ** (i / 2)) for i in range(10, 128))
    return [0, *itertools.takewhile(lambda edge: edge < positions, inner), positions]
