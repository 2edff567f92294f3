"""Window attention by PyTorch's fused attention with a dense mask, for windows about as long as the sequence."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hqlt.ops import contain
from hqlt.ops.backend import register_backend
from hqlt.ops.heads import group, repeated
from hqlt.ops.segments import segment_ids
from hqlt.ops.window_attention.beyond import Beyond, near_and_far
from hqlt.shapes import Keys, Queries, Resets, Values


@register_backend("window_attention", "dense")
def window_attention(
    q: Queries,
    k: Keys,
    v: Values,
    *,
    window: int,
    scale: float,
    resets: Resets | None,
    beyond: Beyond | None = None,
) -> Values:
    if beyond is not None:
        return _with_beyond(q, k, v, window, scale, resets, beyond)
    t, l, g = q.shape[1], k.shape[1], group(q, k)
    causal_is_enough = bool(resets is None and window >= l and t == l and g == 1)
    mask = None if causal_is_enough else visible(t, l, window, resets, q.device)
    if mask is not None and g > 1:
        mask = torch.cat([mask] * g, dim=-2)

    def run(q: Queries, k: Keys, v: Values) -> Values:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if g > 1:  # as h heads of g·t queries
            q = q.unflatten(1, (-1, g)).flatten(2, 3)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal_is_enough, scale=scale)
        if g > 1:
            out = out.unflatten(2, (g, t)).flatten(1, 2)
        return out.transpose(1, 2)

    return contain.attention(run, resets, window, q, k, v)


def visible(t: int, l: int, window: int, resets: Tensor | None, device: torch.device) -> Tensor:
    """Mask of the l keys that the last t tokens see: Bool[t, l], or Bool[b, 1, t, l] with resets."""
    age = torch.arange(l - t, l, device=device)[:, None] - torch.arange(l, device=device)
    reach = (age >= 0) & (age < window)
    if resets is None:
        return reach
    ids = segment_ids(resets)
    return reach & (ids[:, None, l - t :, None] == ids[:, None, None, :])


def _with_beyond(
    q: Queries, k: Keys, v: Values, window: int, scale: float, resets: Resets | None, beyond: Beyond
) -> Values:
    """If other keys are used beyond the window, every entry is included twice: as (k, 0) and as (0, k beyond)."""
    near, far = near_and_far(q, k, window, resets, beyond)
    twice = beyond.q is not None
    mask = torch.cat([near.expand_as(far), far], dim=-1) if twice else near | far
    q, k = beyond.joined(q, k)

    def run(q: Queries, k: Keys, v: Values) -> Values:
        if twice:
            within, after = (F.pad(x, pad) for x, pad in zip(k.chunk(2, -1), ((0, width), (width, 0)), strict=True))
            k, v = torch.cat([within, after], dim=1), torch.cat([v, v], dim=1)
        q, k, v = (x.transpose(1, 2) for x in (q, *repeated(q, k, v)))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2)

    width = k.shape[-1] // 2
    return contain.attention(run, resets, k.shape[1], q, k, v)
