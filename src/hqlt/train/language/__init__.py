"""Training language models from scratch, with the same loop on a laptop and on many GPUs."""

from hqlt.train.language.settings import TrainSettings
from hqlt.train.language.trainer import LanguageTrainer, Update

__all__ = ["LanguageTrainer", "TrainSettings", "Update"]
