"""Stretches of play of equal length, whatever episodes they cut: what on-policy learning reads."""

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
    """A policy that also says what a state is worth."""

    def value(self, inputs: Inputs, state: State) -> Tensor:
        """Inputs of one step of b rows → V [b]; the memory is left as it was."""


class Rollout(NamedTuple):
    """t steps of each of b copies. A row is one copy, going on where its last rollout ended."""

    inputs: Inputs
    """[b, t] what each action was chosen from."""
    state: State
    """The memory before the first step."""
    actions: Tensor
    """[b, t] int64."""
    rewards: Tensor
    """[b, t]."""
    terminated: Tensor
    """Bool [b, t]."""
    ended: Tensor
    """Bool [b, t], by terminating or by being cut short."""
    mask: Tensor
    """Bool [b, t], False where a copy only began its next episode."""
    bootstrap_values: Tensor
    """[b, t] V of what came after an episode cut short, and after the last step; 0 elsewhere."""

    def select(self, rows: Tensor) -> Rollout:
        """Whole sequences, with the memories that they began with."""
        return tree_map(lambda x: x[rows], self)

    def to(self, device: torch.device) -> Rollout:
        return tree_map(lambda x: x.to(device), self)

    def next_values(self, values: Tensor) -> Tensor:
        """V of what each action led to, from V of what each was chosen from."""
        cut = self.ended & ~self.terminated
        cut[:, -1] = True
        return torch.where(cut, self.bootstrap_values, F.pad(values[:, 1:], (0, 1)))


class Collector:
    """Plays without end: memories and unfinished episodes are carried from rollout to rollout.

    gymnasium cannot put an environment aside. So what is carried (`carried`, `resumed`) is the seed of its reset, and
    all actions since: taken again, they lead to where it was.
    """

    def __init__(self, envs: VectorEnv, policy: ActorCritic, seed: int, *, stopped: Sequence[int] = ()) -> None:
        self.player = Player(envs, policy, seed, stopped=stopped)
        self.total = np.zeros(envs.num_envs)
        self.length = np.zeros(envs.num_envs, dtype=np.int64)
        self.seed, self.actions = seed, [torch.empty(0, envs.num_envs, dtype=torch.int64)]
        self.digest = digest_of(self.player.inputs, 0)
        """Of all that was read."""
        self.between = self.player.state, self.digest
        """Between two rollouts."""

    def take(self, actions: Tensor) -> Step:
        """What these actions lead to, noted."""
        step = self.player.take(actions.cpu().numpy())
        self.digest = digest_of(self.player.inputs, self.digest)
        return step

    def carried_state(self) -> dict[str, Tensor]:
        """Of the moment between two rollouts, as tensors."""
        state, digest = self.between
        leaves = {f"{i}": leaf.contiguous().clone() for i, leaf in enumerate(tree_leaves(state))}
        numbers = {"seed": torch.tensor(self.seed), "digest": torch.tensor(digest)}
        return {**leaves, **numbers, "actions": torch.cat(self.actions)}

    @classmethod
    def resume(
        cls, envs: VectorEnv, policy: ActorCritic, carried: Mapping[str, Tensor], *, stopped: Sequence[int] = ()
    ) -> Collector | None:
        """One that resumes from what another carried; None where the environments do not do the same again."""
        if not carried:
            return None
        self = cls(envs, policy, int(carried["seed"]), stopped=stopped)
        for actions in carried["actions"]:
            stop_if_asked(stopped)
            self.count(self.take(actions))
        if self.digest != carried["digest"]:
            return None
        leaves, structure = tree_flatten(self.player.state)
        self.player.state = tree_unflatten(
            [carried[f"{i}"].to(leaf.device) for i, leaf in enumerate(leaves)], structure
        )
        self.between, self.actions = (self.player.state, self.digest), [carried["actions"]]
        return self

    def rollout(self, policy: ActorCritic, steps: int) -> tuple[Rollout, list[Outcome]]:
        player, before = self.player, self.player.state
        read: list[Inputs] = []
        columns: list[tuple[Tensor, ...]] = []
        ended: list[Outcome] = []
        for t in range(steps):
            read.append(player.inputs)
            actions = player.act(policy)
            step = self.take(actions)
            beyond = torch.zeros(len(actions))
            cut = torch.from_numpy(step.truncated & ~step.terminated)
            if cut.any() or t == steps - 1:
                after = Inputs(
                    tree_map(torch.from_numpy, step.successor),
                    actions.cpu(),
                    torch.from_numpy(step.reward),
                    torch.zeros(len(actions), dtype=torch.bool),
                )
                beyond = torch.where(cut | (t == steps - 1), policy.value(after, player.state).cpu(), beyond)
            arrays = step.reward, step.terminated, step.ended, step.live
            columns.append((actions.cpu(), *map(torch.from_numpy, arrays), beyond))
            ended += self.count(step)
        inputs = tree_map(lambda *parts: torch.stack(parts, dim=1), *read)
        self.actions.append(torch.stack([actions for actions, *_ in columns]))
        self.between = player.state, self.digest
        return Rollout(inputs, before, *(torch.stack(parts, dim=1) for parts in zip(*columns, strict=True))), ended

    def count(self, step: Step) -> list[Outcome]:
        """What the episodes that end here came to."""
        self.total += step.reward
        self.length += step.live
        rows = np.flatnonzero(step.ended)
        told = [Outcome(float(self.total[i]), int(self.length[i]), float(step.success[i])) for i in rows]
        self.total[rows], self.length[rows] = 0, 0
        return told


def digest_of(tree: Inputs, before: int) -> int:
    """Of a tree of tensors, and of those before."""
    return reduce(lambda digest, leaf: zlib.crc32(leaf.numpy().tobytes(), digest), tree_leaves(tree), before)
