"""Which outputs NaN and infinity affect, and which gradients, so that they do not cross a reset.

0 · NaN is NaN: a weight of 0 in a matrix product does not keep NaN out. If there are resets, the kernels therefore
replace NaN and infinity by zeros when they load q, k and v (`tiles.finite`), and set to NaN

    lost tokens        y and the final matrix, from a token on whose entry is not finite, until the segment ends
    dead queries       their own gradients: queries that are not finite or lost, or have no finite gradient
    reached entries    the gradients of all entries (and of the initial matrix) that a dead query's output can see

A segment is taken as a whole: whether an entry has left the window does not matter, since the matrix holds it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hqlt.shapes import Keys, Matrix, Strengths, Values

Gates = tuple[Strengths, Strengths | None]


def finite_rows(x: Tensor) -> Tensor:
    """Whether all numbers along the last axis are finite."""
    return torch.linalg.vector_norm(x, ord=torch.inf, dim=-1).isfinite()


def zeroed(beta: Strengths, decay: Strengths | None) -> Gates:
    """β and log α with zeros in place of what is not finite; log α = −∞ is valid."""
    beta = torch.where(beta.isfinite(), beta, 0)
    return beta, None if decay is None else torch.where(decay < torch.inf, decay, 0)


def lost_tokens(k: Keys, v: Values, beta: Strengths, decay: Strengths | None, state: Matrix, ids: Tensor) -> Tensor:
    """Lost tokens: int8 [b, t, h]. ids: segments [b, l] of all entries."""
    t, held = beta.shape[1], k.shape[1] - beta.shape[1]
    bad = ~(finite_rows(k) & finite_rows(v))
    bad[:, held:] |= ~beta.isfinite()
    if decay is not None:
        bad[:, held:] |= ~(decay < torch.inf)
    before = ids[:, held - 1] if held else torch.zeros_like(ids[:, 0])
    latest = torch.where(bad, ids[..., None], -1).cummax(dim=1).values[:, held:]  # the last segment with a bad entry
    from_state = torch.where(finite_rows(state.flatten(2)), -1, before[:, None])
    return (torch.maximum(latest, from_state[:, None]) == ids[:, held:, None]).to(torch.int8).view(-1, t, k.shape[2])


def reached_entries(dead: Tensor, dead_final: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Reached entries, int8 [b, l, h], and initial matrices, Bool[b, h].

    Args:
        dead (`int8 [b, g·h, t]`): Dead queries.
        dead_final (`Bool[b, h]`): Final matrices that are lost or have no finite gradient.
        ids (`[b, l]`): Segments of all entries.
    """
    h, t = dead_final.shape[1], dead.shape[2]
    held = ids.shape[1] - t
    by_group = dead.unflatten(1, (h, -1)).amax(dim=2).transpose(1, 2) != 0
    none = torch.iinfo(ids.dtype).max
    marks = torch.where(by_group, ids[:, held:, None], none)
    marks[:, -1] = torch.minimum(marks[:, -1], torch.where(dead_final, ids[:, -1:], none))
    following = marks.flip(1).cummin(dim=1).values.flip(1)  # the next segment with a dead query
    following = torch.cat([following[:, :1].expand(-1, held, -1), following], dim=1)
    before = ids[:, held - 1] if held else torch.zeros_like(ids[:, 0])
    return (following == ids[..., None]).to(torch.int8), following[:, held] == before[:, None]
