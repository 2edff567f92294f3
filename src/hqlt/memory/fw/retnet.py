"""Retention: every head forgets at a rate of its own, which never changes, and rotates its keys as it does."""

from __future__ import annotations

import math

import torch

from hqlt.memory.fw.decay import fixed_decay
from hqlt.memory.fw.recurrence import MatrixState, Recurrence, Terms
from hqlt.memory.fw.rule import Write
from hqlt.memory.heads import Heads
from hqlt.memory.rotary import Rotary, apply_rotary
from hqlt.registry import register
from hqlt.shapes import Keys, Live, Positions, Queries, Resets, Values, is_symbolic


@register("rule", "retnet")
class RetNetMemory(Recurrence):
    """S ← γ e^{iθ} S      S ← S + k ⊗ v      read: Sᵀ q / √k      γ_h = 1 − 2^(−5−h)

    e^{iθ} rotates the rows of S by rotary embedding's angles of one position: a pair written n writes ago is read as if
    at distance n, and weighed by γ^n. So in a delayed blend distances count from the latest token in the matrix, for
    the rotation as for the decay. rope_theta: the base of the angles, in a layer with two memories that of both (None:
    no rotation).

    S is held as seen from its latest write, so that no position grows with the text; within a call keys and queries are
    rotated instead.

    The authors' layer has no activation of values (fw_activation=None), output_gate=True, and a norm of each head
    without a weight; ours, which begins at 1, is one that o_proj could absorb.

    Source: Sun et al. 2023, "Retentive Network: A Successor to Transformer for Large Language Models", eqs. 5, 6, 8.
    """

    erases = False

    def __init__(self, heads: Heads, *, rope_theta: float | None = 10_000.0) -> None:
        super().__init__(heads)
        self.log_alpha = [math.log1p(-(2.0 ** (-5 - i))) for i in range(heads.matrices)]
        self.positions = Rotary.of(rope_theta)
        if self.positions is not None:
            self.positions.width(heads.k)  # refuses what cannot be rotated

    def terms(self, q: Queries, write: Write) -> Terms:
        decay = fixed_decay(self.log_alpha, q)
        return Terms(q, write.keys, self.v_activation(write.values), decay=decay, erase=False)

    def forward(  # type: ignore[override]  # erases nothing
        self, q: Queries, write: Write, past: MatrixState | None, resets: Resets | None
    ) -> tuple[Values, MatrixState]:
        if self.positions is None:
            return super().forward(q, write, past, resets)
        writes = _writes_so_far(write.live, q)
        write = write._replace(keys=self._rotated(write.keys, writes))
        out, (matrix,) = super().forward(self._rotated(q, writes), write, past, resets)
        columns = self._rotated(matrix.mT.flatten(1, 2)[:, None], -writes[:, -1:])  # as [b, 1, h·v, k]
        return out, MatrixState(columns.view_as(matrix.mT).mT)

    def _rotated(self, x: Keys, positions: Positions) -> Keys:
        """x [b, t, ·, k] at positions [b, t], or [1, t] where all rows have the same."""
        assert self.positions is not None
        cos, sin = self.positions.cos_sin(positions.flatten(), self.heads.k, x.dtype)
        shared = not is_symbolic(positions.shape[0]) and positions.shape[0] == 1
        rows = x if shared else x.flatten(0, 1)[None]
        return apply_rotary(rows, cos, sin).view_as(x)

    def extra_repr(self) -> str:
        return f"positions={self.positions}"


def _writes_so_far(live: Live | None, q: Queries) -> Positions:
    """How many of a call's tokens have been written when each one reads: [b, t], or [1, t] for all rows."""
    live = torch.ones(1, q.shape[1], dtype=torch.bool, device=q.device) if live is None else live
    return live.cumsum(dim=1)
