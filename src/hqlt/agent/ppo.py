"""PPO with a memory: on-policy, from minibatches of whole sequences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from gymnasium.vector import VectorEnv
from torch import Tensor

from hqlt.agent.agent import Agent, Collected, Progress, means
from hqlt.agent.core import Inputs, mlp
from hqlt.agent.losses import (
    centred,
    clipped_policy_loss,
    entropy,
    gather_actions,
    generalised_advantages,
    masked_mean,
    standardised,
    value_loss,
)
from hqlt.agent.memory_model import State
from hqlt.agent.rollout import Collector, Rollout
from hqlt.ranges import COUNT, FRACTION, NON_NEGATIVE, POSITIVE, check_ranges
from hqlt.registry import check_choice, register
from hqlt.shapes import Hidden


@dataclass(frozen=True, kw_only=True)
class PPOSettings:
    """Those of Schulman et al. 2017, as they are used today."""

    learning_rate: float = 3e-4
    """Adam's, of everything."""
    gamma: float = 0.99
    """γ."""
    gae_lambda: float = 0.95
    """λ of the advantages."""
    advantages: Literal["raw", "centred", "standardised"] = "standardised"
    """What a minibatch's advantages become: as they are, less their mean, or with standard deviation 1 as well. Those
    of a policy that has settled are noise, which the last makes as loud as what it learned from: where rewards are of
    the order of 1, better not."""
    clip_range: float = 0.2
    """ε: how far the policy may go from the one that played before its gain is cut off."""
    entropy_coef: float = 0.01
    """What an entropy of one nat is worth in the loss."""
    value_coef: float = 0.5
    """What the value's loss weighs."""
    rollout_steps: int = 128
    """Steps of each copy between two updates, and the reach of gradients through time."""
    epochs: int = 4
    """How often a rollout is learned from."""
    num_minibatches: int = 4
    """Parts of a rollout, of whole sequences: at most as many as there are copies."""
    hidden_sizes: tuple[int, ...] = (64,)
    """Hidden widths of the actor and of the critic."""
    max_grad_norm: float | None = 0.5
    """Greatest norm of a gradient; a longer one is shortened to it. None: there is none."""

    def __post_init__(self) -> None:
        check_choice("ppo.advantages", self.advantages, ("raw", "centred", "standardised"))
        check_ranges(self, "ppo.", rollout_steps=COUNT, epochs=COUNT, num_minibatches=COUNT, hidden_sizes=COUNT)
        check_ranges(self, "ppo.", learning_rate=POSITIVE, clip_range=POSITIVE, max_grad_norm=POSITIVE)
        check_ranges(
            self, "ppo.", gamma=FRACTION, gae_lambda=FRACTION, entropy_coef=NON_NEGATIVE, value_coef=NON_NEGATIVE
        )


@register("algorithm", "ppo")
class PPO(Agent):
    """PPO: one shared encoder and memory, an actor and a critic on top.

        loss = −mean min(ρ_t A_t, clip(ρ_t, 1 ± ε) A_t) + c_V ½ mean (V_t − R_t)² − c_H mean H_t

    A rollout begins with the memories that the copies had then, and is learned from in whole sequences from these:
    resets within them are where they were in play. What played is π_before of the first pass over the rollout; in later
    passes the carried memories are those of the older weights, as in all recurrent PPO.
    """

    Settings = PPOSettings
    run_defaults: ClassVar = {"learning_rate": 5e-4, "rollout_steps": 64, "advantages": "centred"}
    settings: PPOSettings
    collector: Collector | None = None
    """Of the call of `train_in` that is under way."""
    _before: Mapping[str, Tensor] | None = None
    """What `collector` carried when the checkpoint was taken that this agent was restored from."""

    def build(self, width: int) -> torch.optim.Optimizer:
        self.actor = mlp(width, self.settings.hidden_sizes, self.actions)
        self.critic = mlp(width, self.settings.hidden_sizes, 1)
        return torch.optim.Adam(self.parameters(), self.settings.learning_rate, eps=1e-5)

    def logits(self, features: Hidden) -> Tensor:
        return self.actor(features)

    @torch.no_grad()
    def value(self, inputs: Inputs, state: State) -> Tensor:
        """Inputs of one step of b rows → V [b]."""
        features, _ = self.core.step(inputs.to(self.device), state)
        return self.critic(features)[:, 0]

    def logits_and_values(self, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """The policy's logits [b, t, a] and V [b, t] at every step of a rollout."""
        features, _ = self.core.sequence(rollout.inputs, rollout.state)
        return self.actor(features), self.critic(features)[..., 0]

    def advantages(self, rollout: Rollout, values: Tensor) -> Tensor:
        """[b, t], from V at every step."""
        following, settings = rollout.next_values(values), self.settings
        return generalised_advantages(
            rollout.rewards, values, following, rollout.terminated, rollout.ended, settings.gamma, settings.gae_lambda
        )

    def learn(self, rollout: Rollout) -> dict[str, float]:
        """`epochs` passes over a rollout."""
        settings, rollout = self.settings, rollout.to(self.device)
        with torch.no_grad():
            logits, values = self.logits_and_values(rollout)
            log_pi = gather_actions(logits.log_softmax(dim=-1), rollout.actions)
            advantages = self.advantages(rollout, values)
            returns = advantages + values
        told = []
        for _ in range(settings.epochs):
            order = torch.randperm(len(log_pi), generator=self.generator).to(self.device)
            for rows in order.chunk(settings.num_minibatches):
                losses = self.losses(rollout.select(rows), log_pi[rows], advantages[rows], returns[rows])
                norm = self.update_weights(losses["loss"], settings.max_grad_norm)
                told.append({name: loss.item() for name, loss in losses.items()} | {"gradient": norm})
        return means(told)

    def losses(self, rollout: Rollout, log_pi_before: Tensor, advantages: Tensor, returns: Tensor) -> dict[str, Tensor]:
        """loss, which an update descends, and its parts."""
        settings, mask = self.settings, rollout.mask
        logits, values = self.logits_and_values(rollout)
        log_pi = gather_actions(logits.log_softmax(dim=-1), rollout.actions)
        if settings.advantages != "raw":
            advantages = (centred if settings.advantages == "centred" else standardised)(advantages, mask)
        policy = clipped_policy_loss(log_pi, log_pi_before, advantages, settings.clip_range, mask)
        value, spread = value_loss(values, returns, mask), masked_mean(entropy(logits), mask)
        loss = policy + settings.value_coef * value - settings.entropy_coef * spread
        return {"loss": loss, "policy": policy, "value": value, "entropy": spread}

    def collect(self, envs: VectorEnv, *, stopped: Sequence[int] = ()) -> Collected:
        """A rollout of all copies. Memories and unfinished episodes are carried from one to the next."""
        if self.collector is None:
            self.collector = Collector.resume(envs, self, self._before or {}, stopped=stopped)
            self._before = None
        if self.collector is None:
            self.collector = Collector(envs, self, self.derive_seed(self.steps), stopped=stopped)
        rollout, ended = self.collector.rollout(self, self.settings.rollout_steps)
        return Collected(rollout, ended, int(rollout.mask.sum()))

    def train_in(self, envs: VectorEnv, steps: int, *, stopped: Sequence[int] = ()) -> Iterator[Progress]:
        """Each call begins new episodes, by a seed that follows from the agent's own and its steps.

        But where the agent was restored from a checkpoint of within a call, the episodes of that call are resumed.
        """
        self.collector = None
        for progress in super().train_in(envs, steps, stopped=stopped):
            if progress.steps >= steps:
                self.collector = None
            yield progress

    def carried_state(self) -> dict[str, Tensor]:
        return dict(self._before or {}) if self.collector is None else self.collector.carried_state()

    def load_carried_state(self, tensors: Mapping[str, Tensor]) -> None:
        self.collector, self._before = None, tensors
