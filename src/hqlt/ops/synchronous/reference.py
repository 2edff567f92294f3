"""A synchronous layer's memories, mixer and norm as their equations. Other implementations are tested against it."""

from __future__ import annotations

from functools import partial

import torch

from hqlt.ops.backend import register_backend
from hqlt.ops.delta_rule import delta_rule
from hqlt.ops.fast_weights import fast_weights
from hqlt.ops.features import rotated, unit_silu
from hqlt.ops.synchronous.inputs import Inputs
from hqlt.ops.window_attention import window_attention
from hqlt.shapes import Matrix, Values, at_least_float32


@register_backend("synchronous", "reference")
def synchronous(x: Inputs) -> tuple[Values, Matrix]:
    wide = {name: getattr(x, name) for name in ("q", "k", "v", "gate", "norm_weight")}
    x = x._replace(**{name: tensor.to(at_least_float32(tensor.dtype)) for name, tensor in wide.items()})
    fw, kv, matrix = reads(x, "reference")
    gamma = x.gate.sigmoid()
    mix = gamma * fw + (1 - gamma) * kv
    return mix * torch.rsqrt(mix.square().mean(dim=-1, keepdim=True) + x.norm_eps) * x.norm_weight, matrix


def reads(x: Inputs, backend: str | None = None) -> tuple[Values, Values, Matrix]:
    """Returns the FW read, the KV read and the final matrix, each by its own operation."""
    q, k, v, resets, scale = x.q, x.k, x.v, x.resets, x.scale
    t, l = q.shape[1], k.shape[1]
    own = slice(l - t, l)
    write = delta_rule if x.decay is None else partial(fast_weights, decay=x.decay)
    fw, matrix = write(
        unit_silu(q, backend=backend), unit_silu(k[:, own], backend=backend), v[:, own], beta=x.beta,
        scale=scale, state=x.state, resets=None if resets is None else resets[:, own], backend=backend,
    )  # fmt: skip
    if x.rotary is not None:
        cos, sin = (table[:l] for table in x.rotary)
        q, k = rotated(q, cos[own], sin[own], backend=backend), rotated(k, cos, sin, backend=backend)
    kv = window_attention(q, k, v, window=x.window, scale=scale, resets=resets, beyond=x.beyond, backend=backend)
    return fw, kv, matrix
