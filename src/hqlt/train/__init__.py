"""Training: one model on one task within a fixed budget (`fit`), grids of such runs, and language models."""

from hqlt.train.fit import Budget, Fit, Progress, fit

__all__ = ["Budget", "Fit", "Progress", "fit"]
