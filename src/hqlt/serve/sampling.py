"""The next token of many rows at once, each by its own temperature, top-p and random number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hqlt.shapes import at_least_float32

NEAR = 1024
"""How many of the likeliest tokens are sorted first; all only where these have not the probability top_p together."""


class Sampling(NamedTuple):
    """How a row's next token is drawn."""

    temperature: float
    """p ∝ exp(logits / temperature); 0: always the likeliest token."""
    top_p: float
    """Draw among the likeliest tokens that have this probability together."""
    draw: float
    """Uniform in [0, 1)."""


class Likely(NamedTuple):
    """Of a token that was chosen: log p(token), from the logits as they are."""

    logprob: float
    top: list[tuple[int, float]]
    """The likeliest tokens in its place, and their log p."""


def choose(logits: Tensor, samplings: Sequence[Sampling]) -> list[int | None]:
    """One token a row of logits [b, vocabulary]; None where the logits are not finite.

    A row's token depends on its own logits and sampling alone.
    """
    largest, best = logits.max(dim=-1)
    for whole in (True, False):
        rows = [i for i, how in enumerate(samplings) if how.temperature > 0 and (how.top_p >= 1) is whole]
        if rows:
            temperature, top_p, draw = logits.new_tensor(
                [samplings[i] for i in rows], dtype=torch.float64
            ).T[..., None]  # fmt: skip
            p = (logits[rows] - largest[rows, None]).to(at_least_float32(logits.dtype))
            p = torch.softmax(p / temperature.to(p.dtype), dim=-1)
            best[rows] = _inverse(p, draw) if whole else _nucleus(p, top_p, draw)
    finite = largest.isfinite()
    return [int(token) if there else None for token, there in zip(best.tolist(), finite.tolist(), strict=True)]


def _inverse(p: Tensor, draw: Tensor) -> Tensor:
    """The first index at which the running sum of p, [b, n], exceeds draw, [b, 1], of the whole: [b]."""
    total = p.cumsum(dim=-1, dtype=torch.float64)
    index: Tensor = torch.searchsorted(total, draw * total[:, -1:], right=True)[:, 0]
    return index.clamp(max=p.shape[1] - 1)


def _nucleus(p: Tensor, top_p: Tensor, draw: Tensor) -> Tensor:
    """Drawn among the likeliest tokens up to the first with which they have the probability top_p, [b, 1]: [b]."""
    vocabulary = p.shape[1]
    for n in (min(NEAR, vocabulary), vocabulary):
        top, order = p.topk(n)
        until = top.cumsum(dim=-1, dtype=torch.float64)
        if (until[:, -1:] >= top_p).all():
            break
    kept = top * (until - top < top_p)
    return order.gather(1, _inverse(kept, draw)[:, None])[:, 0]


def likely(logits: Tensor, tokens: Sequence[int], top: int) -> list[Likely]:
    """Of the token that was chosen in each row of logits [b, vocabulary], beside the `top` likeliest ones."""
    logp = torch.log_softmax(logits.to(at_least_float32(logits.dtype)), dim=-1)
    own = logp.gather(1, torch.tensor(tokens, device=logp.device)[:, None])[:, 0].tolist()
    values, ids = (x.tolist() for x in logp.topk(min(top, logp.shape[1])))
    return [
        Likely(mine, list(zip(i, value, strict=True))) for mine, i, value in zip(own, ids, values, strict=True)
    ]  # fmt: skip
