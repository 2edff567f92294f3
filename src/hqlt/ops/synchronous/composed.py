"""A synchronous layer's memories, mixer and norm, composed of the fastest operation for each."""

from __future__ import annotations

from hqlt.ops.backend import register_backend
from hqlt.ops.norm import mix
from hqlt.ops.synchronous.inputs import Inputs
from hqlt.ops.synchronous.reference import reads
from hqlt.shapes import Matrix, Values


@register_backend("synchronous", "composed")
def synchronous(x: Inputs) -> tuple[Values, Matrix]:
    fw, kv, matrix = reads(x)
    return mix(fw, kv, x.gate, x.norm_weight, eps=x.norm_eps), matrix
