"""What becomes of the two memories' reads: the vector mixer and the norm after it, over each head."""

from __future__ import annotations

from torch import Tensor

from hqlt.ops.backend import NATIVE_ROWS, Rule, choose
from hqlt.ops.mix import native, reference
from hqlt.shapes import Values, match

IMPLEMENTATIONS = {"reference": reference.mix, "native": native.mix}
RULES = (NATIVE_ROWS, Rule("reference", lambda x: True, "a factor a call"))


def mix(fw: Values, kv: Values, gate: Tensor, weight: Tensor, *, eps: float, backend: str | None = None) -> Values:
    """The reads weighed by a gate, then RMSNorm over each head:

        m = γ ⊙ fw + (1 − γ) ⊙ kv,  γ = σ(gate)        y = weight ⊙ m / √(mean m² + eps)

    fw, kv, gate: [b, t, h, v]. weight: [v]. backend: the name of one implementation, None picks.

    → y [b, t, h, v] in the dtype of the weight, in which everything is computed.

    Source: the paper, section 3, the dynamic vector mixer.
    """
    match(fw=(fw, "b t h v"), kv=(kv, "b t h v"), gate=(gate, "b t h v"), weight=(weight, "v"))
    fw, kv, gate = (x.to(weight.dtype) for x in (fw, kv, gate))
    return IMPLEMENTATIONS[choose("mix", IMPLEMENTATIONS, RULES, fw, backend).name](fw, kv, gate, weight, eps)
