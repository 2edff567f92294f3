"""Playing: complete episodes, and a memory that is carried and reset exactly where it must be."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, VectorWrapper

from hqlt.agent import PPO, SAC, Batch, Inputs, build_memory, evaluate, play
from hqlt.agent.collect import Player, UniformPolicy, _play
from hqlt.agent.memory_model import MODELS
from hqlt.agent.rollout import Collector
from hqlt.report.shares import shares_during
from hqlt.signals import Stopped
from tests.agent.toy_envs import Counter, Cue, DictCue, sync_envs

MODES = list(AutoresetMode)


def uniform(actions=3):
    return UniformPolicy(actions, torch.Generator().manual_seed(0))


def agent_of(memory="synchronous", kind=SAC, window=3, make=Cue):
    memory = build_memory(memory, hidden_size=8, num_layers=2, window=window)
    return kind(sync_envs(make, 1), memory).double()


@pytest.mark.parametrize("mode", MODES)
def test_episodes_are_complete(mode):
    lengths = iter((3, 2))
    episodes = play(uniform(), sync_envs(lambda: Counter(next(lengths)), 2, mode), 5)
    assert [episode.length for episode in episodes] == [
        2,
        3,
        2,
        3,
        3,
    ]  # three of the first environment, two of the second
    for episode in episodes:
        first = episode.observations[0]
        assert first % 100 == 0
        assert episode.observations.tolist() == [first + t for t in range(episode.length + 1)]
        assert episode.rewards.tolist() == episode.actions.tolist()
        assert episode.outcome.total == episode.actions.sum()
        assert not episode.terminated and math.isnan(episode.success)


@pytest.mark.parametrize("mode", MODES)
def test_inputs_hold_the_previous_action_and_reward(mode):
    policy = uniform()
    player = Player(sync_envs(Counter, 1, mode), policy)
    before = None
    for _ in range(12):
        inputs = player.inputs
        if inputs.observation % 100 == 0:
            assert inputs.resets.all() and inputs.previous_action == -1 and inputs.previous_reward == 0
        else:
            assert not inputs.resets.any() and inputs.previous_action == before == inputs.previous_reward
        before, _ = player.step(policy)


@pytest.mark.parametrize("memory", MODELS)
@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP])
def test_stepping_and_the_sequence_pass_give_the_same_logits(memory, mode):
    """With resets inside the batch, each episode gives the same logits as on its own."""
    agent = agent_of(memory)
    read, chosen = [], []

    class Recorder:
        init_state = agent.init_state

        def act(self, inputs, state, *, greedy=False):
            read.append(inputs)
            features, after = agent.core.step(inputs, state)
            chosen.append(agent.logits(features))
            return agent.draw(chosen[-1].detach()), after

    player, policy = Player(sync_envs(lambda: Cue((2, 6)), 3, mode), Recorder(), seed=0), Recorder()
    for _ in range(20):
        player.step(policy)
    inputs = Inputs(*(torch.stack(parts, dim=1) for parts in zip(*read, strict=True)))
    assert inputs.resets.sum() > 3
    got = torch.stack(chosen, dim=1)
    in_one_pass = agent.logits(agent.core.sequence(inputs, agent.init_state(3))[0])
    torch.testing.assert_close(got, in_one_pass, rtol=0, atol=1e-10)
    for row in range(3):
        borders = [*inputs.resets[row].nonzero().flatten().tolist(), 20]
        for begin, end in itertools.pairwise(borders):
            apart = Inputs(*(part[row : row + 1, begin:end] for part in inputs))
            alone = agent.logits(agent.core.sequence(apart, agent.init_state(1))[0])
            torch.testing.assert_close(got[row, begin:end], alone[0], rtol=0, atol=1e-10)


@pytest.mark.parametrize("make", [Cue, DictCue])
@pytest.mark.parametrize("kind", [SAC, PPO])
@pytest.mark.parametrize("mode", MODES)
def test_learning_recomputes_the_actions_that_were_taken(kind, mode, make):
    """The greedy actions of stored episodes, computed in a padded batch, are the actions that were taken."""
    agent = agent_of(kind=kind, make=make)
    episodes = play(agent, sync_envs(lambda: make((1, 7), cut=True), 4, mode), 9, seed=3, greedy=True)
    batch = Batch.from_episodes(episodes)
    inputs = batch.inputs()
    actions = agent.logits(agent.core.sequence(inputs, agent.init_state(9))[0]).argmax(-1)[:, :-1]
    assert (actions == batch.actions)[batch.mask].all()
    assert batch.mask.sum() == sum(episode.length for episode in episodes)


@pytest.mark.parametrize("make", [Cue, DictCue])
@pytest.mark.parametrize("mode", MODES)
def test_a_rollout_continues_the_previous_one(mode, make):
    """Two rollouts equal one of their total length: memory, values and outcomes."""
    agent = agent_of(kind=PPO, make=make)
    initial = agent.generator.get_state()

    def collect(lengths):
        agent.generator.set_state(initial)
        collector = Collector(sync_envs(lambda: make((2, 6), cut=True), 3, mode), agent, seed=1)
        return zip(*(collector.rollout(agent, length) for length in lengths), strict=True)

    (first, second), outcomes = collect([7, 9])
    (whole,), (together,) = collect([16])
    assert [*outcomes[0], *outcomes[1]] == together and len(together) > 5
    assert torch.equal(torch.cat([first.actions, second.actions], dim=1), whole.actions)
    logits, values = agent.logits_and_values(whole)
    later = agent.logits_and_values(second)
    torch.testing.assert_close(later[0], logits[:, 7:], rtol=0, atol=1e-10)
    # V after each action: that of the next step, or of the last observation of a truncated episode
    followed, live = whole.next_values(values), whole.mask
    torch.testing.assert_close(first.next_values(values[:, :7])[live[:, :7]], followed[:, :7][live[:, :7]])
    cut = whole.ended & ~whole.terminated
    if mode == AutoresetMode.NEXT_STEP:  # the last observation is also the input of the next step
        torch.testing.assert_close(whole.bootstrap_values[:, :-1][cut[:, :-1]].double(), values[:, 1:][cut[:, :-1]])
        assert (~live).sum() == cut[:, :-1].sum()
    else:
        assert live.all() and (whole.bootstrap_values[cut] != 0).all()


@pytest.mark.parametrize("cut", [True, False])
def test_advantages_do_not_depend_on_the_autoreset_mode(cut):
    """The same episodes in all three modes have the same advantages at every step."""
    agent = agent_of(kind=PPO)

    class Greedy:
        init_state, value = agent.init_state, agent.value

        def act(self, inputs, state, *, greedy=False):
            return agent.act(inputs, state, greedy=True)

    def advantages(mode):
        rollout, _ = Collector(sync_envs(lambda: Cue((2, 6), cut=cut), 3, mode), Greedy(), seed=2).rollout(Greedy(), 40)
        found = agent.advantages(rollout, agent.logits_and_values(rollout)[1].detach())
        until = [int(ended.nonzero().max()) + 1 for ended in rollout.ended]
        return [row[:t][live[:t]] for row, live, t in zip(found, rollout.mask, until, strict=True)]

    for rows in zip(*map(advantages, MODES), strict=True):
        common = min(map(len, rows))
        assert common > 20
        for found in rows[1:]:
            torch.testing.assert_close(
                found[:common], rows[0][:common], rtol=0, atol=1e-6
            )  # rewards are stored in float32


@pytest.mark.parametrize("mode", MODES)
def test_the_number_of_episodes_of_each_environment_is_fixed_in_advance(mode):
    result = evaluate(uniform(2), sync_envs(lambda: Cue((1, 9)), 3, mode), 40, seed=0)
    assert len(result.outcomes) == 40
    lengths = [outcome.length for outcome in result.outcomes]
    assert 4 < np.mean(lengths) < 6 and result.mean_length == np.mean(lengths)
    assert 0.2 < result.success < 0.8 and math.isclose(result.mean_return, 2 * result.success - 1, abs_tol=1e-6)
    again = evaluate(uniform(2), sync_envs(lambda: Cue((1, 9)), 3, mode), 40, seed=0)
    assert result == again


def test_a_stop_takes_effect_before_the_next_step():
    """In collection, evaluation and rollouts alike; the random numbers of an unfinished collection are undone."""
    calls = {
        "play": lambda agent, envs, stopped: play(agent, envs, 4, stopped=stopped),
        "evaluate": lambda agent, envs, stopped: evaluate(agent, envs, 4, stopped=stopped),
        "train": lambda agent, envs, stopped: list(agent.train_in(envs, 10**6, stopped=stopped)),
    }
    for (name, call), kind in itertools.product(calls.items(), (SAC, PPO)):
        stopped, agent = [], agent_of(kind=kind)
        before = agent.generator.get_state()
        envs = Stopper(sync_envs(Cue, 2), stopped)
        with pytest.raises(Stopped):
            call(agent, envs, stopped)
        assert envs.steps == 3
        if (name, kind) == ("train", SAC):
            assert torch.equal(agent.generator.get_state(), before)
            assert agent.steps == agent.rounds == 0


class Stopper(VectorWrapper):
    """Requests a stop in its third step."""

    def __init__(self, envs, stopped):
        super().__init__(envs)
        self.stopped, self.steps = stopped, 0

    def step(self, actions):
        self.steps += 1
        if self.steps == 3:
            self.stopped.append(2)
        return super().step(actions)


def test_evaluation_does_not_store_observations():
    player = Player(sync_envs(DictCue, 2), uniform(2), 0)
    episodes = _play(player, uniform(2), 4, greedy=False, observations=False)
    stored = play(uniform(2), sync_envs(DictCue, 2), 4, seed=0)
    assert [episode.outcome for episode in episodes] == [episode.outcome for episode in stored]
    assert all(episode.observations == () for episode in episodes)


@pytest.mark.parametrize("greedy", [True, False])
def test_divergence_is_reported(greedy):
    agent = agent_of()
    with torch.no_grad():
        agent.actor[0].weight.fill_(math.nan)
    with pytest.raises(ValueError, match=r"expected finite logits, got NaN .* at step 0: training has diverged"):
        play(agent, sync_envs(Cue, 2), 1, greedy=greedy)


def test_shares_of_the_memories_in_an_episode():
    agent = agent_of()
    batch = Batch.from_episodes(play(agent, sync_envs(lambda: Cue((5, 5)), 1), 1))
    shares = shares_during(agent, lambda: agent.core.sequence(batch.inputs(), agent.init_state(1)))
    assert shares.gate.shape == shares.fw.shape == (2, 1, 6)
    assert ((shares.gate > 0) & (shares.gate < 1)).all()
