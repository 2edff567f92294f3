"""An environment and an algorithm outside the package, each registered in one line."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from gymnasium.spaces import Box

import hqlt
from hqlt.agent import Agent, Batch, Collected, play
from hqlt.agent.core import mlp
from hqlt.agent.losses import entropy, gather_actions, masked_mean, standardised
from hqlt.agent.worlds import World


@hqlt.register("world", "Bell")
class Bell(World):
    """A bell rings high or low at the first step, then `wait` steps are silent; the last action must name the tone.

    Observation, float32 [2]: the tone, ±1 at the first step and 0 from then on; whether this is the last step. Reward
    at the end: 1 for "up" if the tone was high and for "down" if it was low. Success: the same.
    """

    def __init__(self, num_envs: int = 1, *, wait: int = 3, render_mode: str | None = None) -> None:
        self._tone = np.zeros(num_envs, np.int8)
        super().__init__(num_envs, Box(-1, 1, (2,), np.float32), wait + 1, render_mode)

    def _begin(self, env_ids):
        self._tone[env_ids] = 2 * self._streams.below(env_ids, 2) - 1

    def _move(self, actions):
        self._success = (self._time == self.episode_length) & (actions == np.where(self._tone > 0, 0, 1))
        return self._success.astype(float)

    def _observations(self):
        last = self._time == self.episode_length - 1
        return np.stack([self._tone * (self._time == 0), last], axis=1).astype(np.float32)

    def _frames(self):
        """Red for high, blue for low; brighter while the bell rings."""
        frames = np.zeros((self.num_envs, 8, 8, 3), np.uint8)
        frames[self._all, :, :, np.where(self._tone > 0, 0, 2)] = np.where(self._time == 0, 255, 128)[:, None, None]
        return frames


@dataclass(frozen=True, kw_only=True)
class ReinforceSettings:
    learning_rate: float = 1e-2
    """Learning rate of Adam, for all parameters."""
    gamma: float = 0.99
    """Discount factor γ."""
    entropy_coef: float = 0.01
    """Coefficient of the entropy bonus in the loss."""


@hqlt.register("algorithm", "toy-reinforce")
class Reinforce(Agent):
    """−mean Â_t log π(a_t | h_t), where Â are standardized discounted returns of complete episodes. Williams 1992."""

    Settings = ReinforceSettings

    def build(self, width):
        self.actor = mlp(width, (32,), self.actions)
        return torch.optim.Adam(self.parameters(), self.settings.learning_rate)

    def logits(self, features):
        return self.actor(features)

    def collect(self, envs, *, stopped=()):
        episodes = play(self, envs, 2 * envs.num_envs, seed=self.derive_seed(self.steps), stopped=stopped)
        return Collected(
            episodes, [episode.outcome for episode in episodes], sum(episode.length for episode in episodes)
        )

    def learn(self, episodes):
        batch = Batch.from_episodes(episodes).to(self.device)
        features, _ = self.core.sequence(batch.inputs(), self.init_state(len(batch.mask)))
        logits, returns = self.logits(features[:, :-1]), torch.zeros_like(batch.rewards)
        for t in reversed(range(returns.shape[1])):
            ahead = returns[:, t + 1] if t + 1 < returns.shape[1] else 0
            returns[:, t] = batch.rewards[:, t] + self.settings.gamma * ahead
        log_pi = gather_actions(logits.log_softmax(-1), batch.actions)
        policy = -masked_mean(standardised(returns, batch.mask) * log_pi, batch.mask)
        mean_entropy = masked_mean(entropy(logits), batch.mask)
        loss = policy - self.settings.entropy_coef * mean_entropy
        gradient = self.update_weights(loss, 1.0)
        return {"loss": loss.item(), "entropy": mean_entropy.item(), "gradient": gradient}
