"""A mixer."""

from __future__ import annotations

import hqlt
from hqlt.mixer import Mixer


@hqlt.register("mixer", "contrast")
class Contrast(Mixer):
    """strength · fw − kv"""

    def __init__(self, heads, *, strength: float = 1.0) -> None:
        super().__init__(heads)
        self.strength = strength

    def gates(self, logits):
        return self.strength, -1.0
