"""Expiry in C++: one pass over the entries with a heap of the kept ones (`hqlt/native/expiry.h`)."""

from __future__ import annotations

import torch
from torch import Tensor

from hqlt import native
from hqlt.ops.backend import register_backend
from hqlt.shapes import at_least_float32


@register_backend("expiry", "native")
def expiry(scores: Tensor, leaves: Tensor, used: Tensor | None, resets: Tensor | None, kept: int) -> Tensor:
    (scores,) = native.cast(at_least_float32(scores.dtype), scores)
    run = _run if native.may_run(scores, leaves, used, resets) else _expiry
    return run(scores, leaves, used, resets, kept)


def _run(scores: Tensor, leaves: Tensor, used: Tensor | None, resets: Tensor | None, kept: int) -> Tensor:
    inputs = native.contiguous(scores, leaves, used, resets)
    out = torch.empty_like(inputs[0], dtype=torch.int64)
    native.run("expiry_forward", 0.0, (*inputs, out), kept)
    return out


_expiry = torch.library.custom_op("hqlt::expiry", _run, mutates_args=())


@_expiry.register_fake
def _(scores, *others):  # type: ignore[no-untyped-def]
    return scores.new_empty(scores.shape, dtype=torch.int64)
