"""A cell of a study that trains an agent, and one that tests another cell's agent with a retention enabled."""

import torch
from safetensors.torch import load_file

from hqlt.layer import HybridMemory
from hqlt.train.agent.cell import AgentBudget, AgentCell
from hqlt.train.agent.run import load_agent
from tests.cells import switched_after_training

COMMON = {
    "config": {"memory": "synchronous", "hidden_size": 8, "num_heads": 2, "num_layers": 1, "window": 4},
    "task": "TMazePassive",
    "task_options": {"corridor": 3},
    "budget": AgentBudget(
        steps=128, num_envs=4, evaluations=2, episodes=4, test_episodes=4, along={"corridor": [3, 9]}
    ),
}
PLAIN = AgentCell(model="Window", **COMMON)
SWITCHED = AgentCell(
    model="Surprise", trained_as="Window", switched={"retention": "surprise", "window": 2, "kept": 2}, **COMMON
)


def test_an_agent_may_be_tested_with_a_retention_enabled_after_training(tmp_path):
    """The weights are those of the other cell, which is trained first if necessary."""

    result, _ = switched_after_training(SWITCHED, PLAIN, tmp_path)
    assert [at for at, _ in result.fit.test.curve] == [3.0, 9.0]
    models = tmp_path / "both" / "models"
    mine, theirs = (load_file(models / cell.name / "agent.safetensors") for cell in (SWITCHED, PLAIN))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    (layer,) = (part for part in load_agent(models / SWITCHED.name).agent.modules() if isinstance(part, HybridMemory))
    assert (layer.kv.kept, layer.blend.window) == (2, 2)
