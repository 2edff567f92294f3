"""PPO with a memory: on-policy, from minibatches of whole sequences."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from gymnasium.vector import VectorEnv
from torch import Tensor

from hqlt.agent.agent import Agent, Progress, means
from hqlt.agent.collect import Evaluation
from hqlt.agent.core import Inputs, mlp
from hqlt.agent.encoder import Encoder
from hqlt.agent.losses import (
    centred,
    clipped_policy_loss,
    entropy,
    generalised_advantages,
    masked_mean,
    of_action,
    standardised,
    value_loss,
)
from hqlt.agent.memory_model import MemoryModel, State
from hqlt.agent.rollout import Collector, Rollout
from hqlt.agent.settings import COUNT, NOT_NEGATIVE, POSITIVE, SHARE, all_in_range
from hqlt.registry import one_of
from hqlt.shapes import Hidden


@dataclass(frozen=True, kw_only=True)
class PPOSettings:
    """Those of Schulman et al. 2017, as they are used today."""

    learning_rate: float = 3e-4
    """Adam's, of everything."""
    discount: float = 0.99
    """γ."""
    trace: float = 0.95
    """λ of the advantages."""
    advantages: Literal["raw", "centred", "standardised"] = "standardised"
    """What a minibatch's advantages become: as they are, less their mean, or with standard deviation 1 as well. Those
    of a policy that has settled are noise, which the last makes as loud as what it learned from: where rewards are of
    the order of 1, better not."""
    clip_ratio: float = 0.2
    """ε: how far the policy may go from the one that played before its gain is cut off."""
    entropy_weight: float = 0.01
    """What an entropy of one nat is worth in the loss."""
    value_weight: float = 0.5
    """What the value's loss weighs."""
    rollout: int = 128
    """Steps of each copy between two updates, and the reach of gradients through time."""
    epochs: int = 4
    """How often a rollout is learned from."""
    minibatches: int = 4
    """Parts of a rollout, of whole sequences: at most as many as there are copies."""
    heads: tuple[int, ...] = (64,)
    """Hidden widths of the actor and of the critic."""
    clip: float | None = 0.5
    """Greatest norm of a gradient; a longer one is shortened to it. None: there is none."""

    def __post_init__(self) -> None:
        one_of("ppo.advantages", self.advantages, ("raw", "centred", "standardised"))
        all_in_range(self, "ppo.", rollout=COUNT, epochs=COUNT, minibatches=COUNT, heads=COUNT)
        all_in_range(self, "ppo.", learning_rate=POSITIVE, clip_ratio=POSITIVE, clip=POSITIVE)
        all_in_range(self, "ppo.", discount=SHARE, trace=SHARE, entropy_weight=NOT_NEGATIVE, value_weight=NOT_NEGATIVE)


class PPO(Agent):
    """PPO: one shared encoder and memory, an actor and a critic on top.

        loss = −mean min(ρ_t A_t, clip(ρ_t, 1 ± ε) A_t) + c_V ½ mean (V_t − R_t)² − c_H mean H_t

    A rollout begins with the memories that the copies had then, and is learned from in whole sequences from these:
    resets within them are where they were in play. What played is π_before of the first pass over the rollout; in later
    passes the carried memories are those of the older weights, as in all recurrent PPO.

    envs: of any number of copies, for their spaces alone. encoder: another one than `build_encoder` makes.
    """

    goes_on_between_rounds = False

    def __init__(
        self,
        envs: VectorEnv,
        memory: MemoryModel,
        settings: PPOSettings | None = None,
        *,
        encoder: Encoder | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(envs, memory, encoder, seed)
        self.settings = settings = settings or PPOSettings()
        self.actor = mlp(memory.hidden_size, settings.heads, self.actions)
        self.critic = mlp(memory.hidden_size, settings.heads, 1)
        self.optimiser = torch.optim.Adam(self.parameters(), settings.learning_rate, eps=1e-5)

    def logits(self, features: Hidden) -> Tensor:
        return self.actor(features)

    @torch.no_grad()
    def value(self, inputs: Inputs, state: State) -> Tensor:
        """Inputs of one step of b rows → V [b]."""
        features, _ = self.core.step(inputs.to(self.device), state)
        return self.critic(features)[:, 0]

    def judged(self, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """The policy's logits [b, t, a] and V [b, t] at every step of a rollout."""
        features, _ = self.core.sequence(rollout.inputs, rollout.state)
        return self.actor(features), self.critic(features)[..., 0]

    def advantages(self, rollout: Rollout, values: Tensor) -> Tensor:
        """[b, t], from V at every step."""
        following, settings = rollout.next_values(values), self.settings
        return generalised_advantages(
            rollout.rewards, values, following, rollout.terminated, rollout.ended, settings.discount, settings.trace
        )

    def learn(self, rollout: Rollout) -> dict[str, float]:
        """`epochs` passes over a rollout."""
        settings, rollout = self.settings, rollout.to(self.device)
        with torch.no_grad():
            logits, values = self.judged(rollout)
            log_pi = of_action(logits.log_softmax(dim=-1), rollout.actions)
            advantages = self.advantages(rollout, values)
            returns = advantages + values
        told = []
        for _ in range(settings.epochs):
            order = torch.randperm(len(log_pi), generator=self.generator).to(self.device)
            for rows in order.chunk(settings.minibatches):
                losses = self.losses(rollout.select(rows), log_pi[rows], advantages[rows], returns[rows])
                norm = self.descend(losses["loss"], settings.clip)
                told.append({name: loss.item() for name, loss in losses.items()} | {"gradient": norm})
        return means(told)

    def losses(self, rollout: Rollout, log_pi_before: Tensor, advantages: Tensor, returns: Tensor) -> dict[str, Tensor]:
        """loss, which an update descends, and its parts."""
        settings, mask = self.settings, rollout.mask
        logits, values = self.judged(rollout)
        log_pi = of_action(logits.log_softmax(dim=-1), rollout.actions)
        if settings.advantages != "raw":
            advantages = (centred if settings.advantages == "centred" else standardised)(advantages, mask)
        policy = clipped_policy_loss(log_pi, log_pi_before, advantages, settings.clip_ratio, mask)
        value, spread = value_loss(values, returns, mask), masked_mean(entropy(logits), mask)
        loss = policy + settings.value_weight * value - settings.entropy_weight * spread
        return {"loss": loss, "policy": policy, "value": value, "entropy": spread}

    def train_in(self, envs: VectorEnv, steps: int, *, stopped: Sequence[int] = ()) -> Iterator[Progress]:
        """Rollouts of all copies, each learned from at once.

        Memories and unfinished episodes go on from rollout to rollout. Each call begins new episodes, by a seed that
        follows from the agent's own and its steps, because gymnasium has no way to put an environment aside. So one
        that is restored between two calls goes on as if nothing had happened.
        """
        collector = Collector(envs, self, self.seed_of(self.steps), stopped=stopped)
        while self.steps < steps:
            rollout, ended = collector.rollout(self, self.settings.rollout)
            losses = self.learn(rollout)
            self.steps += int(rollout.mask.sum())
            yield Progress(int(self.steps), Evaluation(tuple(ended)), losses)
