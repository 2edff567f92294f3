"""What becomes of what was read: RMSNorm, by itself or after the vector mixer."""

from __future__ import annotations

from torch import Tensor

from hqlt.ops.backend import implementation
from hqlt.ops.norm import native, reference
from hqlt.shapes import Values, match_floats

__all__ = ["mix", "native", "reference", "rms_norm"]


def rms_norm(x: Tensor, weight: Tensor, *, eps: float, backend: str | None = None) -> Tensor:
    """RMSNorm over the last axis:

        y = weight ⊙ x / √(mean x² + eps)

    x: [..., d]. weight: [d]. backend: the name of one implementation, None picks.

    → y, shaped as x, in the dtype of the weight, in which everything is computed.

    Raises ValueError for shapes, dtypes and devices that do not fit, and for an unknown backend.

    Source: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization", eq. 4.
    """
    leading = " ".join(map(str, range(x.dim() - 1)))
    size = match_floats(x=(x, f"{leading} d"), weight=(weight, "d"))
    return implementation("rms_norm", weight, backend, size)(x.to(weight.dtype), weight, eps)


def mix(fw: Values, kv: Values, gate: Tensor, weight: Tensor, *, eps: float, backend: str | None = None) -> Values:
    """The reads weighed by a gate, then RMSNorm over each head:

        m = γ ⊙ fw + (1 − γ) ⊙ kv,  γ = σ(gate)        y = weight ⊙ m / √(mean m² + eps)

    fw, kv, gate: [b, t, h, v]. weight: [v]. backend: the name of one implementation, None picks.

    → y [b, t, h, v] in the dtype of the weight, in which everything is computed.

    Raises ValueError for shapes, dtypes and devices that do not fit, and for an unknown backend.

    Source: the paper, section 3, the dynamic vector mixer.
    """
    size = match_floats(fw=(fw, "b t h v"), kv=(kv, "b t h v"), gate=(gate, "b t h v"), weight=(weight, "v"))
    run, dtype = implementation("mix", weight, backend, size), weight.dtype
    return run(fw.to(dtype), kv.to(dtype), gate.to(dtype), weight, eps)
