import time

import gymnasium
import numpy as np
import pytest

from hqlt.agent import PPOSettings, SACSettings
from hqlt.train.agent import AgentSettings
from tests.toys import agents  # noqa: F401  registers an environment and an algorithm

SMALL = {
    "options": {"corridor": 3},
    "model": {"hidden_size": 8, "num_layers": 1, "window": 2},
    "steps": 160,
    "evaluate_every": 60,
    "episodes": 4,
}


@pytest.fixture(params=["ppo", "sac", "toy-reinforce"])
def settings(request):
    """Settings of a run of a second, for each algorithm."""
    if request.param == "toy-reinforce":
        options = {**SMALL, "env": "Bell", "options": {"wait": 2}, "steps": 400, "evaluate_every": 150}
        return AgentSettings(**options, algorithm=request.param, num_envs=3)
    if request.param == "ppo":
        ppo = PPOSettings(rollout_steps=7, hidden_sizes=(8,), num_minibatches=2, epochs=2)
        return AgentSettings(**SMALL, algorithm="ppo", num_envs=4, hyperparameters=ppo)
    sac = SACSettings(hidden_sizes=(8,), batch_episodes=4, random_episodes=4)
    return AgentSettings(**SMALL, algorithm="sac", num_envs=2, hyperparameters=sac)


class Waiting(gymnasium.Env):
    """An episode ends when the agent leaves (action 1); with a greedy agent that waits it never ends."""

    observation_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)
    action_space = gymnasium.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(2, np.float32), {}

    def step(self, action):
        return np.zeros(2, np.float32), 0.0, bool(action), False, {}


class Slow(Waiting):
    """Episodes of ten steps. After `after` steps of all environments of the process, each step takes `seconds`."""

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
    """An environment with a fault in its third step."""

    def __init__(self, fault):
        self.fault, self.time = fault, 0

    def step(self, action):
        self.time += 1
        observation, reward, *rest = super().step(0)
        if self.time < 3:
            return observation, reward, *rest
        return {
            "observation": lambda: (observation * np.nan, reward, *rest),
            "reward": lambda: (observation, np.inf, *rest),
            "shape": lambda: (np.zeros(3, np.float32), reward, *rest),
            "exception": lambda: {}["door"],
        }[self.fault]()


for kind in (Waiting, Slow, Broken):
    gymnasium.register(f"hqlt-tests/{kind.__name__}-v0", kind, disable_env_checker=True)
