"""Evaluation of models: scores on tasks, lm-evaluation-harness, long texts, retrieval."""

from hqlt.evaluate.scores import Score, evaluate

__all__ = ["Score", "evaluate"]
