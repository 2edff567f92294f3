"""What is done to queries and keys before a memory sees them: φ for the FW-memory, a rotation for the KV-memory."""

from __future__ import annotations

from torch import Tensor

from hqlt.ops.backend import implementation
from hqlt.ops.features import native, reference
from hqlt.shapes import Keys, match_floats

__all__ = ["native", "reference", "rotated", "unit_silu"]


def unit_silu(x: Keys, *, backend: str | None = None) -> Keys:
    """φ of the delta rule, over each head:

        φ(x) = SiLU(x) / √(‖SiLU(x)‖² + 1e-6)

    x: [b, t, h, k]. backend: the name of one implementation, None picks.

    Raises ValueError for shapes and dtypes that do not fit, and for an unknown backend.

    Source: Yang et al. 2024, "Parallelizing Linear Transformers with the Delta Rule over Sequence Length".
    """
    size = match_floats(x=(x, "b t h k"))
    return implementation("unit_silu", x, backend, size)(x)


def rotated(x: Keys, cos: Tensor, sin: Tensor, *, backend: str | None = None) -> Keys:
    """Each pair (x_i, x_{i+k/2}) of a head, turned by its position's angle:

        (y_i, y_{i+k/2}) = (cos x_i − sin x_{i+k/2}, cos x_{i+k/2} + sin x_i)

    x: [b, l, h, k]. cos, sin: [l, 1, k/2], in at least float32. backend: the name of one implementation, None picks.

    Raises ValueError for shapes, dtypes and devices that do not fit, an odd k, and an unknown backend.

    Source: Su et al. 2021, "RoFormer", eq. 15 (whole head, halves rotated).
    """
    size = match_floats(x=(x, "b l h k"), cos=(cos, "l 1 half"), sin=(sin, "l 1 half"))
    if (size["1"], 2 * size["half"]) != (1, size["k"]):
        raise ValueError(
            f"cos, sin: expected [l, 1, k/2] for x of shape {list(x.shape)} with an even k, got {list(cos.shape)}"
        )
    return implementation("rotated", x, backend, size)(x, cos, sin)
