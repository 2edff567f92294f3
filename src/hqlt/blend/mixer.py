"""Mixers: how what the two memories say becomes one vector a head."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from hqlt.blend.blend import Reads
from hqlt.shapes import Hidden, Values


class Mixer(nn.Module):
    """mix = g_FW ⊙ fw + g_KV ⊙ kv."""

    def logits(self, x: Hidden) -> Tensor | None:
        """Of the gates: [b, t, ·]; None for a mixer without."""
        return None

    def gates(self, logits: Any) -> tuple[Tensor, Tensor] | tuple[float, float]:
        """(g_FW, g_KV) for each token: [b, t, h, v], or one axis of size 1 for a scalar a head."""
        raise NotImplementedError

    def forward(self, logits: Any, reads: Reads) -> Values:
        (fw, kv), (fw_gate, kv_gate) = reads.both(), self.gates(logits)
        return fw_gate * fw + kv_gate * kv


class SumMixer(Mixer):
    """fw + kv."""

    def gates(self, logits: None) -> tuple[float, float]:
        return 1.0, 1.0


class ScalarMixer(Mixer):
    """σ(·) fw + σ(·) kv: two independent scalars a head. `gate_proj` rows: the FW heads first, then the KV heads."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, 2 * num_heads, bias=False)

    def logits(self, x: Hidden) -> Tensor:
        return self.gate_proj(x)

    def gates(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        fw, kv = logits.sigmoid()[..., None].chunk(2, dim=-2)
        return fw, kv


class VectorMixer(Mixer):
    """γ ⊙ fw + (1 − γ) ⊙ kv with γ = σ(W_γ x): one weight for each number that is read."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.gate_proj = nn.Linear(hidden_size, hidden_size, bias=False)

    def logits(self, x: Hidden) -> Tensor:
        return self.gate_proj(x)

    def gates(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        gamma = logits.sigmoid().unflatten(-1, (self.num_heads, -1))
        return gamma, 1 - gamma

    def forward(self, logits: Tensor, reads: Reads) -> Values:
        (fw, kv), (gamma, _) = reads.both(), self.gates(logits)
        return kv + gamma * (fw - kv)


class NoMixer(Mixer):
    """For one memory alone: what it says."""

    def forward(self, logits: None, reads: Reads) -> Values:
        read = reads.kv if reads.fw is None else reads.fw
        assert read is not None
        return read
