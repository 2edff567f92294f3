"""Which outputs NaN and infinity affect, and which gradients, so that they do not cross a reset.

0 · NaN is NaN: a weight of 0 in a matrix product does not keep NaN out. If there are resets, the kernels therefore
replace NaN and infinity by zeros when they load q, k and v (`tiles.finite`), and set to NaN

    lost tokens        y and the final matrix, from a token on whose entry is not finite, until the segment ends
    dead queries       their own gradients: queries that are not finite or lost, or have no finite gradient
    reached entries    the gradients of all entries (and of the initial matrix) that a dead query's output can see

As in `hqlt.ops.contain`, but within the kernels, which saves passes over q, k, v and the gradients. A segment is taken
as a whole: whether an entry has left the window does not matter, since the matrix holds it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hqlt.ops.contain import seen_by_marked, sees_marked, segment_begins
from hqlt.shapes import Keys, Matrix, Resets, Strengths, Values

Gates = tuple[Strengths, Strengths | None]


def finite_rows(x: Tensor) -> Tensor:
    """Whether all numbers along the last axis are finite."""
    return torch.linalg.vector_norm(x, ord=torch.inf, dim=-1).isfinite()


def zeroed(beta: Strengths, decay: Strengths | None) -> Gates:
    """β and log α with zeros in place of what is not finite; log α = −∞ is valid."""
    beta = torch.where(beta.isfinite(), beta, 0)
    return beta, None if decay is None else torch.where(decay < torch.inf, decay, 0)


def _begins(resets: Resets, t: int) -> Tensor:
    """`segment_begins` on the timeline of held entries, the initial matrix and the t new entries: [b, l + 1]."""
    return segment_begins(torch.cat([resets[:, :-t], F.pad(resets[:, -t:], (1, 0))], dim=1))


def lost_tokens(k: Keys, v: Values, beta: Strengths, decay: Strengths | None, state: Matrix, resets: Resets) -> Tensor:
    """Lost tokens: int8 [b, t, h]."""
    t = beta.shape[1]
    bad = ~(finite_rows(k) & finite_rows(v))
    bad[:, -t:] |= ~beta.isfinite()
    if decay is not None:
        bad[:, -t:] |= ~(decay < torch.inf)
    bad_state = ~finite_rows(state.flatten(2))
    marks = torch.cat([bad[:, :-t], bad_state[:, None], bad[:, -t:]], dim=1)
    return sees_marked(marks, _begins(resets, t))[:, -t:].to(torch.int8, memory_format=torch.contiguous_format)


def reached_entries(dead: Tensor, dead_final: Tensor, resets: Resets) -> tuple[Tensor, Tensor]:
    """Reached entries, int8 [b, l, h], and initial matrices, Bool[b, h].

    Args:
        dead (`int8 [b, g·h, t]`): Dead queries.
        dead_final (`Bool[b, h]`): Final matrices that are lost or have no finite gradient.
        resets (`Bool[b, l]`): Entries that begin a segment.
    """
    (b, h), t, l = dead_final.shape, dead.shape[2], resets.shape[1]
    new = dead.unflatten(1, (h, -1)).amax(dim=2).transpose(1, 2) != 0
    new[:, -1] |= dead_final  # the final matrix sees what the last token sees
    marks = torch.cat([new.new_zeros(b, l - t + 1, h), new], dim=1)
    reached = seen_by_marked(marks, _begins(resets, t))
    return torch.cat([reached[:, : l - t], reached[:, -t:]], dim=1).to(torch.int8), reached[:, l - t]
