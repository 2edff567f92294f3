"""What is done to queries and keys before a memory sees them: φ for the FW-memory, a rotation for the KV-memory."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hqlt.ops.backend import NATIVE_ROWS, Choice, Rule, choose
from hqlt.ops.features import native, reference
from hqlt.shapes import Keys

IMPLEMENTATIONS: dict[str, dict[str, Any]] = {
    "unit_silu": {"reference": reference.unit_silu, "native": native.unit_silu},
    "rotated": {"reference": reference.rotated, "native": native.rotated},
}
RULES = (NATIVE_ROWS, Rule("reference", lambda x: True, "a factor a call"))


def unit_silu(x: Keys, *, backend: str | None = None) -> Keys:
    """φ of the delta rule, over each head:

        φ(x) = SiLU(x) / √(‖SiLU(x)‖² + 1e-6)

    x: [b, t, h, k]. backend: the name of one implementation, None picks.

    Source: Yang et al. 2024, "Parallelizing Linear Transformers with the Delta Rule over Sequence Length".
    """
    return IMPLEMENTATIONS["unit_silu"][explain("unit_silu", x, backend=backend).name](x)


def rotated(x: Keys, cos: Tensor, sin: Tensor, *, backend: str | None = None) -> Keys:
    """Each pair (x_i, x_{i+k/2}) of a head, turned by its position's angle:

        (y_i, y_{i+k/2}) = (cos x_i − sin x_{i+k/2}, cos x_{i+k/2} + sin x_i)

    x: [b, l, h, k]. cos, sin: [l, 1, k/2], in at least float32. backend: the name of one implementation, None picks.

    Source: Su et al. 2021, "RoFormer", eq. 15 (whole head, halves rotated).
    """
    return IMPLEMENTATIONS["rotated"][explain("rotated", x, backend=backend).name](x, cos, sin)


def explain(op: str, x: Tensor, *, backend: str | None = None) -> Choice:
    return choose(op, IMPLEMENTATIONS[op], RULES, x, backend)
