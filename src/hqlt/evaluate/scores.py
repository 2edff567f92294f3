"""Scores of a model on a batch of a task, as a whole and along the task's coordinate."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hqlt.task import IGNORE, Batch, Task


class Score(NamedTuple):
    metric: str
    """"accuracy", "exact" (chance 0, perfect 1), an agent's "success": higher is better; "bits" per token: lower."""
    value: float
    curve: list[tuple[float, float]]
    """(mean coordinate, score) of bins along the task's coordinate, each with about as many scored tokens."""

    def better_than(self, other: Score) -> bool:
        """A score that is not a number is worse than any other."""
        if math.isnan(self.value) or math.isnan(other.value):
            return math.isnan(other.value) and not math.isnan(self.value)
        return self.value < other.value if self.metric == "bits" else self.value > other.value


@torch.no_grad()
def evaluate(model: nn.Module, task: Task, batch: Batch, *, bins: int = 12, rows_at_once: int = 64) -> Score:
    """Score the model on a batch, some rows at a time."""
    model.eval()
    batch = batch.to(next(model.parameters(), batch.inputs).device)
    outcomes, coordinates = [], []
    for rows in torch.arange(len(batch.inputs)).split(rows_at_once):
        targets = batch.targets[rows]
        asked = targets != IGNORE
        last = int(asked.any(dim=0).nonzero().max()) + 1  # right padding needs no computation
        resets = None if batch.resets is None else batch.resets[rows, :last]
        logits = model(batch.inputs[rows, :last], resets=resets, use_cache=False).logits
        asked = asked[:, :last]
        found, where = outcome(task, logits[asked], targets[:, :last][asked]), batch.coordinate[rows, :last][asked]
        if task.metric == "exact":
            each = asked.sum(dim=1).tolist()
            found = torch.stack([tokens.amin() for tokens in found.split(each)])
            where = torch.stack([tokens[0] for tokens in where.split(each)])
        outcomes.append(found)
        coordinates.append(where)
    outcomes_, coordinates_ = torch.cat(outcomes).cpu(), torch.cat(coordinates).double().cpu()
    order = coordinates_.argsort(stable=True)
    curve = [
        (coordinates_[part].mean().item(), summary(task, outcomes_[part]))
        for part in order.tensor_split(min(bins, len(order)))
    ]
    return Score(task.metric, summary(task, outcomes_), curve)


def outcome(task: Task, logits: Tensor, targets: Tensor) -> Tensor:
    """For each scored token: its bits, or whether it was named right. logits: [n, vocabulary], targets: [n] → [n]."""
    if task.metric == "bits":
        return F.cross_entropy(logits, targets, reduction="none") / math.log(2)
    return (logits.argmax(dim=-1) == targets).float()


def summary(task: Task, outcomes: Tensor) -> float:
    """Mean bits, or normalised accuracy (accuracy − chance) / (1 − chance)."""
    mean = outcomes.double().mean().item()
    return mean if task.metric == "bits" else (mean - task.chance) / (1 - task.chance)
