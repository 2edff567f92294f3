"""Sampling the next token of many rows at once, each with its own temperature, top-p and random number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hqlt.shapes import at_least_float32

TOP_TOKENS = 1024
"""Number of most likely tokens that top-p sorts first; the whole vocabulary is sorted only if they do not suffice."""


class Sampling(NamedTuple):
    """How the next token of a row is sampled."""

    temperature: float
    """p ∝ exp(logits / temperature); 0 chooses the most likely token."""
    top_p: float
    """Sample from the smallest set of most likely tokens with at least this total probability."""
    draw: float
    """A random number, uniform in [0, 1)."""


class TokenLogprobs(NamedTuple):
    """Log probabilities for one token, from the unmodified logits."""

    logprob: float
    """log p of the token."""
    top: list[tuple[int, float]]
    """The most likely tokens in its place, with their log p."""


def sample(logits: Tensor, samplings: Sequence[Sampling]) -> list[int | None]:
    """Sample one token per row of logits [b, vocabulary]; None if a row's logits are not finite.

    The token of a row depends on its own logits and sampling alone.
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
            best[rows] = _inverse_cdf(p, draw) if whole else _nucleus(p, top_p, draw)
    finite = largest.isfinite()
    return [int(token) if ok else None for token, ok in zip(best.tolist(), finite.tolist(), strict=True)]


def _inverse_cdf(p: Tensor, draw: Tensor) -> Tensor:
    """The first index at which the cumulative sum of p [b, n] exceeds the fraction draw [b, 1] of its total: [b]."""
    total = p.cumsum(dim=-1, dtype=torch.float64)
    index: Tensor = torch.searchsorted(total, draw * total[:, -1:], right=True)[:, 0]
    return index.clamp(max=p.shape[1] - 1)


def _nucleus(p: Tensor, top_p: Tensor, draw: Tensor) -> Tensor:
    """Tokens [b] sampled from the smallest set of most likely ones with total probability at least top_p [b, 1]."""
    vocabulary = p.shape[1]
    for n in (min(TOP_TOKENS, vocabulary), vocabulary):
        top, order = p.topk(n)
        until = top.cumsum(dim=-1, dtype=torch.float64)
        if (until[:, -1:] >= top_p).all():
            break
    kept = top * (until - top < top_p)
    return order.gather(1, _inverse_cdf(kept, draw)[:, None])[:, 0]


def token_logprobs(logits: Tensor, tokens: Sequence[int], top: int) -> list[TokenLogprobs]:
    """Log probabilities of each row's token and its `top` most likely ones, from logits [b, vocabulary]."""
    logp = torch.log_softmax(logits.to(at_least_float32(logits.dtype)), dim=-1)
    own = logp.gather(1, torch.tensor(tokens, device=logp.device)[:, None])[:, 0].tolist()
    values, ids = (x.tolist() for x in logp.topk(min(top, logp.shape[1])))
    return [
        TokenLogprobs(mine, list(zip(i, value, strict=True))) for mine, i, value in zip(own, ids, values, strict=True)
    ]  # fmt: skip
