"""The family by flash-linear-attention's public kernels, where it has one. All of them take log α as `g`, decay before
they write, read after, scale the queries, and normalise nothing unless asked to; only those that erase know β."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from hqlt.ops import fla
from hqlt.ops.backend import register_backend
from hqlt.ops.fast_weights.steps import Decay, Erase, live_writes, steps_a_token
from hqlt.shapes import Keys, Live, Matrix, Queries, Resets, Strengths, Values


class _Kernel(NamedTuple):
    module: str
    function: str
    wide: bool = True
    """Takes float32."""


_PRODUCT = _Kernel("gated_delta_product", "chunk_gated_delta_product", wide=False)
_KERNELS = {
    # axes of the decay, whether k is erased, whether a token has several writes
    (0, True, False): _Kernel("delta_rule", "chunk_delta_rule", wide=False),
    (3, True, False): _Kernel("gated_delta_rule", "chunk_gated_delta_rule"),
    (4, True, False): _Kernel("kda", "chunk_kda"),
    (0, True, True): _PRODUCT,
    (3, True, True): _PRODUCT,
    (0, False, False): _Kernel("simple_gla", "chunk_simple_gla"),
    (3, False, False): _Kernel("simple_gla", "chunk_simple_gla"),
    (4, False, False): _Kernel("gla", "chunk_gla"),
}


@register_backend("fast_weights", "fla")  # not tried on a GPU here yet: by name only
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
        raise ValueError("backend 'fla': expected errors=False, as its kernels return none, got True; name 'chunked'")
    fla.check_runs(q, v)
    m = steps_a_token(q, k)
    kernel = _kernel(q, v, decay, erase, m)
    k, v, beta, decay, erase = live_writes(live, k, v, beta, decay, erase)
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


def _kernel(q: Queries, v: Values, decay: Decay | None, erase: Erase, m: int) -> _Kernel:
    """Raises ValueError where fla has none."""
    kernel = None
    if isinstance(erase, bool):
        kernel = _KERNELS.get((0 if decay is None else decay.dim(), erase, m > 1))
    if kernel is None:
        erased = "another key" if isinstance(erase, Tensor) else "k" if erase else "nothing"
        kind = "no decay" if decay is None else "a decay of each row" if decay.dim() == 4 else "a decay of the matrix"
        raise ValueError(
            f"backend 'fla': expected a write rule that flash-linear-attention has (one write a token that erases k or "
            f"nothing, or several that erase k without a decay of each row), got {kind}, {erased} erased, {m} writes a "
            f"token; name 'chunked'"
        )
    if v.dtype not in fla.CHUNKED_DTYPES and not kernel.wide:
        raise ValueError(
            f"backend 'fla': expected bfloat16 or float16, as {kernel.function} takes, got {v.dtype}; name 'chunked'"
        )
    if erase and q.shape[3] > fla.WIDEST_CHUNKED:
        raise ValueError(
            f"backend 'fla': expected keys of at most {fla.WIDEST_CHUNKED} numbers, as {kernel.function} takes, got "
            f"{q.shape[3]}; name 'chunked'"
        )
    return kernel
