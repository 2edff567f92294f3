"""Toy environments; most show a cue at the first step that must be named at the last."""

from __future__ import annotations

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode, SyncVectorEnv


class Cue(gymnasium.Env):
    """Observations [cue as ±1, whether this is the last step]; the last action gives 1 if it names the cue, else −1.

    Args:
        lengths: smallest and largest length of an episode.
        cut: episodes are truncated at their end, not terminated.
    """

    def __init__(self, lengths=(4, 4), cut=False):
        self.lengths, self.cut = lengths, cut
        self.observation_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)
        self.action_space = gymnasium.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.cue, self.left = self.np_random.integers(2), self.np_random.integers(self.lengths[0], self.lengths[1] + 1)
        return np.array([2 * self.cue - 1, 0], np.float32), {}

    def step(self, action):
        self.left -= 1
        right = action == self.cue
        reward, info = (0.0, {}) if self.left else (1.0 if right else -1.0, {"success": bool(right)})
        ended = self.left == 0
        return np.array([0, self.left == 1], np.float32), reward, ended and not self.cut, ended and self.cut, info


class Counter(gymnasium.Env):
    """Observations are 100 · episode + step, to be recognized in tests. Episodes of 3 steps are truncated."""

    observation_space = gymnasium.spaces.Box(0, np.inf, (), np.float64)
    action_space = gymnasium.spaces.Discrete(3, start=5)

    def __init__(self, length=3):
        self.length, self.episode = length, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.time = self.episode + 1, 0
        return np.float64(100 * self.episode), {}

    def step(self, action):
        assert action in self.action_space
        self.time += 1
        return np.float64(100 * self.episode + self.time), float(action - 5), False, self.time == self.length, {}


class DictCue(Cue):
    """The same in a nested dictionary: an image, red or blue for the cue, whether it is the last step, and a clock."""

    def __init__(self, lengths=(4, 4), cut=False):
        super().__init__(lengths, cut)
        self.observation_space = gymnasium.spaces.Dict(
            {
                "image": gymnasium.spaces.Box(0, 255, (3, 4, 4), np.uint8),
                "rest": gymnasium.spaces.Tuple(
                    [gymnasium.spaces.MultiBinary(1), gymnasium.spaces.Box(0, 1, (2,), np.float32)]
                ),
                "clock": gymnasium.spaces.Dict({"left": gymnasium.spaces.MultiDiscrete([50, 2])}),
            }
        )

    def reset(self, *, seed=None, options=None):
        (cue, last), info = super().reset(seed=seed)
        return self.nested(cue, last), info

    def step(self, action):
        (cue, last), *rest = super().step(action)
        return self.nested(cue, last), *rest

    def nested(self, cue, last):
        image = np.zeros((3, 4, 4), np.uint8)
        if cue:
            image[0 if cue > 0 else 2] = 255
        left = {"left": np.array([self.left, self.left % 2])}
        return {"image": image, "rest": (np.array([last], np.int8), np.full(2, last, np.float32)), "clock": left}


def sync_envs(make, count, mode=AutoresetMode.NEXT_STEP):
    return SyncVectorEnv([make] * count, autoreset_mode=mode)
