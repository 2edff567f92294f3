"""PPO with a memory: on-policy, trained on minibatches of whole sequences."""

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
    """Hyperparameters of PPO, after Schulman et al. 2017 with today's usual values."""

    learning_rate: float = 3e-4
    """Learning rate of Adam, for all parameters."""
    gamma: float = 0.99
    """Discount factor γ."""
    gae_lambda: float = 0.95
    """λ of generalized advantage estimation."""
    advantages: Literal["raw", "centred", "standardised"] = "standardised"
    """Normalization of the advantages in each minibatch: none ("raw"), zero mean ("centred"), or zero mean and standard
    deviation 1 ("standardised"). Standardizing amplifies the noise of a policy that has converged; with rewards of the
    order of 1 prefer one of the others."""
    clip_range: float = 0.2
    """Clip range ε of the probability ratio of new and old policy."""
    entropy_coef: float = 0.01
    """Coefficient of the entropy bonus in the loss."""
    value_coef: float = 0.5
    """Coefficient of the value loss."""
    rollout_steps: int = 128
    """Steps of each environment between updates; also the length of backpropagation through time."""
    epochs: int = 4
    """Passes over each rollout."""
    num_minibatches: int = 4
    """Minibatches per epoch, of whole sequences: at most the number of parallel environments."""
    hidden_sizes: tuple[int, ...] = (64,)
    """Widths of the hidden layers of actor and critic."""
    max_grad_norm: float | None = 0.5
    """Maximum gradient norm; larger gradients are scaled down. None: no limit."""

    def __post_init__(self) -> None:
        check_choice("ppo.advantages", self.advantages, ("raw", "centred", "standardised"))
        check_ranges(self, "ppo.", rollout_steps=COUNT, epochs=COUNT, num_minibatches=COUNT, hidden_sizes=COUNT)
        check_ranges(self, "ppo.", learning_rate=POSITIVE, clip_range=POSITIVE, max_grad_norm=POSITIVE)
        check_ranges(
            self, "ppo.", gamma=FRACTION, gae_lambda=FRACTION, entropy_coef=NON_NEGATIVE, value_coef=NON_NEGATIVE
        )


@register("algorithm", "ppo")
class PPO(Agent):
    """PPO with an encoder and a memory shared by actor and critic.

        loss = −mean min(ρ_t A_t, clip(ρ_t, 1 ± ε) A_t) + c_V ½ mean (V_t − R_t)² − c_H mean H_t

    Each rollout is learned in whole sequences, starting from the memory that the environment's row had at its
    beginning; resets inside it are applied as during play. That initial memory was computed with older weights, as in
    all recurrent PPO.

    The arguments are those of `Agent`, with `PPOSettings` as settings.

    Source:
        Schulman et al. 2017, "Proximal Policy Optimization Algorithms".

    Example:
        >>> from hqlt.agent import PPO, PPOSettings, build_memory, make_worlds
        >>> envs = make_worlds("TMazePassive", 8, seed=0, corridor=3)
        >>> agent = PPO(envs, build_memory("lstm", hidden_size=16), PPOSettings(rollout_steps=16))
        >>> [progress.steps for progress in agent.train_in(envs, steps=200)]
        [104, 208]
    """

    Settings = PPOSettings
    run_defaults: ClassVar = {"learning_rate": 5e-4, "rollout_steps": 64, "advantages": "centred"}
    settings: PPOSettings
    collector: Collector | None = None
    """The collector of the current call of `train_in`."""
    _restored: Mapping[str, Tensor] | None = None
    """State of the collector in the checkpoint from which this agent was restored."""

    def build(self, width: int) -> torch.optim.Optimizer:
        self.actor = mlp(width, self.settings.hidden_sizes, self.actions)
        self.critic = mlp(width, self.settings.hidden_sizes, 1)
        return torch.optim.Adam(self.parameters(), self.settings.learning_rate, eps=1e-5)

    def logits(self, features: Hidden) -> Tensor:
        return self.actor(features)

    @torch.no_grad()
    def value(self, inputs: Inputs, state: State) -> Tensor:
        """Return V [b] from the inputs of one step."""
        features, _ = self.core.step(inputs.to(self.device), state)
        return self.critic(features)[:, 0]

    def logits_and_values(self, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """Return the policy's logits [b, t, a] and V [b, t] at every step of a rollout."""
        features, _ = self.core.sequence(rollout.inputs, rollout.state)
        return self.actor(features), self.critic(features)[..., 0]

    def advantages(self, rollout: Rollout, values: Tensor) -> Tensor:
        """Return the advantages [b, t] from V at every step."""
        following, settings = rollout.next_values(values), self.settings
        return generalised_advantages(
            rollout.rewards, values, following, rollout.terminated, rollout.ended, settings.gamma, settings.gae_lambda
        )

    def learn(self, rollout: Rollout) -> dict[str, float]:
        """Make `epochs` passes over a rollout."""
        settings, rollout = self.settings, rollout.to(self.device)
        with torch.no_grad():
            logits, values = self.logits_and_values(rollout)
            log_pi = gather_actions(logits.log_softmax(dim=-1), rollout.actions)
            advantages = self.advantages(rollout, values)
            returns = advantages + values
        reports = []
        for _ in range(settings.epochs):
            order = torch.randperm(len(log_pi), generator=self.generator).to(self.device)
            for rows in order.chunk(settings.num_minibatches):
                losses = self.losses(rollout.select(rows), log_pi[rows], advantages[rows], returns[rows])
                norm = self.update_weights(losses["loss"], settings.max_grad_norm)
                reports.append({name: loss.item() for name, loss in losses.items()} | {"gradient": norm})
        return means(reports)

    def losses(self, rollout: Rollout, log_pi_before: Tensor, advantages: Tensor, returns: Tensor) -> dict[str, Tensor]:
        """Return the loss of a minibatch and its parts, by name."""
        settings, mask = self.settings, rollout.mask
        logits, values = self.logits_and_values(rollout)
        log_pi = gather_actions(logits.log_softmax(dim=-1), rollout.actions)
        if settings.advantages != "raw":
            advantages = (centred if settings.advantages == "centred" else standardised)(advantages, mask)
        policy = clipped_policy_loss(log_pi, log_pi_before, advantages, settings.clip_range, mask)
        value, mean_entropy = value_loss(values, returns, mask), masked_mean(entropy(logits), mask)
        loss = policy + settings.value_coef * value - settings.entropy_coef * mean_entropy
        return {"loss": loss, "policy": policy, "value": value, "entropy": mean_entropy}

    def collect(self, envs: VectorEnv, *, stopped: Sequence[int] = ()) -> Collected:
        """Collect a rollout. Memories and unfinished episodes are carried from one rollout to the next."""
        if self.collector is None:
            self.collector = Collector.resume(envs, self, self._restored or {}, stopped=stopped)
            self._restored = None
        if self.collector is None:
            self.collector = Collector(envs, self, self.derive_seed(self.steps), stopped=stopped)
        rollout, ended = self.collector.rollout(self, self.settings.rollout_steps)
        return Collected(rollout, ended, int(rollout.mask.sum()))

    def train_in(self, envs: VectorEnv, steps: int, *, stopped: Sequence[int] = ()) -> Iterator[Progress]:
        """Train as `Agent.train_in` describes. Each call starts new episodes.

        After `restore`, the first call resumes the episodes that were in progress when the checkpoint was taken.
        """
        self.collector = None
        for progress in super().train_in(envs, steps, stopped=stopped):
            if progress.steps >= steps:
                self.collector = None
            yield progress

    def carried_state(self) -> dict[str, Tensor]:
        return dict(self._restored or {}) if self.collector is None else self.collector.carried_state()

    def load_carried_state(self, tensors: Mapping[str, Tensor]) -> None:
        self.collector, self._restored = None, tensors
