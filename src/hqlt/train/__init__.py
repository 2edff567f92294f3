"""Training within fixed budgets."""

from hqlt.train.fit import Budget, Fit, Progress, fit

__all__ = ["Budget", "Fit", "Progress", "fit"]
