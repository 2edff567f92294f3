"""SAC-Discrete with a memory: off-policy, from whole episodes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from gymnasium.vector import VectorEnv
from torch import Tensor, nn

from hqlt.agent.agent import Agent, Progress, means
from hqlt.agent.collect import Evaluation, Stopped, UniformPolicy, play
from hqlt.agent.core import mlp
from hqlt.agent.encoder import Encoder
from hqlt.agent.episode import Batch
from hqlt.agent.losses import actor_loss, entropy, masked_mean, q_loss, soft_target, temperature_loss
from hqlt.agent.memory_model import MemoryModel
from hqlt.agent.replay import Replay
from hqlt.agent.settings import COUNT, INDEX, PART, POSITIVE, SHARE, all_in_range
from hqlt.shapes import Hidden


@dataclass(frozen=True, kw_only=True)
class SACSettings:
    """The paper's, after Ni et al. 2023."""

    learning_rate: float = 3e-4
    """Adam's, of everything."""
    discount: float = 0.99
    """γ."""
    target_rate: float = 0.005
    """τ: how much of the critics' heads goes into their targets at an update."""
    temperature: float = 0.1
    """α, what an entropy of one nat is worth; where it is learned, what it begins with."""
    entropy_share: float | None = None
    """Learn α so that the policy's entropy is this share of log(actions), the greatest there is; None: α is fixed."""
    heads: tuple[int, ...] = (256, 256)
    """Hidden widths of the actor and of each critic."""
    clip: float | None = None
    """Greatest norm of a gradient; a longer one is shortened to it. None: there is none."""
    batch_episodes: int = 64
    """Episodes in an update."""
    updates_per_step: float = 0.25
    """Updates for each step of the environment."""
    random_episodes: int = 10
    """Episodes played at random before the agent plays."""
    capacity: int = 1_000_000
    """Steps that the replay holds."""

    def __post_init__(self) -> None:
        all_in_range(self, "sac.", batch_episodes=COUNT, random_episodes=INDEX, capacity=COUNT, heads=COUNT)
        all_in_range(
            self, "sac.", learning_rate=POSITIVE, temperature=POSITIVE, updates_per_step=POSITIVE, clip=POSITIVE
        )
        all_in_range(self, "sac.", discount=SHARE, target_rate=PART, entropy_share=SHARE)


class TwinCritics(nn.Module):
    """Two action values, [2, ..., a]: the lesser one is believed."""

    def __init__(self, hidden_size: int, widths: tuple[int, ...], actions: int) -> None:
        super().__init__()
        self.critics = nn.ModuleList(mlp(hidden_size, widths, actions) for _ in range(2))

    def forward(self, features: Hidden) -> Tensor:
        return torch.stack([critic(features) for critic in self.critics])


class SAC(Agent):
    """SAC-Discrete: one shared encoder and memory, an actor and two critics on top.

        critics   ½ mean (Q_i(h_t, a_t) − y_t)²        y_t = r_t + γ (1 − terminated) V̄(h_{t+1})
        actor     mean Σ_a π(a | h_t) (α log π(a | h_t) − min_i Q_i(h_t, a))

    h_t is what the core says after everything up to t. Critics' and actor's losses both train the core; the actor's
    trains no critic. V̄ is the soft value by the targets, which are averages of the critics' heads alone: they read the
    same h as the critics (Ni et al. 2023, "When Do Transformers Shine in RL?").

    envs: of any number of copies, for their spaces alone. encoder: another one than `build_encoder` makes.
    """

    goes_on_between_rounds = True
    rounds: Tensor
    """How often `train_in` has collected."""
    updates: Tensor
    """How often `learn` was called."""

    def __init__(
        self,
        envs: VectorEnv,
        memory: MemoryModel,
        settings: SACSettings | None = None,
        *,
        encoder: Encoder | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(envs, memory, encoder, seed)
        self.settings = settings = settings or SACSettings()
        self.actor = mlp(memory.hidden_size, settings.heads, self.actions)
        self.critics = TwinCritics(memory.hidden_size, settings.heads, self.actions)
        self.targets = TwinCritics(memory.hidden_size, settings.heads, self.actions).requires_grad_(False)
        self.targets.load_state_dict(self.critics.state_dict())
        learned = settings.entropy_share is not None
        self.log_temperature = nn.Parameter(torch.tensor(math.log(settings.temperature)), requires_grad=learned)
        self.optimiser = torch.optim.Adam([p for p in self.parameters() if p.requires_grad], settings.learning_rate)
        self.replay = Replay(settings.capacity, seed)
        self.register_buffer("rounds", torch.zeros((), dtype=torch.long))
        self.register_buffer("updates", torch.zeros((), dtype=torch.long))

    def logits(self, features: Hidden) -> Tensor:
        return self.actor(features)

    def learn(self, batch: Batch) -> dict[str, float]:
        """One update from a batch of whole episodes."""
        losses = self.losses(batch.to(self.device))
        norm = self.descend(losses["critic"] + losses["actor"] + losses["temperature"], self.settings.clip)
        self.track()
        self.updates += 1
        return {name: loss.item() for name, loss in losses.items()} | {"gradient": norm}

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """critic, actor and temperature, which an update descends, and what else is worth knowing."""
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
            settings.discount,
        )
        q = self.critics(features[:, :-1])
        share = settings.entropy_share
        return {
            "critic": q_loss(q[0], batch.actions, target, mask) + q_loss(q[1], batch.actions, target, mask),
            "actor": actor_loss(now, q.amin(0), alpha, mask),
            "temperature": alpha.new_zeros(())
            if share is None
            else temperature_loss(self.log_temperature, now, share * math.log(self.actions), mask),
            "entropy": masked_mean(entropy(now), mask),
            "target": masked_mean(target, mask),
            "alpha": alpha,
        }

    @torch.no_grad()
    def track(self) -> None:
        """Q̄ ← (1 − τ) Q̄ + τ Q."""
        for average, weight in zip(self.targets.parameters(), self.critics.parameters(), strict=True):
            average.lerp_(weight, self.settings.target_rate)

    def train_in(self, envs: VectorEnv, steps: int, *, stopped: Sequence[int] = ()) -> Iterator[Progress]:
        """Rounds: each copy plays one episode from its beginning, then come the updates due for their steps.

        What a round plays depends on its number, the seed and the agent alone, so one that is restored between two
        rounds, with its replay, goes on as if nothing had happened. Where Stopped is raised, the agent is what it was
        before the round.
        """
        settings = self.settings
        random = UniformPolicy(self.actions, self.generator)
        while self.steps < steps:
            known = int(self.rounds) * envs.num_envs >= settings.random_episodes
            before = self.generator.get_state()
            seed = self.seed_of(self.rounds)
            try:
                episodes = play(self if known else random, envs, envs.num_envs, seed=seed, stopped=stopped)
            except Stopped:
                self.generator.set_state(before)
                raise
            for episode in episodes:
                self.replay.add(episode)
            self.rounds += 1
            self.steps += sum(episode.length for episode in episodes)
            told = []
            if int(self.rounds) * envs.num_envs >= settings.random_episodes:
                due = int(settings.updates_per_step * self.steps) - int(self.updates)
                told = [self.learn(self.replay.sample(settings.batch_episodes)) for _ in range(due)]
            yield Progress(int(self.steps), Evaluation(tuple(episode.outcome for episode in episodes)), means(told))
