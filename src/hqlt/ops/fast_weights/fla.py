"""Fast weights by the public kernels of flash-linear-attention, for the write rules that it supports.

All of its kernels take log α as `g`, decay before they write, read after, scale the queries, and do not normalize
unless asked to. Only those that erase take β.

torch.compile cannot trace these kernels, nor a number of segments that depends on data. In compiled code, a call is
therefore a single operator, `hqlt::fla`, whose backward pass runs the kernel again to get its gradient.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from hqlt.ops import fla
from hqlt.ops.backend import register_backend
from hqlt.ops.fast_weights.steps import Decay, Erase, live_writes, writes_per_token
from hqlt.shapes import Keys, Live, Matrix, Queries, Resets, Strengths, Values


class _Kernel(NamedTuple):
    module: str
    function: str
    wide: bool = True
    """Whether it supports float32."""


_PRODUCT = _Kernel("gated_delta_product", "chunk_gated_delta_product", wide=False)
_KERNELS = {
    # (number of axes of the decay, whether k is erased, whether a token has several writes)
    (0, True, False): _Kernel("delta_rule", "chunk_delta_rule", wide=False),
    (3, True, False): _Kernel("gated_delta_rule", "chunk_gated_delta_rule"),
    (4, True, False): _Kernel("kda", "chunk_kda"),
    (0, True, True): _PRODUCT,
    (3, True, True): _PRODUCT,
    (0, False, False): _Kernel("simple_gla", "chunk_simple_gla"),
    (3, False, False): _Kernel("simple_gla", "chunk_simple_gla"),
    (4, False, False): _Kernel("gla", "chunk_gla"),
}


@register_backend("fast_weights", "fla")
def fast_weights(
    q: Queries,
    k: Keys,
    v: Values,
    beta: Strengths,
    decay: Decay | None,
    erase: Erase,
    *,
    scale: float,
    state: Matrix,
    resets: Resets | None,
    live: Live | None,
    errors: bool = False,
) -> tuple[Values, Matrix]:
    if errors:
        raise ValueError(
            "backend 'fla': expected errors=False, as its kernels do not return errors, got True; name 'chunked'"
        )
    fla.check_runs(q, v)
    _kernel(q, v, decay, erase, writes_per_token(q, k))
    k, v, beta, decay, erase = live_writes(live, k, v, beta, decay, erase)
    run = operator if torch.compiler.is_compiling() else _run
    return run(q, k, v, beta, decay, state, resets, bool(erase), scale)


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    decay: Tensor | None,
    state: Tensor,
    resets: Tensor | None,
    erase: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Returns the output [b, t, g·h, v] and the final matrix."""
    m = writes_per_token(q, k)
    kernel = _kernel(q, v, decay, erase, m)
    tensors = {} if decay is None else {"g": decay}
    if erase:
        tensors["beta"] = beta
    else:
        v = (beta[..., None] * v).to(v.dtype)
    options: dict[str, Any] = {"num_householder": m} if kernel is _PRODUCT else {}
    if kernel is _PRODUCT and decay is None:
        options["g"] = None
    rule = getattr(fla.public(kernel.module), kernel.function)
    return fla.by_segments(rule, q, k, v, state=state, resets=resets, tensors=tensors, scale=scale, **options)


operator = torch.library.custom_op("hqlt::fla", _run, mutates_args=())


@operator.register_fake
def _(q, k, v, beta, decay, state, resets, erase, scale):  # type: ignore[no-untyped-def]
    return v.new_empty(*q.shape[:3], v.shape[3]), torch.empty_like(state)


def _run_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    decay: Tensor | None,
    state: Tensor,
    resets: Tensor | None,
    d_out: Tensor,
    d_final: Tensor,
    erase: bool,
    scale: float,
) -> list[Tensor]:
    """Returns the gradients of q, k, v, β, the initial matrix and, if there is a decay, log α."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v, beta, state, *([] if decay is None else [decay]))]
    q, k, v, beta, state, *rest = leaves
    # Autograd is disabled inside an operator; enable it again.
    with torch.enable_grad(), torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False):
        outputs = _run(q, k, v, beta, rest[0] if rest else None, state, resets, erase, scale)
        grads = torch.autograd.grad(outputs, leaves, (d_out, d_final), materialize_grads=True)
    return [grad.contiguous() for grad in grads]


_backward = torch.library.custom_op("hqlt::fla_backward", _run_backward, mutates_args=())


@_backward.register_fake
def _(q, k, v, beta, decay, state, *_):  # type: ignore[no-untyped-def]
    return [
        torch.empty_like(x, memory_format=torch.contiguous_format)
        for x in (q, k, v, beta, state, decay)
        if x is not None
    ]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:7])
    ctx.constants = inputs[7:]


def _gradients(ctx: Any, d_out: Tensor, d_final: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, beta, state, *rest = _backward(*ctx.saved_tensors, d_out, d_final, *ctx.constants)
    return q, k, v, beta, rest[0] if rest else None, state, None, None, None


operator.register_autograd(_gradients, setup_context=_setup_context)


def _kernel(q: Queries, v: Values, decay: Decay | None, erase: Erase, m: int) -> _Kernel:
    """The kernel for this kind of call.

    Raises:
        ValueError: If flash-linear-attention has none.
    """
    kernel = None
    if isinstance(erase, bool):
        kernel = _KERNELS.get((0 if decay is None else decay.dim(), erase, m > 1))
    if kernel is None:
        erased = "another key" if isinstance(erase, Tensor) else "k" if erase else "nothing"
        kind = "no decay" if decay is None else "a decay per row" if decay.dim() == 4 else "a decay per matrix"
        raise ValueError(
            f"backend 'fla': expected a write rule that flash-linear-attention supports (one write per token that "
            f"erases k or nothing, or several that erase k, without a decay per row), got {kind}, {erased} erased, "
            f"{m} writes per token; name 'chunked'"
        )
    if v.dtype not in fla.CHUNKED_DTYPES and not kernel.wide:
        raise ValueError(
            f"backend 'fla': expected bfloat16 or float16 for {kernel.function}, got {v.dtype}; name 'chunked'"
        )
    if erase and q.shape[3] > fla.WIDEST_CHUNKED:
        raise ValueError(
            f"backend 'fla': expected a key width of at most {fla.WIDEST_CHUNKED} for {kernel.function}, got "
            f"{q.shape[3]}; name 'chunked'"
        )
    return kernel
