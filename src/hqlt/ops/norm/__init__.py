"""What becomes of what was read: RMSNorm, by itself or after the vector mixer."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hqlt.ops.backend import NATIVE_ROWS, Choice, Rule, choose
from hqlt.ops.norm import native, reference
from hqlt.shapes import Values, match

IMPLEMENTATIONS: dict[str, dict[str, Any]] = {
    "rms_norm": {"reference": reference.rms_norm, "native": native.rms_norm},
    "mix": {"reference": reference.mix, "native": native.mix},
}
RULES = (NATIVE_ROWS, Rule("reference", lambda x: True, "a factor a call"))


def rms_norm(x: Tensor, weight: Tensor, *, eps: float, backend: str | None = None) -> Tensor:
    """RMSNorm over the last axis:

        y = weight ⊙ x / √(mean x² + eps)

    x: [..., d]. weight: [d]. backend: the name of one implementation, None picks.

    → y, shaped as x, in the dtype of the weight, in which everything is computed.

    Source: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization", eq. 4.
    """
    if x.shape[-1:] != weight.shape:
        raise ValueError(
            f"weight: expected one number for each of x's last axis {x.shape[-1]}, got {list(weight.shape)}"
        )
    run = IMPLEMENTATIONS["rms_norm"][explain("rms_norm", weight, backend=backend).name]
    return run(x.to(weight.dtype), weight, eps)


def mix(fw: Values, kv: Values, gate: Tensor, weight: Tensor, *, eps: float, backend: str | None = None) -> Values:
    """The reads weighed by a gate, then RMSNorm over each head:

        m = γ ⊙ fw + (1 − γ) ⊙ kv,  γ = σ(gate)        y = weight ⊙ m / √(mean m² + eps)

    fw, kv, gate: [b, t, h, v]. weight: [v]. backend: the name of one implementation, None picks.

    → y [b, t, h, v] in the dtype of the weight, in which everything is computed.

    Source: the paper, section 3, the dynamic vector mixer.
    """
    match(fw=(fw, "b t h v"), kv=(kv, "b t h v"), gate=(gate, "b t h v"), weight=(weight, "v"))
    run, dtype = IMPLEMENTATIONS["mix"][explain("mix", weight, backend=backend).name], weight.dtype
    return run(fw.to(dtype), kv.to(dtype), gate.to(dtype), weight, eps)


def explain(op: str, x: Tensor, *, backend: str | None = None) -> Choice:
    return choose(op, IMPLEMENTATIONS[op], RULES, x, backend)
