"""Training agents: settings, the training loop, checkpoints, evaluation and reports."""

from hqlt.train.agent.settings import AgentSettings
from hqlt.train.agent.trainer import AgentTrainer, Update

__all__ = ["AgentSettings", "AgentTrainer", "Update"]
