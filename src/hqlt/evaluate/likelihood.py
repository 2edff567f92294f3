"""log p(continuation | context) for rows of any lengths, read in chunks; results do not depend on the batch size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hqlt.model import HQLTCache, HQLTForCausalLM
from hqlt.shapes import Hidden, at_least_float32

CHUNK = 512
"""Tokens per row and forward pass."""
LOGITS = 2048
"""Tokens whose logits are computed at once."""
UNSCORED = -1
"""Target of a token that is not scored."""


class Likelihood(NamedTuple):
    """How likely a continuation is."""

    log_probability: float
    """Log-probability of the whole continuation, in nats."""
    greedy: bool
    """Whether every token is the most likely one at its position."""


@torch.no_grad()
def likelihoods(model: HQLTForCausalLM, rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Likelihood]:
    """Compute the likelihood of each row's continuation given its context.

    Rows are padded on the left, which has no effect on the memories, and read in chunks with carried memories, so that
    each token is predicted from all tokens before it, however long the text is.

    Args:
        model: the model, in evaluation mode.
        rows: (context, continuation) as tokens; no context may be empty.

    Returns:
        One likelihood per row.

    Raises:
        ValueError: if a context is empty.
    """
    if not all(context for context, _ in rows):
        raise ValueError("context: expected at least one token to predict the continuation from, got none")
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
    for begin in range(0, t, CHUNK):
        chunk = slice(begin, begin + CHUNK)
        hidden = model.model(
            inputs[:, chunk], attention_mask=mask[:, : begin + CHUNK] if padded else None, past_key_values=cache
        ).last_hidden_state
        row, column = (targets[:, chunk] != UNSCORED).nonzero(as_tuple=True)
        log_p, best = score_tokens(model, hidden[row, column], targets[:, chunk][row, column])
        total.index_add_(0, row, log_p.double())
        greedy[row[~best]] = False
    return [Likelihood(*pair) for pair in zip(total.tolist(), greedy.tolist(), strict=True)]


def score_tokens(model: HQLTForCausalLM, hidden: Hidden, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the log-probability of each target, and whether it is the most likely token.

    Args:
        model: provides the head.
        hidden ([n, d]): the last layer's output.
        targets ([n]): tokens.

    Returns:
        log p ([n], in nats), and whether each target is the most likely token (bool [n]).
    """
    log_p, best = [], []
    for some, target in zip(hidden.split(LOGITS), targets.split(LOGITS), strict=True):
        logits = model.lm_head(some)
        logits = logits.to(at_least_float32(logits.dtype))
        log_p.append(logits.log_softmax(dim=-1).gather(1, target[:, None])[:, 0])
        best.append(logits.argmax(dim=-1) == target)
    return torch.cat(log_p), torch.cat(best)
