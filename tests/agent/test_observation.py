"""Checks of observations against their space, nested or not, and their error messages."""

from __future__ import annotations

import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector.utils import batch_space
from torch.utils._pytree import tree_leaves

from hqlt.agent.observation import InvalidObservation, check_observation_space, checked_observation

IMAGE = spaces.Box(0, 255, (3, 4, 4), np.uint8)
NESTED = spaces.Dict(
    {
        "image": IMAGE,
        "pose": spaces.Tuple([spaces.Box(-1, 1, (2,), np.float32), spaces.Discrete(3, start=-1)]),
        "inventory": spaces.Dict({"slots": spaces.MultiDiscrete([2, 5]), "flags": spaces.MultiBinary(3)}),
    }
)


def sample(space=NESTED, rows=4):
    batched = batch_space(space, rows)
    batched.seed(0)
    return batched.sample()


@pytest.mark.parametrize("space", [IMAGE, NESTED, spaces.Discrete(3), spaces.Box(-1, 1, (), np.float64)])
def test_valid_observations_are_copied(space):
    check_observation_space(space)
    given = sample(space)
    got = checked_observation(space, given, 4)
    assert type(got) is type(given) or isinstance(got, np.ndarray)
    for array, original in zip(tree_leaves(got), tree_leaves(given), strict=True):
        assert array.dtype == np.asarray(original).dtype and np.array_equal(array, original)
        assert not np.shares_memory(array, original)


def test_wider_dtypes_of_the_same_kind_are_converted():
    space = spaces.Box(-1, 1, (2,), np.float32)
    assert checked_observation(space, np.ones((3, 2), np.float64), 3).dtype == np.float32
    with pytest.raises(InvalidObservation, match=r"observation\[0\]: expected finite numbers, got inf"):
        checked_observation(space, np.full((3, 2), 1e300), 3)


def changed(place, value):
    """The sample with one entry changed."""
    given = sample()
    entry = given
    for key in place[:-1]:
        entry = entry[key]
    if isinstance(entry, tuple):
        index = place[-1]
        return given | {"pose": (*entry[:index], value, *entry[index + 1 :])}
    entry[place[-1]] = value
    return given


def with_nan():
    numbers = np.zeros((4, 2), np.float32)
    numbers[2, 1] = np.nan
    return numbers


@pytest.mark.parametrize(
    ("given", "message", "env"),
    [
        (changed(["pose", 0], with_nan()), r"observation\['pose'\]\[0\]\[1\]: expected finite numbers, got nan", 2),
        (changed(["pose", 1], np.array([-1, 0, 1, 2])), r"observation\['pose'\]\[1\]: expected -1 … 1, got 2", 3),
        (changed(["inventory", "slots"], np.full((4, 2), 3)), r"\['slots'\]\[0\]: expected a value of .*, got 3", 0),
        (changed(["image"], np.zeros((4, 3, 4, 4))), r"\['image'\]: expected uint8, the dtype .*, got float64", None),
        (changed(["image"], np.zeros((4, 4, 4, 3), np.uint8)), r"shape \[4, 3, 4, 4\], got \[4, 4, 4, 3\]", None),
        (changed(["pose"], 3), r"\['pose'\]: expected entries \[0, 1\], got int", None),
        ({"image": 0}, r"observation: expected entries \[.*\], got \['image'\]", None),
    ],
)  # fmt: skip
def test_invalid_observations_are_named(given, message, env):
    with pytest.raises(InvalidObservation, match=message) as caught:
        checked_observation(NESTED, given, 4)
    assert caught.value.env == env


def test_spaces_without_arrays_are_refused_and_named():
    with pytest.raises(ValueError, match=r"observation_space\['said'\]\[1\]: expected Box, .*FilterObservation"):
        check_observation_space(spaces.Dict({"seen": IMAGE, "said": spaces.Tuple([IMAGE, spaces.Text(5)])}))
    with pytest.raises(ValueError, match=r"observation_space: expected at least one entry"):
        check_observation_space(spaces.Dict({}))
