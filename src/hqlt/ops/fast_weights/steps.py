"""The m writes of a token, which are adjacent in time."""

from __future__ import annotations

from typing import Annotated, TypeAlias

from torch import Tensor

from hqlt.ops.segments import written
from hqlt.shapes import Keys, Live, Queries, Strengths, Values

Decay: TypeAlias = Annotated[Tensor, "b t h or b t h k"]
"""log α"""
Erase: TypeAlias = bool | Annotated[Tensor, "b m·t h k"]
"""The key whose value is erased: k itself (True), none (False), or another key."""


def writes_per_token(q: Queries, k: Keys) -> int:
    """m"""
    return k.shape[1] // q.shape[1]


def live_writes(
    live: Live | None, k: Keys, v: Values, beta: Strengths, decay: Decay | None, erase: Erase
) -> tuple[Keys, Values, Strengths, Decay | None, Erase]:
    """The same inputs, changed so that tokens that are not live do not decay the matrix and write zeros."""
    if live is None:
        return k, v, beta, decay, erase
    decay = None if decay is None else written(live, decay)[0]
    live = live.repeat_interleave(k.shape[1] // live.shape[1], dim=1)
    k, v, beta = written(live, k, v, beta)
    return k, v, beta, decay, erase if isinstance(erase, bool) else written(live, erase)[0]
