"""Playing: a policy in parallel environments, its memory carried from step to step and reset at episode starts."""

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
    """Interface of anything that can act."""

    def init_state(self, rows: int) -> State:
        """Return an empty memory for each row."""

    def act(self, inputs: Inputs, state: State, *, greedy: bool = False) -> tuple[Tensor, State]:
        """Choose actions (int64 [b]) from the inputs of one step; returns them and the next state."""


class UniformPolicy:
    """Actions drawn uniformly at random."""

    def __init__(self, actions: int, generator: torch.Generator) -> None:
        self.actions, self.generator = actions, generator

    def init_state(self, rows: int) -> State:
        return ()

    def act(self, inputs: Inputs, state: State, *, greedy: bool = False) -> tuple[Tensor, State]:
        return torch.randint(self.actions, inputs.resets.shape, generator=self.generator), state


class Player:
    """A policy in parallel environments, with its next inputs and its memory.

    Args:
        envs: the parallel environments, which are reset here.
        policy: what acts.
        seed: of the reset; None: the environments' own.
        stopped: list of received signals, as from `hqlt.signals.stopping`; once it is not empty, `step` raises Stopped.
    """

    def __init__(
        self, envs: VectorEnv, policy: Policy, seed: int | None = None, *, stopped: Sequence[int] = ()
    ) -> None:
        self.stream = Stream(envs)
        self.stopped = stopped
        n = self.stream.num_envs
        begins = np.ones(n, dtype=bool)
        self.inputs = make_inputs(
            self.stream.reset(seed), np.zeros(n, dtype=np.int64), np.zeros(n, dtype=np.float32), begins
        )
        self.state = policy.init_state(n)

    def step(self, policy: Policy, *, greedy: bool = False) -> tuple[Tensor, Step]:
        """Act once in every environment; returns the actions [n] and their result."""
        actions = self.act(policy, greedy=greedy)
        return actions, self.take(actions.cpu().numpy())

    def act(self, policy: Policy, *, greedy: bool = False) -> Tensor:
        """Return the policy's actions [n] and update its memory."""
        stop_if_asked(self.stopped)
        actions, self.state = policy.act(self.inputs, self.state, greedy=greedy)
        return actions

    def take(self, actions: NDArray[np.int64]) -> Step:
        """Take these actions [n] in the environments; the memory does not change."""
        step = self.stream.step(actions)
        self.inputs = make_inputs(step.observation, actions, step.reward, step.first)
        return step


def make_inputs(observation: Tree, action: np.ndarray, reward: np.ndarray, first: np.ndarray) -> Inputs:
    """Build the inputs of one step; the first step of an episode has no previous action and reward."""
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
    """Reset the environments and play complete episodes, returned in the order in which they end.

    The number of episodes of each environment is fixed in advance: taking the first ones that end would favor short
    episodes.

    Args:
        policy: an agent, or anything with `init_state` and `act`.
        envs: the parallel environments.
        episodes: total number of episodes.
        seed: of the environments; None: their own.
        greedy: take the most probable actions instead of sampling.
        stopped: list of received signals, checked before each step, as from `hqlt.signals.stopping`.

    Returns:
        The episodes, with all observations.

    Raises:
        Stopped: when `stopped` is not empty.
        ValueError: when an environment does not keep to gymnasium's API, returns NaN, or does not end an episode.

    Example:
        >>> from hqlt.agent import PPO, build_memory, make_worlds, play
        >>> envs = make_worlds("TMazePassive", 4, seed=0, corridor=3)
        >>> agent = PPO(envs, build_memory("lstm", hidden_size=16))
        >>> [episode.length for episode in play(agent, envs, 4, seed=0)]
        [4, 4, 4, 4]
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
    """Outcomes of complete episodes, and their means."""

    outcomes: tuple[Outcome, ...]
    """One per episode, in the order in which they ended."""

    @property
    def mean_return(self) -> float:
        """Mean undiscounted return; NaN if there are no episodes."""
        return mean(outcome.total for outcome in self.outcomes)

    @property
    def mean_length(self) -> float:
        """Mean number of steps; NaN if there are no episodes."""
        return mean(outcome.length for outcome in self.outcomes)

    @property
    def success(self) -> float:
        """Share of successful episodes; NaN if the environment's info has no "success"."""
        return mean(outcome.success for outcome in self.outcomes)


def mean(numbers: Iterable[float]) -> float:
    """Return the mean; NaN if there are no numbers."""
    values = list(numbers)
    return sum(values) / len(values) if values else float("nan")


def evaluate(
    policy: Policy, envs: VectorEnv, episodes: int = 20, *, seed: int | None = None, stopped: Sequence[int] = ()
) -> Evaluation:
    """Play complete greedy episodes without storing observations; the memory is carried as in training.

    Args:
        policy: an agent, or anything with `init_state` and `act`.
        envs: the parallel environments.
        episodes: total number of episodes.
        seed: of the environments; None: their own.
        stopped: as in `play`.

    Returns:
        The outcomes, with mean return, length and success.

    Example:
        >>> from hqlt.agent import PPO, build_memory, evaluate, make_worlds
        >>> envs = make_worlds("TMazePassive", 4, seed=0, corridor=3)
        >>> agent = PPO(envs, build_memory("lstm", hidden_size=16))
        >>> evaluate(agent, envs, episodes=8, seed=0).mean_length
        4.0
    """
    player = Player(envs, policy, seed, stopped=stopped)
    played = _play(player, policy, episodes, greedy=True, observations=False)
    return Evaluation(tuple(episode.outcome for episode in played))
