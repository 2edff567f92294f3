"""xLSTM's matrix memory: exponential gates and a normalized read."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hqlt import ops
from hqlt.memory.fw.rule import FWMemory, Write, gate_projection, init_parameter
from hqlt.memory.heads import Heads
from hqlt.memory.state import Entry
from hqlt.ops.heads import repeated
from hqlt.ops.segments import written
from hqlt.registry import register
from hqlt.shapes import Hidden, Live, Matrix, Queries, Resets, Strengths, Values, at_least_float32


class MLSTMGates(NamedTuple):
    """The gates of mLSTM."""

    gain: Strengths
    """[b, t, h] log i, in at least float32"""
    decay: Strengths
    """[b, t, h] log f, in at least float32"""


class MLSTMState(NamedTuple):
    """The state of mLSTM."""

    matrix: Matrix
    """[b, h, k, v + 1] e^−m (S, n)"""
    stabiliser: Tensor
    """[b, h] m"""


@register("rule", "mlstm")
class MLSTMMemory(FWMemory):
    """mLSTM, with the gates i = e^ĩ and f = σ(f̃), where ĩ and f̃ are W x + b, soft-capped.

        S ← f S + i k ⊗ v      n ← f n + i k      read: Sᵀ q / max(|nᵀ q|, √k)

    n is stored as an extra column of S, and both are scaled by e^−m so that no i overflows: the stabilizer
    m ← max(m + log f, ĩ, 0) grows with it, and cancels in the read. (The authors' stabilizer has no 0; with it e^−m
    does not overflow either.)

    Initially both W are 0, b_i is input_bias, and b_f increases from 3 in the first head to 6 in the last.

    The authors' layer has fw_activation=None, output_gate="sigmoid" and head_norm="group", a norm of each head with its
    own weights. (Their norm also subtracts the mean of each head, which v_proj can express.)

    Args:
        heads: number and width of the layer's heads.
        gate_cap: soft cap c of ĩ and f̃, c · tanh(· / c). None: no cap.
        input_bias: initial b_i.

    Raises:
        ValueError: when gate_cap is not positive.

    Source:
        Beck et al. 2024, "xLSTM: Extended Long Short-Term Memory", eqs. 19–27; Beck et al. 2025, "xLSTM 7B: A Recurrent
        LLM for Fast and Efficient Inference", and its code, for the cap and the initial values.

    Example:
        >>> import hqlt
        >>> layer = hqlt.HybridMemory(hidden_size=64, num_heads=4, fast_weights="mlstm", head_norm="group")
    """

    erases = False

    def __init__(self, heads: Heads, *, gate_cap: float | None = 15.0, input_bias: float = -10.0) -> None:
        super().__init__(heads)
        if gate_cap is not None and not gate_cap > 0:
            raise ValueError(f"gate_cap: expected a number above 0, or None for no cap, got {gate_cap}")
        self.gate_cap, self.input_bias = gate_cap, input_bias
        self.input_proj, self.forget_proj = (
            gate_projection(heads.hidden_size, heads.matrices, bias) for bias in (input_bias, 0.0)
        )
        self.init_parameters()

    def init_parameters(self) -> None:
        for projection, biases in ((self.input_proj, (self.input_bias,) * 2), (self.forget_proj, (3.0, 6.0))):
            init_parameter(projection.weight, torch.zeros_like(projection.weight))
            init_parameter(projection.bias, torch.linspace(*biases, self.heads.matrices))

    def logits(self, x: Hidden) -> tuple[Tensor, Tensor]:
        return self.input_proj(x), self.forget_proj(x)

    def gates(self, logits: tuple[Tensor, Tensor]) -> MLSTMGates:
        wide, cap = at_least_float32(logits[0].dtype), self.gate_cap
        gain, forget = (x.to(wide) if cap is None else cap * (x.to(wide) / cap).tanh() for x in logits)
        return MLSTMGates(gain, F.logsigmoid(forget))

    def gate_entries(self) -> MLSTMGates:
        return MLSTMGates(*[Entry((self.heads.matrices,))] * 2)  # type: ignore[arg-type]

    def state_entries(self) -> MLSTMState:
        h, k, v = self.heads.matrices, self.heads.k, self.heads.v
        return MLSTMState(Entry((h, k, v + 1)), Entry((h,)))  # type: ignore[arg-type]

    def forward(
        self, q: Queries, write: Write, past: MLSTMState | None, resets: Resets | None
    ) -> tuple[Values, MLSTMState]:
        gain, decay = written(write.live, *write.gates)
        before = gain.new_zeros(len(q), self.heads.matrices) if past is None else past.stabiliser.to(gain.dtype)
        m = stabilisers(before, gain, decay, resets, write.live)
        before = torch.cat([before[:, None], m[:, :-1]], dim=1)
        if resets is not None:
            before = before.masked_fill(resets[..., None], 0)
        values = self.v_activation(write.values)
        out, matrix = ops.fast_weights(
            *(x.to(gain.dtype) for x in (q, write.keys, F.pad(values, (0, 1), value=1.0))),
            beta=(gain - m).exp(),
            decay=(decay + before - m).clamp(max=0),
            erase=False,
            state=None if past is None else past.matrix,
            resets=resets,
            live=write.live,
        )
        (one,) = repeated(
            q, m.clamp(max=60).neg().exp()[..., None]
        )  # e^−60 is below rounding; the clamp keeps it above 0
        out = out[..., :-1] / torch.maximum(out[..., -1:].abs(), one)
        return out.to(q.dtype), MLSTMState(matrix, m[:, -1])

    def extra_repr(self) -> str:
        return f"gate_cap={self.gate_cap}"


def stabilisers(
    before: Tensor, gain: Strengths, decay: Strengths, resets: Resets | None, live: Live | None
) -> Strengths:
    """Return m_t = max(m_{t−1} + decay_t, gain_t, 0) [b, t, h]; m is 0 before resets, and unchanged by tokens not live.

    `before` is m before the first token [b, h]. Computed by doubling over spans of 1, 2, 4 … tokens, in log₂ t steps.
    """
    b, t, _ = gain.shape
    begins = gain.new_zeros(b, t, 1, dtype=torch.bool) if resets is None else resets[..., None]
    most = gain.clamp(min=0)
    if live is not None:
        most = most.masked_fill(~(live[..., None] | begins), -torch.inf)
    first = torch.where(begins[:, 0], most[:, 0], torch.maximum(most[:, 0], before + decay[:, 0]))
    most = torch.cat([first[:, None], most[:, 1:]], dim=1)
    span = 1
    while span < t:
        earlier = [F.pad(x, (0, 0, span, 0), value=value)[:, :t] for x, value in ((most, -torch.inf), (decay, 0.0))]
        most = torch.where(begins, most, torch.maximum(most, decay + earlier[0]))
        decay = torch.where(begins, decay, decay + earlier[1])
        begins = begins | F.pad(begins, (0, 0, span, 0))[:, :t]
        span *= 2
    return most
