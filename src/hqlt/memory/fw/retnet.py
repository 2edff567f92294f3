"""RetNet's retention: linear attention with a fixed decay and a rotation per head."""

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
    """RetNet's retention, with γ_h = 1 − 2^(−5−h).

        S ← γ e^{iθ} S      S ← S + k ⊗ v      read: Sᵀ q / √k

    e^{iθ} rotates the rows of S by the rotary embedding of one position: a token written n writes ago is read as if at
    distance n, with the weight γ^n. In a delayed blend, distances thus count from the latest token in the matrix.

    S is stored relative to its latest write, so that no position grows with the text; within a call keys and queries
    are rotated instead.

    The authors' layer has fw_activation=None, output_gate=True, and a norm of each head without weights (the layer's
    weights are initialized to 1, and o_proj could absorb them).

    Args:
        heads: number and width of the layer's heads.
        rope_theta: base of the angles; a layer with two memories uses it for both. None: no rotation.

    Source:
        Sun et al. 2023, "Retentive Network: A Successor to Transformer for Large Language Models", eqs. 5, 6, 8.

    Example:
        >>> import hqlt
        >>> layer = hqlt.HybridMemory(64, 4, blend="fw-only", fast_weights="retnet", fw_activation=None)
    """

    erases = False

    def __init__(self, heads: Heads, *, rope_theta: float | None = 10_000.0) -> None:
        super().__init__(heads)
        self.log_alpha = [math.log1p(-(2.0 ** (-5 - i))) for i in range(heads.matrices)]
        self.positions = Rotary.of(rope_theta)
        if self.positions is not None:
            self.positions.width(heads.k)  # raises for a width that cannot be rotated

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
        """Rotate x [b, t, ·, k] by positions [b, t], or [1, t] if all rows share them."""
        assert self.positions is not None
        cos, sin = self.positions.cos_sin(positions.flatten(), self.heads.k, x.dtype)
        shared = not is_symbolic(positions.shape[0]) and positions.shape[0] == 1
        rows = x if shared else x.flatten(0, 1)[None]
        return apply_rotary(rows, cos, sin).view_as(x)

    def extra_repr(self) -> str:
        return f"positions={self.positions}"


def _writes_so_far(live: Live | None, q: Queries) -> Positions:
    """Return how many tokens of this call have been written when each token reads: [b, t], or [1, t] for all rows."""
    live = torch.ones(1, q.shape[1], dtype=torch.bool, device=q.device) if live is None else live
    return live.cumsum(dim=1)
