"""The learning rate schedule."""

from __future__ import annotations

import math


def warmup_then_cosine(step: int, *, warmup_steps: int, steps: int, min_ratio: float) -> float:
    """The learning rate at a step, counted from 0, as a share of its peak.

    It rises linearly to 1 over `warmup_steps`, then follows half a cosine down to `min_ratio` at `steps`.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = min((step - warmup_steps) / max(steps - warmup_steps, 1), 1.0)
    return min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * progress))
