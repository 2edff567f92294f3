"""A mixer answers one question: how do two reads become one?"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from hqlt.blend import Reads
from hqlt.memory import Heads
from hqlt.memory.fw import gate_projection
from hqlt.shapes import Hidden, Values


class Mixer(nn.Module):
    """mix = g_FW ⊙ fw + g_KV ⊙ kv.

    Options are the keyword-only arguments of the constructor; a registered mixer's are the layer's own.
    """

    norms_fw = False
    """Whether the norm over each head is the FW-memory's own, before the reads are mixed, or follows the mix."""
    native: str | None = None
    """What `hqlt.ops.step` calls this mixer, where it runs it; a subclass says so anew."""

    def __init__(self, heads: Heads) -> None:
        super().__init__()
        self.heads = heads

    def logits(self, x: Hidden) -> Tensor | None:
        """Of the gates: [b, t, ·]; None for a mixer without."""
        return None

    def gates(self, logits: Any) -> tuple[Tensor | float, Tensor | float]:
        """(g_FW, g_KV) for each token: [b, t, reads, v], or one axis of size 1 for a scalar a head."""
        raise NotImplementedError

    def forward(self, logits: Any, reads: Reads) -> Values:
        (fw, kv), (fw_gate, kv_gate) = reads.both(), self.gates(logits)
        return fw_gate * fw + kv_gate * kv

    def init_parameters(self) -> None:
        """Put the gates to where they begin, whatever else has initialised their projections."""


class Gated(Mixer):
    """A mixer whose gates are a projection of the layer's input.

    gate_bias: where the projection's bias begins (None: there is none).
    """

    def __init__(self, heads: Heads, outputs: int, gate_bias: float | None) -> None:
        super().__init__(heads)
        self.gate_bias = gate_bias
        self.gate_proj: nn.Module = gate_projection(heads.hidden_size, outputs, gate_bias)

    def logits(self, x: Hidden) -> Tensor:
        logits: Tensor = self.gate_proj(x)
        return logits

    def init_parameters(self) -> None:
        if self.gate_bias is not None:
            nn.init.constant_(self.gate_proj.bias, self.gate_bias)  # type: ignore[arg-type]


class Alone(Mixer):
    """For one memory alone: what it says."""

    native = "alone"

    def forward(self, logits: None, reads: Reads) -> Values:
        read = reads.kv if reads.fw is None else reads.fw
        assert read is not None
        return read
