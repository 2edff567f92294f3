"""Steps a second of the partially observable worlds, as their user gets them: random actions drawn, all included.

Counted are steps of copies that took an action; an episode's reset takes time and counts nothing. All copies of a
world step at once in one thread. Beside them, the same world's copies one by one in gymnasium's SyncVectorEnv, found to
give the same observations and rewards before anything is timed.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from typing import Any

import numpy as np

from hqlt.bench.race import Row

ONLY = ("TMazePassive", "TMazeActive", "KeyToDoor", "VisualMatch")
CAPTION = "steps a second by the wall's clock: median of the rounds, and the slowest and fastest round"
TOGETHER, ONE_BY_ONE = "together", "one by one: SyncVectorEnv"


def setting() -> dict[str, Any]:
    """What the figures hold for."""
    import gymnasium

    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "numpy": np.__version__,
        "gymnasium": gymnasium.__version__,
        "load before": round(os.getloadavg()[0], 1),
    }


def run(rounds: int, quick: bool, only: str | None) -> list[Row]:
    contestants = [
        (name, n, implementation)
        for name in ONLY
        if only in (None, name)
        for n, implementation in [(1, TOGETHER), (64, ONE_BY_ONE), (64, TOGETHER), (1024, TOGETHER), (4096, TOGETHER)]
        if not quick or n <= 64
    ]
    for name in {name for name, _, _ in contestants}:
        check_equal(name)
    players = [Player(*contestant) for contestant in contestants]
    rates: list[list[float]] = [[] for _ in players]
    for _ in range(rounds):
        for player, of in zip(players, rates, strict=True):
            of.append(player.rate(0.001 if quick else 0.2))
    return [
        {
            "case": name,
            "shape": (n,),
            "implementation": implementation,
            "steps a second": {"median": statistics.median(of), "slowest": min(of), "fastest": max(of)},
        }
        for (name, n, implementation), of in zip(contestants, rates, strict=True)
    ]


class Player:
    """Plays a world with random actions."""

    def __init__(self, name: str, n: int, implementation: str) -> None:
        import gymnasium

        import hqlt.agent  # noqa: F401  registers the worlds

        how = "sync" if implementation == ONE_BY_ONE else "vector_entry_point"
        self.worlds = gymnasium.make_vec(f"hqlt/{name}-v0", n, vectorization_mode=how)
        self.actions = np.random.default_rng(0)
        self.worlds.reset(seed=0)
        self.ended = np.zeros(n, np.bool_)

    def step(self) -> tuple[Any, Any]:
        actions = self.actions.integers(4, size=self.worlds.num_envs)
        seen, rewards, self.ended, _, _ = self.worlds.step(actions)
        return seen, rewards

    def rate(self, seconds: float) -> float:
        """Steps a second, over at least this many seconds."""
        steps, begin = 0, time.perf_counter()
        while (passed := time.perf_counter() - begin) < seconds or not steps:
            steps += self.worlds.num_envs - int(np.count_nonzero(self.ended))
            self.step()
        return steps / passed


def check_equal(name: str, n: int = 3, steps: int = 100) -> None:
    together, one_by_one = Player(name, n, TOGETHER), Player(name, n, ONE_BY_ONE)
    for step in range(steps):
        pairs = zip(together.step(), one_by_one.step(), strict=True)
        if not all(np.array_equal(a, b) for a, b in pairs):
            raise SystemExit(f"{name}: {n} copies at once differ from single ones at step {step}: nothing to compare")
