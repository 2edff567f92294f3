"""Second derivatives of custom operations: computed through the reference, which autograd can differentiate twice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Equation = Callable[..., Any]
"""A function from differentiable tensors to one output or a tuple of outputs."""


def second_order(
    equation: Equation, inputs: Sequence[Tensor], d_outputs: Sequence[Tensor], d_gradients: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """Gradients with respect to inputs and d_outputs, from the gradients with respect to the inputs' gradients."""
    with torch.enable_grad():
        inputs, d_outputs = ([x.detach().requires_grad_() for x in tensors] for tensors in (inputs, d_outputs))
        outputs = equation(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        d_outputs_as_computed = [d.to(x.dtype) for d, x in zip(d_outputs, outputs, strict=True)]
        gradients = torch.autograd.grad(outputs, inputs, d_outputs_as_computed, create_graph=True, allow_unused=True)
        used = [(g, d) for g, d in zip(gradients, d_gradients, strict=True) if g is not None and d is not None]
    return torch.autograd.grad([g for g, _ in used], [*inputs, *d_outputs], [d for _, d in used], allow_unused=True)


class Gradients(torch.autograd.Function):
    """`gradients(*inputs, *d_outputs)` as a differentiable function, for the backward pass of an autograd.Function."""

    @staticmethod
    def forward(ctx: Any, gradients: Equation, equation: Equation, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*tensors)
        ctx.equation, ctx.count = equation, count
        return gradients(*tensors)

    @staticmethod
    def backward(ctx: Any, *d_gradients: Tensor | None) -> tuple[Any, ...]:
        tensors = ctx.saved_tensors
        inputs, d_outputs = tensors[: ctx.count], tensors[ctx.count :]
        return None, None, None, *second_order(ctx.equation, inputs, d_outputs, d_gradients)


def differentiable_twice(
    operator: Any, equation: Callable[[Sequence[Any]], Equation], inputs: Sequence[int], d_outputs: Sequence[int]
) -> None:
    """Register the derivative of an operator that itself computes gradients.

    Args:
        operator: The operator, a custom op.
        equation: Maps the operator's arguments to the function whose gradients it computes.
        inputs: Indices of the arguments that are inputs of that function; some of them may be None.
        d_outputs: Indices of the arguments that are gradients of its outputs.
    """

    def keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in inputs))
        ctx.others = [None if isinstance(x, Tensor) else x for x in inputs]

    def backward(ctx: Any, *d_gradients: Tensor | None) -> tuple[Any, ...]:
        arguments = [o if x is None else x for x, o in zip(ctx.saved_tensors, ctx.others, strict=True)]
        present = [(i, d) for i, d in zip(inputs, d_gradients, strict=True) if arguments[i] is not None]
        tensors, d_tensors = [arguments[i] for i, _ in present], [arguments[i] for i in d_outputs]
        results: list[Tensor | None] = [None] * len(arguments)
        second = second_order(equation(arguments), tensors, d_tensors, [d for _, d in present])
        for i, result in zip([*(i for i, _ in present), *d_outputs], second, strict=True):
            results[i] = result
        return tuple(results)

    operator.register_autograd(backward, setup_context=keep)
