"""Mixer and norm in C++: one pass over the numbers (`hqlt/native/rows.h`). The backward pass keeps the inputs alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hqlt import native
from hqlt.shapes import Values


def mix(fw: Values, kv: Values, gate: Tensor, weight: Tensor, eps: float) -> Values:
    return (_run if native.is_plain(fw, kv, gate, weight) else _forward)(fw, kv, gate, weight, eps)


def _run(fw: Tensor, kv: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    inputs = native.contiguous(fw, kv, gate, weight)
    y = torch.empty_like(inputs[0])
    native.run("mix_forward", (y.numel() // len(weight), len(weight)), eps, (*inputs, y))
    return y


_forward = torch.library.custom_op("hqlt::mix", _run, mutates_args=())


@_forward.register_fake
def _(fw, kv, gate, weight, eps):  # type: ignore[no-untyped-def]
    return fw.new_empty(fw.shape)


@torch.library.custom_op("hqlt::mix_backward", mutates_args=())
def _backward(
    fw: Tensor, kv: Tensor, gate: Tensor, weight: Tensor, d_y: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """→ the gradients of fw, kv, gate and weight."""
    inputs = native.contiguous(fw, kv, gate, weight, d_y)
    d_fw, d_kv, d_gate = (torch.empty_like(x) for x in inputs[:3])
    d_weight = torch.zeros_like(weight)
    sizes = d_y.numel() // len(weight), len(weight)
    native.run("mix_backward", sizes, eps, (*inputs, d_fw, d_kv, d_gate, d_weight))
    return d_fw, d_kv, d_gate, d_weight


@_backward.register_fake
def _(fw, kv, gate, weight, d_y, eps):  # type: ignore[no-untyped-def]
    return tuple(x.new_empty(x.shape) for x in (fw, kv, gate, weight))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *saved, ctx.eps = inputs
    ctx.save_for_backward(*saved)


def _gradients(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
    return *_backward(*ctx.saved_tensors, d_y, ctx.eps), None


_forward.register_autograd(_gradients, setup_context=_setup_context)
