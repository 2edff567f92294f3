import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hqlt.evaluate import evaluate
from hqlt.task import IGNORE, Batch, Parity, StandardLibrary


class Fixed(nn.Module):
    """A model with fixed logits."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, inputs, resets=None, use_cache=True):
        return SimpleNamespace(logits=self.logits[: len(inputs), : inputs.shape[1]])


def batch(targets, coordinate):
    targets = torch.tensor(targets)
    return Batch(torch.zeros_like(targets), targets, torch.tensor(coordinate))


def test_accuracy_is_normalized_by_chance():
    logits = torch.zeros(1, 4, 3)
    logits[..., 1] = 1.0  # predicts 1 everywhere
    score = evaluate(Fixed(logits), Parity(), batch([[1, 1, 1, 2]], [[1, 1, 2, 2]]), bins=2)
    assert score.value == pytest.approx((0.75 - 0.5) / 0.5)
    assert score.curve == [(1.0, 1.0), (2.0, 0.0)]


def test_bits_are_averaged_over_scored_tokens():
    logits = torch.log(torch.tensor([0.5, 0.25, 0.25])).expand(1, 3, 3)
    score = evaluate(Fixed(logits), StandardLibrary(), batch([[0, 1, IGNORE]], [[0, 1, 2]]), bins=1)
    assert score.value == pytest.approx(1.5)
    assert score.better_than(score._replace(value=1.6))
    assert not math.isnan(score.curve[0][1])
