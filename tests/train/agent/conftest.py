import time

import gymnasium
import numpy as np
import pytest

from hqlt.agent import PPOSettings, SACSettings
from hqlt.train.agent import AgentSettings
from tests.toys import agents  # noqa: F401  registers a world and an algorithm from outside

SMALL = {
    "options": {"corridor": 3},
    "model": {"hidden_size": 8, "num_layers": 1, "window": 2},
    "steps": 160,
    "evaluate_every": 60,
    "episodes": 4,
}


@pytest.fixture(params=["ppo", "sac", "toy-reinforce"])
def settings(request):
    """A run of a second, by each algorithm."""
    if request.param == "toy-reinforce":
        options = {**SMALL, "env": "Bell", "options": {"wait": 2}, "steps": 400, "evaluate_every": 150}
        return AgentSettings(**options, algorithm=request.param, num_envs=3)
    if request.param == "ppo":
        ppo = PPOSettings(rollout_steps=7, hidden_sizes=(8,), num_minibatches=2, epochs=2)
        return AgentSettings(**SMALL, algorithm="ppo", num_envs=4, hyperparameters=ppo)
    sac = SACSettings(hidden_sizes=(8,), batch_episodes=4, random_episodes=4)
    return AgentSettings(**SMALL, algorithm="sac", num_envs=2, hyperparameters=sac)


class Waiting(gymnasium.Env):
    """An episode ends when the agent chooses to leave, action 1; a greedy one that waits never does."""

    observation_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)
    action_space = gymnasium.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(2, np.float32), {}

    def step(self, action):
        return np.zeros(2, np.float32), 0.0, bool(action), False, {}


class Slow(Waiting):
    """Episodes of ten steps. After so many steps of all environments of the process, every step takes a while."""

    steps = 0

    def __init__(self, seconds=0.0, after=0, render_mode=None):
        self.seconds, self.after = seconds, after

    def reset(self, *, seed=None, options=None):
        self.time = 0
        return super().reset(seed=seed)

    def step(self, action):
        self.time += 1
        Slow.steps += 1
        if Slow.steps > self.after:
            time.sleep(self.seconds)
        return np.zeros(2, np.float32), float(action), self.time == 10, False, {}


class Broken(Waiting):
    """What an environment of one's own may do wrong in its third step."""

    def __init__(self, fault):
        self.fault, self.time = fault, 0

    def step(self, action):
        self.time += 1
        seen, reward, *rest = super().step(0)
        if self.time < 3:
            return seen, reward, *rest
        return {
            "observation": lambda: (seen * np.nan, reward, *rest),
            "reward": lambda: (seen, np.inf, *rest),
            "shape": lambda: (np.zeros(3, np.float32), reward, *rest),
            "exception": lambda: {}["door"],
        }[self.fault]()


for kind in (Waiting, Slow, Broken):
    gymnasium.register(f"hqlt-tests/{kind.__name__}-v0", kind, disable_env_checker=True)
