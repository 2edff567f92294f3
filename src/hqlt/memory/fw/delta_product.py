"""DeltaProduct: several steps of the delta rule per token."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from hqlt import ops
from hqlt.memory.fw.recurrence import Erasing, Terms
from hqlt.memory.fw.rule import Write
from hqlt.memory.heads import Heads
from hqlt.memory.state import Entry
from hqlt.registry import register
from hqlt.shapes import Hidden, Queries, Strengths


class ProductGates(NamedTuple):
    """The gates of DeltaProduct."""

    beta: Strengths
    """[b, t, m, h] write strengths in the order of the writes, in at least float32"""
    keys: Tensor
    """[b, t, m − 1, h, k] of the first m − 1 writes, before φ"""
    values: Tensor
    """[b, t, m − 1, h, v]"""


@register("rule", "delta-product")
class DeltaProductMemory(Erasing):
    """m steps of the delta rule per token, then the read. Read and φ are those of the delta rule.

        m times: S ← S + φ(k_i) ⊗ β_i (v_i − Sᵀ φ(k_i))        β_i = beta_max · σ(W_β,i x)

    The last of the m keys and values are the layer's own, which a KV-memory holds too, so that no later step of the
    same token erases them. The others are projections of the rule, k_i = W_k,i x and v_i = W_v,i x, with the layer's
    short convolution and activation of values. The layer's `qk_norm` applies to its own keys only.

    Rows of `k_proj`, `v_proj` and `beta_proj` are ordered by write, then head. In a DeltaProduct checkpoint, the first
    m − 1 of the m blocks of `k_proj` are `fw.k_proj` here, and the last block is the layer's `k_proj`; likewise for
    `v_proj`. `b_proj` is `fw.beta_proj`.

    Args:
        heads: number and width of the layer's heads.
        num_householder: number of writes per token m, at least 2.
        beta_max: maximum of β, at most 2, which the authors use.

    Raises:
        ValueError: when num_householder is below 2.

    Source:
        Siems et al. 2025, "DeltaProduct: Improving State-Tracking in Linear RNNs via Householder Products", section 3.

    Example:
        >>> import hqlt
        >>> layer = hqlt.HybridMemory(hidden_size=64, num_heads=4, fast_weights="delta-product", num_householder=3)
    """

    gates_hold_pairs = True

    def __init__(self, heads: Heads, *, num_householder: int = 2, beta_max: float = 2.0) -> None:
        if num_householder < 2:
            raise ValueError(
                f"num_householder: expected at least 2 writes per token, got {num_householder}; for 1 "
                f"use 'delta' or 'gated-delta'"
            )
        super().__init__(heads, beta_max, writes=num_householder)
        self.writes = num_householder
        extra = num_householder - 1
        widths = extra * heads.keys * heads.k, extra * heads.matrices * heads.v
        self.k_proj, self.v_proj = (nn.Linear(heads.hidden_size, width, bias=False) for width in widths)
        self.own_v_activation: nn.Module = nn.Identity()
        self.convolved = dict(zip(("keys", "values"), widths, strict=True))

    def logits(self, x: Hidden) -> ProductGates:
        return ProductGates(self.beta_proj(x), self.k_proj(x), self.v_proj(x))

    def gates(self, logits: ProductGates) -> ProductGates:
        heads, m = self.heads, self.writes
        beta, keys, values = logits
        return ProductGates(
            self.strengths(beta).unflatten(-1, (m, heads.matrices)),
            keys.unflatten(-1, (m - 1, heads.keys, heads.k)),
            self.own_v_activation(values).unflatten(-1, (m - 1, heads.matrices, heads.v)),
        )

    def gate_entries(self) -> ProductGates:
        heads, m = self.heads, self.writes
        beta = Entry((m, heads.matrices))
        keys = Entry((m - 1, heads.keys, heads.k), "narrow")
        values = Entry((m - 1, heads.matrices, heads.v), "narrow")
        return ProductGates(beta, keys, values)  # type: ignore[arg-type]

    def terms(self, q: Queries, write: Write) -> Terms:
        beta, keys, values = write.gates[:3]
        own_values = self.v_activation(write.values)
        keys = keys.repeat_interleave(self.heads.matrices // self.heads.keys, dim=3)
        k, v = (
            torch.cat([extra, own[:, :, None]], dim=2).flatten(1, 2)
            for extra, own in ((keys, write.keys), (values, own_values))
        )
        return Terms(ops.unit_silu(q), ops.unit_silu(k), v, beta.flatten(1, 2))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_householder={self.writes}"
