"""Language models from scratch: the same loop on a laptop and on many GPUs."""

from hqlt.train.language.settings import TrainSettings
from hqlt.train.language.trainer import Trainer, Update

__all__ = ["TrainSettings", "Trainer", "Update"]
