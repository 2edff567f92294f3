"""Episodes are returned unchanged by the replay buffer, and a restored buffer samples the same as the original."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch.utils._pytree import tree_map

from hqlt.agent import Batch, Episode, Replay


def episode(length, number=0, terminated=True):
    return Episode(
        np.full((length + 1, 3, 5, 5), number, dtype=np.uint8),
        np.arange(length),
        np.arange(length, dtype=np.float32) + number,
        terminated,
        float(number % 2),
    )


def test_a_batch_is_padded_and_masked():
    batch = Batch.from_episodes([episode(2, 7), episode(4, 9, terminated=False)])
    assert batch.observations.shape == (2, 5, 3, 5, 5) and batch.observations.dtype == torch.uint8
    assert batch.mask.tolist() == [[True, True, False, False], [True] * 4]
    assert batch.terminated.tolist() == [[False, True, False, False], [False] * 4]
    inputs = batch.inputs()
    assert inputs.previous_action.tolist() == [[-1, 0, 1, 0, 0], [-1, 0, 1, 2, 3]]
    assert inputs.previous_reward.tolist() == [[0, 7, 8, 0, 0], [0, 9, 10, 11, 12]]
    assert inputs.resets.tolist() == [[True, False, False, False, False]] * 2


def test_the_oldest_episodes_are_removed_first():
    replay = Replay(capacity=10)
    for number in range(5):
        replay.add(episode(3, number))
    assert [kept.observations.max() for kept in replay.episodes] == [2, 3, 4] and replay.steps == 9
    replay.add(episode(10, 5))
    assert len(replay) == 1 and replay.steps == 10


def test_invalid_episodes_and_sampling_from_nothing_are_refused():
    replay = Replay(capacity=10)
    with pytest.raises(ValueError, match="1 to 10 steps"):
        replay.add(episode(11))
    with pytest.raises(ValueError, match="add some first"):
        replay.sample(1)


def nested(length, number=0, terminated=True):
    """The same episode with nested observations of several dtypes."""
    plain = episode(length, number, terminated)
    place = np.arange(length + 1, dtype=np.float32) + number
    return plain._replace(observations={"image": plain.observations, "rest": (place, {"0": place.astype(np.int8)})})


@pytest.mark.parametrize("episode", [episode, nested])
@pytest.mark.parametrize("episodes", [0, 6])
@pytest.mark.parametrize("kind", ["npz", "safetensors"])
def test_a_restored_buffer_is_identical(tmp_path, episodes, kind, episode):
    replay = Replay(capacity=20, seed=3)
    for number in range(episodes):
        replay.add(episode(2 + number, number, terminated=number != 4))
        replay.sample(2)
    path = tmp_path / "replay"
    if kind == "npz":
        np.savez(path, **replay.state_dict())
        arrays = np.load(f"{path}.npz", allow_pickle=False)
    else:
        save_file(replay.state_dict(), path)
        arrays = load_file(path)
    restored = Replay(capacity=20, seed=99)
    restored.load_state_dict(arrays)
    assert restored.steps == replay.steps and len(restored) == len(replay)
    replay.add(episode(3, 8)), restored.add(episode(3, 8))
    for _ in range(5):
        got, expected = restored.sample(4), replay.sample(4)
        tree_map(lambda one, other: torch.testing.assert_close(one, other, rtol=0, atol=0), got, expected)
    assert [kept.outcome for kept in restored.episodes] == [kept.outcome for kept in replay.episodes]
