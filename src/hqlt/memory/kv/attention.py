"""The KV-memory: precise and short. Pairs are kept as they are, and read by softmax."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from hqlt import ops
from hqlt.memory.heads import Heads
from hqlt.native import is_traced
from hqlt.ops.features import rotated
from hqlt.shapes import Keys, Queries, Resets, Values


class KVMemory(nn.Module):
    """Softmax attention over the latest `window` pairs (None: over all), with rotary positions or none.

        out_t = V_t softmax(K_tᵀ q_t / √k)        K_t, V_t: the pairs of tokens t−window+1 … t, q and k rotated

    Rotary positions act on differences alone, so a pair is held unrotated and its angle counted from wherever the
    call's timeline begins: no token counter grows, and nothing loses precision after a million tokens.

    Source: the paper, section 2.1; Su et al. 2021, "RoFormer", eq. 15 (whole head, halves rotated).
    """

    native = "window"

    def __init__(self, heads: Heads, *, rope_theta: float | None = 10_000.0) -> None:
        super().__init__()
        self.heads = heads
        if rope_theta is not None and heads.k % 2:
            raise ValueError(
                f"head_dim: expected an even head width for rotary positions, got {heads.k}; change the sizes (it is "
                f"hidden_size / num_heads unless given) or set rope_theta=None"
            )
        self.rope_theta = rope_theta

    def read(self, q: Queries, k: Keys, v: Values, window: int | None, resets: Resets | None) -> Values:
        """q: [b, t, g·h, k] of the new tokens; k, v: [b, l, h, ·], held pairs then new ones; resets: Bool[b, l]."""
        t, l = q.shape[1], k.shape[1]
        if (rotary := self.rotary(l, q)) is not None:
            cos, sin = rotary
            q, k = rotated(q, cos[l - t :], sin[l - t :]), rotated(k, cos, sin)
        return ops.window_attention(q, k, v, window=window, resets=resets)

    forward = read  # blends call the module, so that hooks on it are heard

    def rotary(self, l: int, q: Queries) -> tuple[Tensor, Tensor] | None:
        """cos and sin for a timeline of l pairs; None without positions."""
        if self.rope_theta is None:
            return None
        return rotary_table(l, q.shape[-1], self.rope_theta, q.device, q.dtype)

    def extra_repr(self) -> str:
        return f"rope_theta={self.rope_theta}"


def rotary_table(l: int, k: int, theta: float, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of position · theta^(−2i/k) for i < k/2: [l, 1, k/2] each, from angles in float64.

    Tables are kept from call to call, but for those that are made while something of torch traces: they belong to it.
    """
    return (_new_table if is_traced() else _kept_table)(l, k, theta, device, dtype)


def _new_table(l: int, k: int, theta: float, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    frequency = theta ** (-torch.arange(0, k, 2, dtype=torch.float64, device="cpu") / k)
    angle = torch.arange(l, dtype=torch.float64, device="cpu")[:, None] * frequency
    dtype = torch.promote_types(dtype, torch.float32)
    cos, sin = (wave[:, None].to(device, dtype) for wave in (angle.cos(), angle.sin()))
    return cos, sin


@functools.lru_cache(maxsize=64)
def _kept_table(l: int, k: int, theta: float, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):  # what is kept must serve training too
        return _new_table(l, k, theta, device, dtype)
