"""Scores of models."""

from hqlt.evaluate.scores import Score, evaluate

__all__ = ["Score", "evaluate"]
