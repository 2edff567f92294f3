"""Training agents: an environment, a memory, an algorithm; checkpoints, evaluation, what is left to look at."""

from hqlt.train.agent.settings import AgentSettings
from hqlt.train.agent.trainer import AgentTrainer, Update

__all__ = ["AgentSettings", "AgentTrainer", "Update"]
