"""Expiry over chunks of entries, in time linear in the length.

Of the entries before a chunk, only the `kept` best matter: they outrank whatever the others outrank. A chunk of c
entries therefore compares kept + c entries with each other, and passes the `kept` best on to the next.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hqlt.ops.backend import register_backend
from hqlt.ops.expiry.reference import NEVER, of_each_head, until

CHUNK = 64


@register_backend("expiry", "chunked")
def expiry(scores: Tensor, leaves: Tensor, used: Tensor | None, resets: Tensor | None, kept: int) -> Tensor:
    (b, l, h), device = scores.shape, scores.device
    entries = (scores, *of_each_head(scores, leaves, used, resets))
    nowhere = l  # index of an empty slot
    index = torch.arange(l, device=device)[:, None].expand(b, -1, h)
    held, place = tuple(x.new_zeros(b, kept, h) for x in entries), index.new_full((b, kept, h), nowhere)
    out = index.new_full((b, l + 1, h), NEVER)
    for begin in range(0, l, CHUNK):
        chunk = slice(begin, min(begin + CHUNK, l))
        numbers, after, ids, is_held = (
            torch.cat([old, x[:, chunk]], dim=1) for old, x in zip(held, entries, strict=True)
        )
        place = torch.cat([place, index[:, chunk]], dim=1)
        ends = until(numbers, after, ids, is_held, kept)
        out.scatter_(1, place, ends)
        stays = (ends == NEVER) & (ids == ids[:, -1:])
        chosen = stays.byte().argsort(dim=1, stable=True)[:, -kept:]  # entries that stay come last, oldest first
        held = tuple(x.gather(1, chosen) for x in (numbers, after, ids, stays))
        place = place.gather(1, chosen).masked_fill(~held[3], nowhere)
    return out[:, :l]
