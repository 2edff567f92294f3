"""The base class of mixers, which combine the reads of the two memories."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from hqlt.blend import Reads
from hqlt.memory import Heads
from hqlt.memory.fw import gate_projection
from hqlt.shapes import Hidden, Values


class Mixer(nn.Module):
    """Base class of mixers: mix = g_FW ⊙ fw + g_KV ⊙ kv.

    A subclass defines `gates`. Its options are the keyword-only arguments of its constructor; once it is registered,
    they are options of the layer.

    Args:
        heads: number and width of the layer's heads.
    """

    norms_fw = False
    """Whether the head norm applies to the FW read before mixing, instead of to the mix."""
    native: str | None = None
    """Name of this mixer in `hqlt.ops.step`, if it supports it; not inherited by subclasses."""

    def __init__(self, heads: Heads) -> None:
        super().__init__()
        self.heads = heads

    def logits(self, x: Hidden) -> Tensor | None:
        """Return the logits of the gates, [b, t, ·], or None for a mixer without gates."""
        return None

    def gates(self, logits: Any) -> tuple[Tensor | float, Tensor | float]:
        """Return (g_FW, g_KV): each a number, or [b, t, heads, v], or [b, t, heads, 1] for one scalar per head."""
        raise NotImplementedError

    def forward(self, logits: Any, reads: Reads) -> Values:
        (fw, kv), (fw_gate, kv_gate) = reads.both(), self.gates(logits)
        return fw_gate * fw + kv_gate * kv

    if TYPE_CHECKING:
        __call__ = forward

    def init_parameters(self) -> None:
        """Set the gates' initial values, after a model's own initialization of the projections."""


class Gated(Mixer):
    """Base class of mixers whose gates are a projection of the layer's input.

    Args:
        heads: number and width of the layer's heads.
        outputs: number of logits per token.
        gate_bias: initial bias of the projection. None: no bias.

    Example:
        >>> from hqlt.memory import Heads
        >>> from hqlt.mixer import Gated
        >>> class Sigmoid(Gated):
        ...     gates = lambda self, logits: (logits.sigmoid()[..., None], 1.0)
        >>> heads = Heads(hidden_size=64, queries=4, keys=4, matrices=4, k=16, v=16)
        >>> mixer = Sigmoid(heads, outputs=4, gate_bias=0.0)
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
    """Returns the read of the only memory.

    Example:
        >>> import hqlt
        >>> hqlt.HybridMemory(hidden_size=64, num_heads=4, blend="kv-only").mixer
        Alone()
    """

    native = "alone"

    def forward(self, logits: None, reads: Reads) -> Values:
        read = reads.kv if reads.fw is None else reads.fw
        assert read is not None
        return read
