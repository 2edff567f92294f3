"""Playing: a policy in copies of an environment, its memory carried from step to step, wiped where episodes begin."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._pytree import tree_map

from hqlt.agent.core import Inputs
from hqlt.agent.episode import Episode, Outcome
from hqlt.agent.memory_model import State
from hqlt.agent.observation import Tree
from hqlt.agent.stream import Step, Stream
from hqlt.signals import stop_if_asked


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
    """A policy in all copies: what it reads next, and what it remembers.

    stopped: looked at before each step; once there is anything in it, `step` raises Stopped. `hqlt.signals.stopping`
    gives such a list.
    """

    def __init__(
        self, envs: VectorEnv, policy: Policy, seed: int | None = None, *, stopped: Sequence[int] = ()
    ) -> None:
        self.stream = Stream(envs)
        self.stopped = stopped
        n = self.stream.num_envs
        begins = np.ones(n, dtype=bool)
        self.inputs = read(self.stream.reset(seed), np.zeros(n, dtype=np.int64), np.zeros(n, dtype=np.float32), begins)
        self.state = policy.init_state(n)

    def step(self, policy: Policy, *, greedy: bool = False) -> tuple[Tensor, Step]:
        """One action in every copy → actions [n], what they led to."""
        actions = self.act(policy, greedy=greedy)
        return actions, self.take(actions.cpu().numpy())

    def act(self, policy: Policy, *, greedy: bool = False) -> Tensor:
        """The policy's actions [n], and the memory after what they were chosen from."""
        stop_if_asked(self.stopped)
        actions, self.state = policy.act(self.inputs, self.state, greedy=greedy)
        return actions

    def take(self, actions: NDArray[np.int64]) -> Step:
        """What these actions [n] lead to; the memory stays as it is."""
        step = self.stream.step(actions)
        self.inputs = read(step.observation, actions, step.reward, step.first)
        return step


def read(observation: Tree, action: np.ndarray, reward: np.ndarray, first: np.ndarray) -> Inputs:
    """Inputs of one step; what an episode's first step is told of the one before is nothing."""
    parts = observation, np.where(first, -1, action), np.where(first, 0, reward).astype(np.float32), first
    return Inputs(*tree_map(torch.from_numpy, parts))


def play(
    policy: Policy,
    envs: VectorEnv,
    episodes: int,
    *,
    seed: int | None = None,
    greedy: bool = False,
    stopped: Sequence[int] = (),
) -> list[Episode]:
    """All copies begin anew and play `episodes` whole episodes together, in the order in which they end.

    Each copy plays its share, fixed beforehand: to take the first ones that end would favour short ones.

    stopped: looked at before each step; raises Stopped once there is anything in it. Raises ValueError where an episode
    does not end, or an environment gives what cannot be learned from: see Stream.
    """
    return _play(Player(envs, policy, seed, stopped=stopped), policy, episodes, greedy, observations=True)


def _play(player: Player, policy: Policy, episodes: int, greedy: bool, observations: bool) -> list[Episode]:
    """observations: keep them; otherwise those of an episode are ()."""
    n = player.stream.num_envs
    left = np.array([episodes // n + (row < episodes % n) for row in range(n)])
    begun = np.zeros(n, dtype=np.int64)
    read_so_far: list[Tree] = []
    done: list[tuple[np.ndarray, np.ndarray]] = []
    played: list[Episode] = []
    while left.any():
        read_so_far.append(tree_map(torch.Tensor.numpy, player.inputs.observation) if observations else ())
        begun[player.inputs.resets.numpy()] = len(done)
        actions, step = player.step(policy, greedy=greedy)
        done.append((actions.cpu().numpy(), step.reward))
        last = step.successor if observations else ()
        for row in np.flatnonzero(step.ended & (left > 0)).tolist():
            left[row] -= 1
            since = slice(int(begun[row]), len(done))
            played.append(
                Episode(
                    tree_map(lambda *seen, row=row: np.stack([x[row] for x in seen]), *read_so_far[since], last),
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


def evaluate(
    policy: Policy, envs: VectorEnv, episodes: int = 20, *, seed: int | None = None, stopped: Sequence[int] = ()
) -> Evaluation:
    """Greedy episodes, the memory carried as in collection. Raises what `play` raises."""
    player = Player(envs, policy, seed, stopped=stopped)
    played = _play(player, policy, episodes, greedy=True, observations=False)
    return Evaluation(tuple(episode.outcome for episode in played))
