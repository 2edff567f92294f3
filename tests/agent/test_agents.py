"""PPO and SAC: gradients, exact resume, and that only the carried memory solves a memory task."""

from __future__ import annotations

import math
import os

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from safetensors.torch import load_file, save_file

from hqlt.agent import PPO, SAC, Batch, Episode, MemoryModel, PPOSettings, SACSettings, build_memory, evaluate, play
from tests.agent.toy_envs import Cue, DictCue, sync_envs
from tests.toys.agents import Reinforce, ReinforceSettings

SMALL = SACSettings(hidden_sizes=(16,), batch_episodes=4, random_episodes=4, updates_per_step=0.5)


def sac(settings=SMALL, memory="synchronous", seed=0, make=Cue):
    torch.manual_seed(seed)
    memory = build_memory(memory, hidden_size=8, num_layers=1, window=3)
    return SAC(sync_envs(make, 1), memory, settings, seed=seed)


def episodes(count=3, dtype=np.float32):
    draw = np.random.default_rng(0)
    return [
        Episode(
            draw.normal(size=(n + 1, 2)).astype(dtype),
            draw.integers(2, size=n),
            draw.normal(size=n).astype(dtype),
            n > 2,
            1,
        )
        for n in range(2, 2 + count)
    ]


def gradients(agent, loss):
    agent.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad for name, p in agent.named_parameters() if p.grad is not None and p.grad.any()}


def parts_of(names):
    return {name.split(".")[0] for name in names}


def test_each_loss_trains_only_its_own_parts():
    agent = sac(SACSettings(target_entropy_ratio=0.5))
    losses = agent.losses(Batch.from_episodes(episodes()))
    assert parts_of(gradients(agent, losses["critic"])) == {"core", "critics"}
    losses = agent.losses(Batch.from_episodes(episodes()))
    assert parts_of(gradients(agent, losses["actor"])) == {"core", "actor"}
    losses = agent.losses(Batch.from_episodes(episodes()))
    assert parts_of(gradients(agent, losses["temperature"])) == {"log_temperature"}


def test_losses_do_not_depend_on_the_padding():
    """The loss of a batch is the mean of the losses of its episodes, weighted by their steps."""
    agent = sac().double()
    played = episodes(dtype=np.float64)
    together = agent.losses(Batch.from_episodes(played))
    alone = [(len(episode.actions), agent.losses(Batch.from_episodes([episode]))) for episode in played]
    for name in ("critic", "actor", "entropy", "target"):
        mean = sum(n * losses[name] for n, losses in alone) / sum(n for n, _ in alone)
        torch.testing.assert_close(together[name], mean, rtol=0, atol=1e-6)  # rewards are stored in float32


def test_target_critics_are_moving_averages_of_the_heads():
    agent = sac()
    assert not any(p.requires_grad for p in agent.targets.parameters())
    before = [p.clone() for p in agent.targets.parameters()]
    agent.update(Batch.from_episodes(episodes()))
    for old, average, weight in zip(before, agent.targets.parameters(), agent.critics.parameters(), strict=True):
        torch.testing.assert_close(average, 0.995 * old + 0.005 * weight)
    assert sum(p.numel() for p in agent.targets.parameters()) == sum(p.numel() for p in agent.critics.parameters())


@pytest.mark.parametrize("ratio", [None, 0.1])
def test_alpha_is_fixed_or_learned(ratio):
    agent = sac(SACSettings(target_entropy_ratio=ratio))
    losses = [agent.update(Batch.from_episodes(episodes())) for _ in range(3)]
    assert math.isclose(losses[0]["alpha"], 0.1, rel_tol=1e-6)
    assert (losses[-1]["alpha"] < 0.09999) == (ratio is not None)  # entropy above its target: α falls
    assert (losses[0]["temperature"] != 0) == (ratio is not None)


def weights(agent):
    return torch.cat([x.flatten().double() for x in agent.state_dict().values()])


@pytest.mark.parametrize("make", [Cue, DictCue])
def test_sac_resumes_exactly(tmp_path, make):
    def envs():
        return sync_envs(lambda: make((2, 5)), 4)

    straight = sac(make=make)
    for _ in straight.train_in(envs(), 150):
        pass
    first = sac(make=make)
    for progress in first.train_in(envs(), 60):
        assert progress.steps == first.steps
    save_file(first.checkpoint(), tmp_path / "agent.safetensors")
    second = sac(seed=5, make=make)
    second.restore(load_file(tmp_path / "agent.safetensors"))
    for _ in second.train_in(envs(), 150):
        pass
    assert second.updates == straight.updates > 50
    assert torch.equal(weights(second), weights(straight))


@pytest.mark.parametrize("make", [Cue, DictCue])
def test_ppo_resumes_exactly_between_calls(make):
    def ppo(seed):
        torch.manual_seed(seed)
        memory = build_memory("deltanet", hidden_size=8, num_layers=1)
        settings = PPOSettings(rollout_steps=8, epochs=2, num_minibatches=2)
        return PPO(sync_envs(make, 1), memory, settings, seed=seed)

    first, second = ppo(0), ppo(1)
    for _ in first.train_in(sync_envs(make, 4), 64):
        pass
    second.restore(first.checkpoint())
    for agent in (first, second):
        for _ in agent.train_in(sync_envs(make, 4), 128):
            pass
    assert torch.equal(weights(first), weights(second))


def ppo_of(make, seed=0):
    torch.manual_seed(seed)
    memory = build_memory("synchronous", hidden_size=8, num_layers=1, window=2)
    return PPO(sync_envs(make, 1), memory, PPOSettings(rollout_steps=5, epochs=1, num_minibatches=2), seed=seed)


@pytest.mark.parametrize("mode", list(AutoresetMode))
@pytest.mark.parametrize("make", [Cue, DictCue])
def test_ppo_resumes_unfinished_episodes(tmp_path, make, mode):
    """gymnasium cannot save an environment: it is brought back by repeating the actions since its reset."""

    def envs():
        return sync_envs(lambda: make((2, 9)), 3, mode)

    whole = ppo_of(make)
    reports = []
    for i, progress in enumerate(whole.train_in(envs(), 90)):
        reports.append(progress)
        if i == 2:
            save_file(whole.checkpoint(), tmp_path / "agent.safetensors")
    resumed = ppo_of(make, seed=1)
    resumed.restore(load_file(tmp_path / "agent.safetensors"))
    again = resumed.checkpoint()
    assert all(torch.equal(again[name], saved) for name, saved in load_file(tmp_path / "agent.safetensors").items())
    assert list(resumed.train_in(envs(), 90)) == reports[3:]
    assert torch.equal(weights(resumed), weights(whole))
    assert not whole.carried_state(), "the next call starts new episodes"


class Lottery(Cue):
    """An environment whose randomness does not depend on the seed."""

    def reset(self, *, seed=None, options=None):
        return super().reset(seed=int.from_bytes(os.urandom(4)))


def test_new_episodes_start_if_an_environment_cannot_be_brought_back():
    first, second = ppo_of(Lottery), ppo_of(Lottery, seed=1)
    next(first.train_in(sync_envs(lambda: Lottery((20, 90)), 32), 10_000))
    second.restore(first.checkpoint())
    steps = second.steps.clone()
    next(second.train_in(sync_envs(lambda: Lottery((20, 90)), 32), 10_000))
    assert second.collector.seed == second.derive_seed(steps)


class AlwaysReset(MemoryModel):
    """A memory that is reset before each step."""

    def __init__(self, memory):
        super().__init__()
        self.memory, self.hidden_size = memory, memory.hidden_size

    def init_state(self, rows):
        return self.memory.init_state(rows)

    def sequence(self, x, state, resets):
        return self.memory.sequence(x, state, torch.ones_like(resets))


class ImageCue(Cue):
    """The cue as an image, all red or all blue; later images are black."""

    def __init__(self):
        super().__init__()
        self.observation_space = gymnasium.spaces.Box(0, 255, (3, 4, 4), np.uint8)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        image = self.black()
        image[2 * self.cue] = 255
        return image, {}

    def step(self, action):
        _, *rest = super().step(action)
        return self.black(), *rest

    def black(self):
        return np.zeros((3, 4, 4), np.uint8)


@pytest.mark.parametrize("kind", [SAC, PPO, Reinforce])
def test_images_are_stored_as_uint8_and_train_the_encoder(kind):
    envs = sync_envs(ImageCue, 4)
    agent = kind(envs, build_memory("synchronous", hidden_size=8, num_layers=1, window=2), seed=1)
    (episode, *_) = play(agent, envs, 4)
    assert episode.observations.dtype == np.uint8 and episode.observations.shape == (5, 3, 4, 4)
    before = agent.core.encoder.observation.layers[0].weight.clone()
    reports = [progress.losses for progress in agent.train_in(envs, 100) if progress.losses]
    assert all(math.isfinite(loss) for losses in reports for loss in losses.values())
    assert (agent.core.encoder.observation.layers[0].weight != before).any()


def trained(kind, memory, steps, seed=0, make=Cue):
    torch.manual_seed(seed)
    envs = sync_envs(make, 16)
    settings = {
        SAC: SACSettings(learning_rate=3e-3, batch_episodes=32, hidden_sizes=(32,), updates_per_step=0.1),
        PPO: PPOSettings(learning_rate=3e-3, rollout_steps=32, num_minibatches=2),
        Reinforce: ReinforceSettings(),
    }[kind]
    agent = kind(envs, memory, settings, seed=seed)
    for _ in agent.train_in(envs, steps):
        pass
    return agent


def success(agent):
    return evaluate(agent, sync_envs(Cue, 16), 200, seed=1000).success


@pytest.mark.parametrize("name", ["synchronous", "lstm"])
@pytest.mark.parametrize("kind", [SAC, PPO])
def test_a_memory_solves_a_memory_task(kind, name):
    """A trained agent always names the cue; with its memory reset at each step, only half of the time."""
    agent = trained(kind, build_memory(name, hidden_size=16, num_layers=1, window=2), 12_000)
    assert success(agent) == 1
    agent.core.memory = AlwaysReset(agent.core.memory)
    assert success(agent) < 0.65


def test_a_cue_in_a_dictionary_is_remembered():
    agent = trained(PPO, build_memory("synchronous", hidden_size=16, num_layers=1, window=2), 12_000, make=DictCue)
    assert evaluate(agent, sync_envs(DictCue, 16), 100, seed=1000).success == 1


@pytest.mark.parametrize("kind", [SAC, PPO, Reinforce])
def test_without_a_memory_an_agent_guesses(kind):
    assert success(trained(kind, AlwaysReset(build_memory("synchronous", hidden_size=16, num_layers=1)), 4_000)) < 0.65
