"""Playing: a policy in copies of an environment, its memory carried from step to step, wiped where episodes begin."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, Protocol

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from torch import Tensor

from hqlt.agent.core import Inputs
from hqlt.agent.episode import Episode, Outcome
from hqlt.agent.memory_model import State
from hqlt.agent.stream import Step, Stream


class Policy(Protocol):
    """Anything that acts and remembers."""

    def init_state(self, rows: int) -> State: ...

    def act(self, inputs: Inputs, state: State, *, greedy: bool = False) -> tuple[Tensor, State]:
        """Inputs of one step of b rows → actions int64 [b], state."""


class UniformPolicy:
    """Every action alike."""

    def __init__(self, actions: int, generator: torch.Generator) -> None:
        self.actions, self.generator = actions, generator

    def init_state(self, rows: int) -> State:
        return ()

    def act(self, inputs: Inputs, state: State, *, greedy: bool = False) -> tuple[Tensor, State]:
        return torch.randint(self.actions, inputs.resets.shape, generator=self.generator), state


class Player:
    """A policy in all copies: what it reads next, and what it remembers."""

    def __init__(self, envs: VectorEnv, policy: Policy, seed: int | None = None) -> None:
        self.stream = Stream(envs)
        n = self.stream.copies
        begins = np.ones(n, dtype=bool)
        self.inputs = read(self.stream.reset(seed), np.zeros(n, dtype=np.int64), np.zeros(n, dtype=np.float32), begins)
        self.state = policy.init_state(n)

    def step(self, policy: Policy, *, greedy: bool = False) -> tuple[Tensor, Step]:
        """One action in every copy → actions [n], what they led to."""
        actions, self.state = policy.act(self.inputs, self.state, greedy=greedy)
        taken = actions.cpu().numpy()
        step = self.stream.step(taken)
        self.inputs = read(step.observation, taken, step.reward, step.first)
        return actions, step


def read(observation: np.ndarray, action: np.ndarray, reward: np.ndarray, first: np.ndarray) -> Inputs:
    """Inputs of one step; what an episode's first step is told of the one before is nothing."""
    parts = observation, np.where(first, -1, action), np.where(first, 0, reward).astype(np.float32), first
    return Inputs(*map(torch.from_numpy, parts))


def play(
    policy: Policy, envs: VectorEnv, episodes: int, *, seed: int | None = None, greedy: bool = False
) -> list[Episode]:
    """All copies begin anew and play `episodes` whole episodes together, in the order in which they end.

    Each copy plays its share, fixed beforehand: to take the first ones that end would favour short ones. An environment
    whose episodes have no end needs gymnasium.wrappers.TimeLimit.
    """
    player = Player(envs, policy, seed)
    n = player.stream.copies
    left = np.array([episodes // n + (row < episodes % n) for row in range(n)])
    begun = np.zeros(n, dtype=np.int64)
    read_so_far: list[np.ndarray] = []
    done: list[tuple[np.ndarray, np.ndarray]] = []
    played: list[Episode] = []
    while left.any():
        read_so_far.append(player.inputs.observation.numpy())
        begun[player.inputs.resets.numpy()] = len(done)
        actions, step = player.step(policy, greedy=greedy)
        done.append((actions.cpu().numpy(), step.reward))
        for row in np.flatnonzero(step.ended & (left > 0)):
            left[row] -= 1
            since = slice(int(begun[row]), len(done))
            played.append(
                Episode(
                    np.stack([seen[row] for seen in read_so_far[since]] + [step.successor[row]]),
                    np.stack([action[row] for action, _ in done[since]]),
                    np.stack([reward[row] for _, reward in done[since]]),
                    bool(step.terminated[row]),
                    float(step.success[row]),
                )
            )
    return played


class Evaluation(NamedTuple):
    """What whole episodes came to."""

    outcomes: tuple[Outcome, ...]

    @property
    def mean_return(self) -> float:
        """NaN where no episode ended."""
        return mean(outcome.total for outcome in self.outcomes)

    @property
    def mean_length(self) -> float:
        return mean(outcome.length for outcome in self.outcomes)

    @property
    def success(self) -> float:
        """The share of episodes that succeeded, NaN where the environment's info has no "success"."""
        return mean(outcome.success for outcome in self.outcomes)


def mean(numbers: Iterable[float]) -> float:
    """NaN of none."""
    listed = list(numbers)
    return sum(listed) / len(listed) if listed else float("nan")


def evaluate(policy: Policy, envs: VectorEnv, episodes: int = 20, *, seed: int | None = None) -> Evaluation:
    """Greedy episodes, the memory carried as in collection."""
    return Evaluation(tuple(episode.outcome for episode in play(policy, envs, episodes, seed=seed, greedy=True)))
