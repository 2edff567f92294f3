"""A retention."""

from __future__ import annotations

import hqlt
from hqlt.memory import Retention


@hqlt.register("retention", "key-norm")
class KeyNorm(Retention):
    """score = the norm of a key, of this order"""

    def __init__(self, heads, *, kept: int = 0, order: float = 2.0) -> None:
        super().__init__(heads, kept=kept)
        self.order = order

    def score(self, new):
        return new.keys.norm(self.order, dim=-1)
