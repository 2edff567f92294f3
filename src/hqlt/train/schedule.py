"""The learning rate over a run."""

from __future__ import annotations

import math


def warmup_then_cosine(step: int, *, warmup: int, steps: int, final: float) -> float:
    """The share of its peak that the learning rate has at a step, counted from 0.

    Linear over `warmup` steps to 1, then half a cosine down to `final` at `steps`.
    """
    if step < warmup:
        return (step + 1) / warmup
    progress = min((step - warmup) / max(steps - warmup, 1), 1.0)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))
