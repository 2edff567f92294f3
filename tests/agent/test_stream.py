"""What a stream of steps says, by hand, in gymnasium's three autoreset modes."""

from __future__ import annotations

import numpy as np
import pytest
from gymnasium.vector import AutoresetMode

from hqlt.agent.stream import Stream
from tests.agent.worlds_of_one_cue import Counter, Cue, copies

MODES = list(AutoresetMode)


def counters(mode):
    """Two copies, whose episodes last three steps and two."""
    lengths = iter((3, 2))
    return copies(lambda: Counter(next(lengths)), 2, mode)


def run(mode, steps):
    stream = Stream(counters(mode))
    return stream.reset(), [stream.step(np.array([0, 2])) for _ in range(steps)]


def test_a_copy_that_is_reset_on_the_next_step_shows_its_last_observation_first():
    begun, steps = run(AutoresetMode.NEXT_STEP, 5)
    assert begun.tolist() == [100, 100]
    assert [step.observation.tolist() for step in steps] == [[101, 101], [102, 102], [103, 200], [200, 201], [201, 202]]
    assert all((step.successor == step.observation).all() for step in steps)
    assert [step.first.tolist() for step in steps] == [[0, 0], [0, 0], [0, 1], [1, 0], [0, 0]]
    assert [step.live.tolist() for step in steps] == [[1, 1], [1, 1], [1, 0], [0, 1], [1, 1]]
    assert [step.truncated.tolist() for step in steps] == [[0, 0], [0, 1], [1, 0], [0, 0], [0, 1]]
    assert [step.reward.tolist() for step in steps] == [[0, 2], [0, 2], [0, 0], [0, 2], [0, 2]]


@pytest.mark.parametrize("mode", [AutoresetMode.SAME_STEP, AutoresetMode.DISABLED])
def test_a_copy_that_is_reset_in_the_same_step_shows_its_last_observation_aside(mode):
    begun, steps = run(mode, 4)
    assert begun.tolist() == [100, 100]
    assert [step.successor.tolist() for step in steps] == [[101, 101], [102, 102], [103, 201], [201, 202]]
    assert [step.observation.tolist() for step in steps] == [[101, 101], [102, 200], [200, 201], [201, 300]]
    assert [step.first.tolist() for step in steps] == [[0, 0], [0, 1], [1, 0], [0, 1]]
    assert all(step.live.all() for step in steps)
    assert [step.truncated.tolist() for step in steps] == [[0, 0], [0, 1], [1, 0], [0, 1]]


@pytest.mark.parametrize("mode", MODES)
def test_success_is_told_where_an_episode_ends(mode):
    stream = Stream(copies(lambda: Cue((2, 2)), 3, mode))
    cue = (stream.reset(seed=0)[:, 0] > 0).astype(int)
    assert np.isnan(stream.step(cue).success).all()
    cue[0] = 1 - cue[0]
    last = stream.step(cue)
    assert last.success.tolist() == [0, 1, 1]
    assert last.terminated.all() and not last.truncated.any()
    assert np.isnan(stream.step(cue).success).all()


def test_environments_that_do_not_say_how_they_reset_are_refused():
    envs = copies(Cue, 1)
    del envs.metadata["autoreset_mode"]
    with pytest.raises(ValueError, match="autoreset_mode"):
        Stream(envs)
