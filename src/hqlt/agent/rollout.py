"""Rollouts: the same number of steps from every environment, across episode boundaries, for on-policy learning."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from functools import reduce
from typing import NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from gymnasium.vector import VectorEnv
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from hqlt.agent.collect import Player, Policy
from hqlt.agent.core import Inputs
from hqlt.agent.episode import Outcome
from hqlt.agent.memory_model import State
from hqlt.agent.stream import Step
from hqlt.signals import stop_if_asked


class ActorCritic(Policy, Protocol):
    """Interface of a policy that also estimates values."""

    def value(self, inputs: Inputs, state: State) -> Tensor:
        """Return V [b] from the inputs of one step; the memory is not changed."""


class Rollout(NamedTuple):
    """t steps of each of b environments. Row i continues where row i of the previous rollout ended."""

    inputs: Inputs
    """[b, t] inputs from which each action was chosen."""
    state: State
    """The memory before the first step."""
    actions: Tensor
    """[b, t] int64."""
    rewards: Tensor
    """[b, t]."""
    terminated: Tensor
    """Bool [b, t], True at the last step of an episode that terminated."""
    ended: Tensor
    """Bool [b, t], True at the last step of an episode, terminated or truncated."""
    mask: Tensor
    """Bool [b, t], False where an environment only reset itself."""
    bootstrap_values: Tensor
    """[b, t] V after the last step of a truncated episode and after the rollout's last step; 0 elsewhere."""

    def select(self, rows: Tensor) -> Rollout:
        """Select whole sequences, with their initial memories."""
        return tree_map(lambda x: x[rows], self)

    def to(self, device: torch.device) -> Rollout:
        """Move all tensors to a device."""
        return tree_map(lambda x: x.to(device), self)

    def next_values(self, values: Tensor) -> Tensor:
        """Return V after each action, from V before each action [b, t]."""
        cut = self.ended & ~self.terminated
        cut[:, -1] = True
        return torch.where(cut, self.bootstrap_values, F.pad(values[:, 1:], (0, 1)))


class Collector:
    """Collects rollouts one after another; memories and unfinished episodes are carried from one to the next.

    gymnasium cannot save the state of an environment. `carried_state` therefore holds the seed of the reset and all
    actions since; `resume` brings the environments back by repeating them.

    Args:
        envs: the parallel environments, which are reset here.
        policy: what acts, and estimates values.
        seed: of the reset.
        stopped: as in `play`.
    """

    def __init__(self, envs: VectorEnv, policy: ActorCritic, seed: int, *, stopped: Sequence[int] = ()) -> None:
        self.player = Player(envs, policy, seed, stopped=stopped)
        self.total = np.zeros(envs.num_envs)
        self.length = np.zeros(envs.num_envs, dtype=np.int64)
        self.seed, self.actions = seed, [torch.empty(0, envs.num_envs, dtype=torch.int64)]
        self.digest = crc32(self.player.inputs, 0)
        """Checksum of all inputs so far."""
        self.at_boundary = self.player.state, self.digest
        """Memory and checksum between two rollouts."""

    def take(self, actions: Tensor) -> Step:
        """Take these actions, and update the checksum."""
        step = self.player.take(actions.cpu().numpy())
        self.digest = crc32(self.player.inputs, self.digest)
        return step

    def carried_state(self) -> dict[str, Tensor]:
        """Return the state between two rollouts, as tensors."""
        state, digest = self.at_boundary
        leaves = {f"{i}": leaf.contiguous().clone() for i, leaf in enumerate(tree_leaves(state))}
        numbers = {"seed": torch.tensor(self.seed), "digest": torch.tensor(digest)}
        return {**leaves, **numbers, "actions": torch.cat(self.actions)}

    @classmethod
    def resume(
        cls, envs: VectorEnv, policy: ActorCritic, carried: Mapping[str, Tensor], *, stopped: Sequence[int] = ()
    ) -> Collector | None:
        """Resume from a `carried_state`; None if it is empty, or if the environments behave differently this time."""
        if not carried:
            return None
        self = cls(envs, policy, int(carried["seed"]), stopped=stopped)
        for actions in carried["actions"]:
            stop_if_asked(stopped)
            self.record(self.take(actions))
        if self.digest != carried["digest"]:
            return None
        leaves, structure = tree_flatten(self.player.state)
        self.player.state = tree_unflatten(
            [carried[f"{i}"].to(leaf.device) for i, leaf in enumerate(leaves)], structure
        )
        self.at_boundary, self.actions = (self.player.state, self.digest), [carried["actions"]]
        return self

    def rollout(self, policy: ActorCritic, steps: int) -> tuple[Rollout, list[Outcome]]:
        """Play this many steps in every environment; returns them and the outcomes of the episodes that ended."""
        player, before = self.player, self.player.state
        read: list[Inputs] = []
        columns: list[tuple[Tensor, ...]] = []
        ended: list[Outcome] = []
        for t in range(steps):
            read.append(player.inputs)
            actions = player.act(policy)
            step = self.take(actions)
            bootstrap = torch.zeros(len(actions))
            cut = torch.from_numpy(step.truncated & ~step.terminated)
            if cut.any() or t == steps - 1:
                after = Inputs(
                    tree_map(torch.from_numpy, step.successor),
                    actions.cpu(),
                    torch.from_numpy(step.reward),
                    torch.zeros(len(actions), dtype=torch.bool),
                )
                bootstrap = torch.where(cut | (t == steps - 1), policy.value(after, player.state).cpu(), bootstrap)
            arrays = step.reward, step.terminated, step.ended, step.live
            columns.append((actions.cpu(), *map(torch.from_numpy, arrays), bootstrap))
            ended += self.record(step)
        inputs = tree_map(lambda *parts: torch.stack(parts, dim=1), *read)
        self.actions.append(torch.stack([actions for actions, *_ in columns]))
        self.at_boundary = player.state, self.digest
        return Rollout(inputs, before, *(torch.stack(parts, dim=1) for parts in zip(*columns, strict=True))), ended

    def record(self, step: Step) -> list[Outcome]:
        """Add a step to the running returns and lengths; returns the outcomes of episodes that end with it."""
        self.total += step.reward
        self.length += step.live
        rows = np.flatnonzero(step.ended)
        outcomes = [Outcome(float(self.total[i]), int(self.length[i]), float(step.success[i])) for i in rows]
        self.total[rows], self.length[rows] = 0, 0
        return outcomes


def crc32(tree: Inputs, before: int) -> int:
    """Continue a checksum with the tensors of a tree."""
    return reduce(lambda digest, leaf: zlib.crc32(leaf.numpy().tobytes(), digest), tree_leaves(tree), before)
