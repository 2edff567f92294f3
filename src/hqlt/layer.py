"""The layer: project → two memories → mixer → norm → project."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hqlt.blend import (
    BLENDS,
    FUSED,
    MIXERS,
    Blend,
    Mixer,
    NoMixer,
    Parts,
    Projected,
    ScalarMixer,
    SumMixer,
    VectorMixer,
)
from hqlt.convolution import ShortConvolution
from hqlt.memory import KVMemory, MemoryState
from hqlt.memory.fw import RULES
from hqlt.norm import RMSNorm
from hqlt.registry import one_of
from hqlt.shapes import Hidden, Resets, Values, at_least_float32, check_resets, match


class HybridMemory(nn.Module):
    """A sequence layer whose heads hold a precise, short KV-memory and a compressed, endless FW-memory.

        q, k = W_q x, W_k x    v = SiLU(W_v x)    β = beta_max · σ(W_β x)
        y    = W_o RMSNorm(mix(FW read of q, KV read of q))

    hidden_size: width of x and y. num_heads: heads, which divide it. window: tokens that the KV-memory reaches, the
    current one included; None is full attention (for "synchronous" and "kv-only").
    blend: when a token reaches each memory: "synchronous", "delayed-streaming", "delayed-chunk"; "kv-only" and
    "fw-only" are the baselines from the same parts ("kv-only" as in Transformer++: v without SiLU, no norm).
    mixer: "vector", "scalar" or "sum". fast_weights: "delta" or "linear". beta_max: 2.0, or 1.0 for β in (0, 1).
    rope_theta: base of the KV-memory's rotary positions, None for none. norm_eps: of the RMSNorm over each head.
    conv_size: taps of a short convolution on q, k, v before anything else (0: none). output_gate: multiply the normed
    heads by SiLU(W_g x).

    Parameters: q_proj, k_proj, v_proj, beta_proj, mixer.gate_proj, o_norm, o_proj, each `.weight`, no biases; with
    their options conv.weight and g_proj.weight.

    Source: the paper, section 3; PyTorch's default initialisation, the paper's in `hqlt.model`.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        window: int | None = 64,
        blend: str = "synchronous",
        mixer: str = "vector",
        fast_weights: str = "delta",
        beta_max: float = 2.0,
        rope_theta: float | None = 10_000.0,
        norm_eps: float = 1e-6,
        *,
        conv_size: int = 0,
        output_gate: bool = False,
    ) -> None:
        super().__init__()
        _check_sizes(hidden_size, num_heads, window, blend, rope_theta, conv_size)
        one_of("mixer", mixer, MIXERS)
        one_of("fast_weights", fast_weights, RULES)
        if not 0 < beta_max <= 2:
            raise ValueError(f"beta_max: expected a number in (0, 2] (above 2 the delta rule diverges), got {beta_max}")
        self.hidden_size = hidden_size
        self.num_heads = num_heads
        self.beta_max = beta_max

        kv = None if blend == "fw-only" else KVMemory(window, rope_theta)
        fw = None if blend == "kv-only" else RULES[fast_weights]()
        self.blend: Blend = BLENDS[blend](kv, fw)
        self.mixer = build_mixer(mixer if kv and fw else None, hidden_size, num_heads)

        def linear(outputs: int) -> nn.Linear:
            return nn.Linear(hidden_size, outputs, bias=False)

        self.q_proj = linear(hidden_size)
        self.k_proj = linear(hidden_size)
        self.v_proj = linear(hidden_size)
        self.beta_proj = linear(num_heads) if fw and fw.uses_beta else None
        self.conv = ShortConvolution(3 * hidden_size, conv_size) if conv_size else None
        self.v_activation = nn.SiLU() if fw else nn.Identity()
        self.o_norm = RMSNorm(hidden_size // num_heads, eps=norm_eps) if fw else nn.Identity()
        self.g_proj = linear(hidden_size) if output_gate else None
        self.o_proj = linear(hidden_size)
        self.fused = tuple(make() for make in FUSED)
        self.like: Tensor
        self.register_buffer("like", torch.empty(0), persistent=False)  # has the layer's dtype, its weights or not

    def forward(
        self, x: Hidden, state: MemoryState | None = None, resets: Resets | None = None
    ) -> tuple[Hidden, MemoryState]:
        """x: [b, t, hidden]; state: what an earlier call returned, None for empty memories; resets: Bool[b, t].

        → y [b, t, hidden], the state after the last token. The given state is left as it was.

        Raises ValueError for shapes that do not fit and for a state that another layer made.
        """
        size = match(x=(x, "b t d"))
        b, t = size["b"], size["t"]
        if size["d"] != self.hidden_size:
            raise ValueError(f"x: expected [b, t, {self.hidden_size}] for this layer, got shape {list(x.shape)}")
        check_resets(resets, b, t)
        if state is not None:
            if type(state) is tuple:  # as torch.jit.trace passes it
                state = MemoryState._make(state)
            self.check_state(state, x)
        if t == 0:
            return self.no_tokens(x), self.init_state(b, x.device) if state is None else state

        projected, convolution = self.project(x, state, resets)
        heads, after = self.heads(projected, state, resets)
        y = heads.flatten(2)
        if self.g_proj is not None:
            y = y * F.silu(self.g_proj(x))
        return self.o_proj(y), MemoryState(*after[:-1], convolution)  # as _replace, which torch 2.9 cannot compile

    def no_tokens(self, x: Hidden) -> Hidden:
        """y for t = 0. Every weight takes part by an empty slice: its gradient is zero, as in any other call."""
        y: Tensor = self.o_proj(x)
        return y + sum(weight.flatten()[:0].sum() for weight in self.parameters()) if torch.is_grad_enabled() else y

    def project(self, x: Hidden, state: MemoryState | None, resets: Resets | None) -> tuple[Projected, Tensor]:
        """What the heads are made of, and the latest inputs of the convolution."""
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        b, t, _ = x.shape
        latest = x.new_zeros(b, 0, 3 * self.hidden_size) if state is None else state.convolution
        if self.conv is not None:
            held = None if state is None else (state.convolution, state.position)
            convolved, latest = self.conv(torch.cat([q, k, v], dim=-1), held, resets)
            q, k, v = convolved.chunk(3, dim=-1)
        heads = (b, t, self.num_heads, self.hidden_size // self.num_heads)
        q, k, v = q.view(heads), k.view(heads), v.view(heads)
        beta = None if self.beta_proj is None else self.beta_proj(x)
        return Projected(q, k, v, beta, self.mixer.logits(x)), latest

    def heads(
        self, projected: Projected, state: MemoryState | None, resets: Resets | None
    ) -> tuple[Values, MemoryState]:
        """What both memories say, mixed and normed: [b, t, h, v], and the state after the last token.

        Where nobody watches a part, the first of `hqlt.blend.FUSED` that serves does it in one piece; otherwise the
        parts run one by one.
        """
        modules: dict[str, Any] = self._modules  # nn.Module's look-up of self.mixer takes as long as one token's mixing
        parts = Parts(modules["v_activation"], modules["blend"], modules["mixer"], modules["o_norm"], self.beta_max)
        if not parts.watched():
            for fused in self.fused:
                if (done := fused(parts, projected, state, resets)) is not None:
                    return done
        return parts.run(projected, state, resets)

    def init_state(self, batch_size: int, device: torch.device | str | None = None) -> MemoryState:
        """The state of empty memories, as `state=None` means it; on the layer's device where none is given."""
        dtype, wide = self.like.dtype, at_least_float32(self.like.dtype)
        dtypes = {"betas": wide, "fast_weights": wide, "key_sum": wide, "position": torch.long}
        return MemoryState(
            **{
                name: torch.zeros(
                    [size or 0 for size in shape],
                    dtype=dtypes.get(name, dtype),
                    device=self.like.device if device is None else device,
                )
                for name, shape in self.state_shapes(batch_size).items()
            }
        )

    def state_shapes(self, b: int) -> dict[str, tuple[int | None, ...]]:
        """The shape of each part of this layer's state; None where a part grows with the context."""
        h, k, blend = self.num_heads, self.hidden_size // self.num_heads, self.blend
        s, fw = blend.slots, blend.fw
        return {
            "keys": (b, s, h, k),
            "values": (b, s, h, k),
            "betas": (b, s, h if blend.keeps_betas else 0),
            "fast_weights": (b, h if fw else 0, k, k),
            "key_sum": (b, h if fw else 0, k if fw and fw.uses_key_sum else 0),
            "position": (b,),
            "convolution": (b, self.conv.size - 1 if self.conv else 0, 3 * self.hidden_size),
        }

    def check_state(self, state: MemoryState, x: Hidden) -> None:
        """Refuse a state of another layer, batch or device."""
        shapes = self.state_shapes(x.shape[0])
        if [(part.shape, part.device) for part in state] == [(shape, x.device) for shape in shapes.values()]:
            return
        for (name, expected), part in zip(shapes.items(), state, strict=True):
            if part.dim() != len(expected) or any(
                e is not None and e != size for e, size in zip(expected, part.shape, strict=True)
            ):
                raise ValueError(
                    f"state.{name}: expected shape {_shape(expected)} for this layer ({self.extra_repr()}) and a "
                    f"batch of {len(x)}, got {_shape(part.shape)}; is it the state of another layer or batch?"
                )
            if part.device != x.device:
                raise ValueError(
                    f"state.{name}: expected on {x.device}, where x is, got {part.device}; "
                    f"use state.to({str(x.device)!r})"
                )

    def extra_repr(self) -> str:
        return f"hidden_size={self.hidden_size}, num_heads={self.num_heads}, beta_max={self.beta_max}"


def build_mixer(name: str | None, hidden_size: int, num_heads: int) -> Mixer:
    match name:
        case "vector":
            return VectorMixer(hidden_size, num_heads)
        case "scalar":
            return ScalarMixer(hidden_size, num_heads)
        case "sum":
            return SumMixer()
        case _:
            return NoMixer()


def _check_sizes(
    hidden_size: int, num_heads: int, window: int | None, blend: str, rope_theta: float | None, conv_size: int
) -> None:
    one_of("blend", blend, BLENDS)
    if num_heads < 1 or hidden_size < 1 or hidden_size % num_heads:
        raise ValueError(
            f"num_heads: expected a positive number that divides hidden_size = {hidden_size}, got {num_heads}"
        )
    if window is not None and window < 1:
        raise ValueError(f"window: expected at least 1 (the token itself) or None for all, got {window}")
    if window is None and blend.startswith("delayed"):
        raise ValueError(f"window: expected a number of tokens, because {blend} writes what leaves it, got None")
    if rope_theta is not None and blend != "fw-only" and (hidden_size // num_heads) % 2:
        raise ValueError(
            f"hidden_size / num_heads: expected an even head width for rotary positions, got "
            f"{hidden_size // num_heads}; change the sizes or set rope_theta=None"
        )
    if conv_size < 0:
        raise ValueError(f"conv_size: expected 0 (none) or a number of taps, got {conv_size}")


def _shape(sizes: Iterable[int | None]) -> str:
    return "[" + ", ".join("any" if size is None else str(size) for size in sizes) + "]"
