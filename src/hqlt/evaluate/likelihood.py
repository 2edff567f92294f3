"""log p(continuation | context) for a batch of any lengths, read in pieces, the same for every batch size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hqlt.model import HQLTCache, HQLTForCausalLM
from hqlt.shapes import Hidden, at_least_float32

PIECE = 512
"""Columns that are read at once."""
LOGITS = 2048
"""Tokens whose logits exist at once."""
UNSCORED = -1


class Likelihood(NamedTuple):
    log_probability: float
    """Of the whole continuation, in nats."""
    greedy: bool
    """Whether each of its tokens is the likeliest at its place."""


@torch.no_grad()
def likelihoods(model: HQLTForCausalLM, rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Likelihood]:
    """rows: (context, continuation) as tokens, no context empty.

    Rows are padded on the left, which for our memories is no padding at all, and read piece by piece with the memories
    carried: however long a text is, each token is predicted from all before it.
    """
    if not all(context for context, _ in rows):
        raise ValueError("context: expected at least one token, which the continuation's first is predicted from")
    t = max(len(context) + len(continuation) for context, continuation in rows) - 1
    inputs = torch.zeros(len(rows), t, dtype=torch.long)
    targets = torch.full_like(inputs, UNSCORED)
    mask = torch.zeros_like(inputs)
    for i, (context, continuation) in enumerate(rows):
        whole = [*context, *continuation]
        inputs[i, t - len(whole) + 1 :] = torch.tensor(whole[:-1])
        mask[i, t - len(whole) + 1 :] = 1
        targets[i, t - len(continuation) :] = torch.tensor(continuation)
    inputs, targets, mask = (x.to(model.device) for x in (inputs, targets, mask))
    padded = not bool(mask.all())
    total = torch.zeros(len(rows), dtype=torch.float64, device=model.device)
    greedy = torch.ones(len(rows), dtype=torch.bool, device=model.device)
    cache = HQLTCache()
    for begin in range(0, t, PIECE):
        piece = slice(begin, begin + PIECE)
        hidden = model.model(
            inputs[:, piece], attention_mask=mask[:, : begin + PIECE] if padded else None, past_key_values=cache
        ).last_hidden_state
        row, column = (targets[:, piece] != UNSCORED).nonzero(as_tuple=True)
        log_p, best = scores(model, hidden[row, column], targets[:, piece][row, column])
        total.index_add_(0, row, log_p.double())
        greedy[row[~best]] = False
    return [Likelihood(*pair) for pair in zip(total.tolist(), greedy.tolist(), strict=True)]


def scores(model: HQLTForCausalLM, hidden: Hidden, targets: Tensor) -> tuple[Tensor, Tensor]:
    """hidden: [n, d], targets: [n] → log p of each target [n], and whether it is the likeliest token [n]."""
    log_p, best = [], []
    for some, asked in zip(hidden.split(LOGITS), targets.split(LOGITS), strict=True):
        logits = model.lm_head(some)
        logits = logits.to(at_least_float32(logits.dtype))
        log_p.append(logits.log_softmax(dim=-1).gather(1, asked[:, None])[:, 0])
        best.append(logits.argmax(dim=-1) == asked)
    return torch.cat(log_p), torch.cat(best)
