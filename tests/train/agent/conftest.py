import pytest

from hqlt.agent import PPOSettings, SACSettings
from hqlt.train.agent import AgentSettings

SMALL = {
    "options": {"corridor": 3},
    "model": {"hidden_size": 8, "num_layers": 1, "window": 2},
    "steps": 160,
    "evaluate_every": 60,
    "episodes": 4,
}


@pytest.fixture(params=["ppo", "sac"])
def settings(request):
    """A run of a second, by each algorithm."""
    if request.param == "ppo":
        ppo = PPOSettings(rollout=7, heads=(8,), minibatches=2, epochs=2)
        return AgentSettings(**SMALL, algorithm="ppo", copies=4, ppo=ppo)
    sac = SACSettings(heads=(8,), batch_episodes=4, random_episodes=4)
    return AgentSettings(**SMALL, algorithm="sac", copies=2, sac=sac)
