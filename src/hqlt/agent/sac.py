"""SAC-Discrete with a memory: off-policy, trained on complete episodes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from gymnasium.vector import VectorEnv
from torch import Tensor, nn

from hqlt.agent.agent import Agent, Collected, means
from hqlt.agent.collect import UniformPolicy, play
from hqlt.agent.core import mlp
from hqlt.agent.episode import Batch, Episode
from hqlt.agent.losses import actor_loss, entropy, masked_mean, q_loss, soft_target, temperature_loss
from hqlt.agent.replay import Replay
from hqlt.ranges import COUNT, FRACTION, INDEX, POSITIVE, POSITIVE_FRACTION, check_ranges
from hqlt.registry import register
from hqlt.shapes import Hidden


@dataclass(frozen=True, kw_only=True)
class SACSettings:
    """Hyperparameters of SAC-Discrete: the paper's, after Ni et al. 2023."""

    learning_rate: float = 3e-4
    """Learning rate of Adam, for all parameters."""
    gamma: float = 0.99
    """Discount factor γ."""
    tau: float = 0.005
    """Rate τ of the moving average that updates the target critics."""
    alpha: float = 0.1
    """Entropy temperature α; its initial value if it is learned."""
    target_entropy_ratio: float | None = None
    """Learn α such that the entropy is this fraction of its maximum, log(number of actions); None: α is fixed."""
    hidden_sizes: tuple[int, ...] = (256, 256)
    """Widths of the hidden layers of the actor and of each critic."""
    max_grad_norm: float | None = None
    """Maximum gradient norm; larger gradients are scaled down. None: no limit."""
    batch_episodes: int = 64
    """Batch size of an update, in episodes."""
    updates_per_step: float = 0.25
    """Updates per environment step."""
    random_episodes: int = 10
    """Episodes with random actions before learning starts."""
    buffer_size: int = 1_000_000
    """Capacity of the replay buffer, in steps."""

    def __post_init__(self) -> None:
        check_ranges(self, "sac.", batch_episodes=COUNT, random_episodes=INDEX, buffer_size=COUNT, hidden_sizes=COUNT)
        check_ranges(
            self, "sac.", learning_rate=POSITIVE, alpha=POSITIVE, updates_per_step=POSITIVE, max_grad_norm=POSITIVE
        )
        check_ranges(self, "sac.", gamma=FRACTION, tau=POSITIVE_FRACTION, target_entropy_ratio=FRACTION)


class TwinCritics(nn.Module):
    """Two independent estimates of the action values, [2, ..., a]; the smaller one is used."""

    def __init__(self, hidden_size: int, widths: tuple[int, ...], actions: int) -> None:
        super().__init__()
        self.critics = nn.ModuleList(mlp(hidden_size, widths, actions) for _ in range(2))

    def forward(self, features: Hidden) -> Tensor:
        return torch.stack([critic(features) for critic in self.critics])


@register("algorithm", "sac")
class SAC(Agent):
    """SAC-Discrete with an encoder and a memory shared by the actor and two critics.

        critics   ½ mean (Q_i(h_t, a_t) − y_t)²        y_t = r_t + γ (1 − terminated) V̄(h_{t+1})
        actor     mean Σ_a π(a | h_t) (α log π(a | h_t) − min_i Q_i(h_t, a))

    h_t is the output of the core after step t. The losses of critics and actor both train the core; the actor's loss
    does not train the critics. V̄ is the soft value of the target critics, which are moving averages of the critics'
    heads only and read the same h.

    The arguments are those of `Agent`, with `SACSettings` as settings.

    Source:
        Christodoulou 2019, "Soft Actor-Critic for Discrete Action Settings"; Ni et al. 2023, "When Do Transformers
        Shine in RL?".

    Example:
        >>> from hqlt.agent import SAC, SACSettings, build_memory, make_worlds
        >>> envs = make_worlds("TMazePassive", 2, seed=0, corridor=3)
        >>> agent = SAC(envs, build_memory("lstm", hidden_size=16), SACSettings(batch_episodes=8))
        >>> [progress.steps for progress in agent.train_in(envs, steps=24)]
        [8, 16, 24]
    """

    Settings = SACSettings
    run_defaults: ClassVar = {"batch_episodes": 16}
    quick_run_defaults: ClassVar = {"batch_episodes": 2, "random_episodes": 2, "updates_per_step": 0.001}
    settings: SACSettings
    rounds: Tensor
    """Number of collections so far."""
    updates: Tensor
    """Number of updates so far."""

    def build(self, width: int) -> torch.optim.Optimizer:
        settings = self.settings
        self.actor = mlp(width, settings.hidden_sizes, self.actions)
        self.critics = TwinCritics(width, settings.hidden_sizes, self.actions)
        self.targets = TwinCritics(width, settings.hidden_sizes, self.actions).requires_grad_(False)
        self.targets.load_state_dict(self.critics.state_dict())
        learned = settings.target_entropy_ratio is not None
        self.log_temperature = nn.Parameter(torch.tensor(math.log(settings.alpha)), requires_grad=learned)
        self.replay = Replay(settings.buffer_size, int(self.seed))
        for name in ("rounds", "updates"):
            self.register_buffer(name, torch.tensor(0))
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], settings.learning_rate)

    def logits(self, features: Hidden) -> Tensor:
        return self.actor(features)

    def collect(self, envs: VectorEnv, *, stopped: Sequence[int] = ()) -> Collected:
        """Play one complete episode in every environment.

        The result depends only on the number of earlier collections, the seed and the agent.
        """
        policy = (
            self if self.warmed_up(int(self.rounds) * envs.num_envs) else UniformPolicy(self.actions, self.generator)
        )
        episodes = play(policy, envs, envs.num_envs, seed=self.derive_seed(self.rounds), stopped=stopped)
        self.rounds += 1
        outcomes = [episode.outcome for episode in episodes]
        return Collected(episodes, outcomes, sum(episode.length for episode in episodes))

    def learn(self, episodes: Sequence[Episode]) -> dict[str, float]:
        """Store the episodes, and make the updates that are due after the steps so far."""
        for episode in episodes:
            self.replay.add(episode)
        if not self.warmed_up(int(self.rounds) * len(episodes)):
            return {}
        due = int(self.settings.updates_per_step * self.steps) - int(self.updates)
        return means([self.update(self.replay.sample(self.settings.batch_episodes)) for _ in range(due)])

    def warmed_up(self, episodes: int) -> bool:
        """Whether this many episodes complete the phase of random actions."""
        return episodes >= self.settings.random_episodes

    def carried_state(self) -> dict[str, Tensor]:
        return {name: torch.from_numpy(array) for name, array in self.replay.state_dict().items()}

    def load_carried_state(self, tensors: Mapping[str, Tensor]) -> None:
        self.replay.load_state_dict({name: tensor.numpy() for name, tensor in tensors.items()})

    def update(self, batch: Batch) -> dict[str, float]:
        """Make one update from a batch of complete episodes; returns the losses."""
        losses = self.losses(batch.to(self.device))
        norm = self.update_weights(
            losses["critic"] + losses["actor"] + losses["temperature"], self.settings.max_grad_norm
        )
        self.update_targets()
        self.updates += 1
        return {name: loss.item() for name, loss in losses.items()} | {"gradient": norm}

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Return the losses "critic", "actor" and "temperature", and the quantities to report."""
        settings, mask = self.settings, batch.mask
        features, _ = self.core.sequence(batch.inputs(), self.init_state(len(mask)))
        logits = self.actor(features)
        now, alpha = logits[:, :-1], self.log_temperature.detach().exp()
        target = soft_target(
            batch.rewards,
            batch.terminated,
            self.targets(features[:, 1:]).amin(0),
            logits[:, 1:],
            alpha,
            settings.gamma,
        )
        q = self.critics(features[:, :-1])
        ratio = settings.target_entropy_ratio
        return {
            "critic": q_loss(q[0], batch.actions, target, mask) + q_loss(q[1], batch.actions, target, mask),
            "actor": actor_loss(now, q.amin(0), alpha, mask),
            "temperature": alpha.new_zeros(())
            if ratio is None
            else temperature_loss(self.log_temperature, now, ratio * math.log(self.actions), mask),
            "entropy": masked_mean(entropy(now), mask),
            "target": masked_mean(target, mask),
            "alpha": alpha,
        }

    @torch.no_grad()
    def update_targets(self) -> None:
        """Q̄ ← (1 − τ) Q̄ + τ Q."""
        for average, weight in zip(self.targets.parameters(), self.critics.parameters(), strict=True):
            average.lerp_(weight, self.settings.tau)
