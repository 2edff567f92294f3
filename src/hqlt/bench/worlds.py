"""Steps per second of the partially observable environments as a user gets them, including the drawing of actions.

Only environment steps that took an action are counted; resets of episodes take time but do not count. All environments
step at once in one thread. They are compared with the same number of single environments in gymnasium's SyncVectorEnv,
after checking that observations and rewards are the same.
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
CAPTION = "steps per second, wall-clock: median of the rounds, and the slowest and fastest round"
TOGETHER, ONE_BY_ONE = "together", "one by one: SyncVectorEnv"


def setting() -> dict[str, Any]:
    """The machine and versions that the results hold for."""
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
        for player, measured in zip(players, rates, strict=True):
            measured.append(player.rate(0.001 if quick else 0.2))
    return [
        {
            "case": name,
            "shape": (n,),
            "implementation": implementation,
            "steps per second": {
                "median": statistics.median(measured),
                "slowest": min(measured),
                "fastest": max(measured),
            },
        }
        for (name, n, implementation), measured in zip(contestants, rates, strict=True)
    ]


class Player:
    """Plays environments with random actions."""

    def __init__(self, name: str, n: int, implementation: str) -> None:
        import gymnasium

        import hqlt.agent  # noqa: F401  registers the environments

        mode = "sync" if implementation == ONE_BY_ONE else "vector_entry_point"
        self.envs = gymnasium.make_vec(f"hqlt/{name}-v0", n, vectorization_mode=mode)
        self.actions = np.random.default_rng(0)
        self.envs.reset(seed=0)
        self.ended = np.zeros(n, np.bool_)

    def step(self) -> tuple[Any, Any]:
        actions = self.actions.integers(4, size=self.envs.num_envs)
        observations, rewards, self.ended, _, _ = self.envs.step(actions)
        return observations, rewards

    def rate(self, seconds: float) -> float:
        """Steps per second, over at least this many seconds."""
        steps, begin = 0, time.perf_counter()
        while (passed := time.perf_counter() - begin) < seconds or not steps:
            steps += self.envs.num_envs - int(np.count_nonzero(self.ended))
            self.step()
        return steps / passed


def check_equal(name: str, n: int = 3, steps: int = 100) -> None:
    """Exit if n environments at once differ from n single ones."""
    together, one_by_one = Player(name, n, TOGETHER), Player(name, n, ONE_BY_ONE)
    for step in range(steps):
        results = zip(together.step(), one_by_one.step(), strict=True)
        if not all(np.array_equal(a, b) for a, b in results):
            raise SystemExit(f"{name}: {n} environments at once differ from single ones at step {step}")
