"""Score a model on a batch of a task, in total and along the task's coordinate."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hqlt.task import IGNORE, Batch, Task


class Score(NamedTuple):
    """The score of a model on a task."""

    metric: str
    """"accuracy" (0 is chance, 1 perfect), "exact" or an agent's "success" (higher is better), or "bits" per token
    (lower is better)."""
    value: float
    """The score over the whole batch."""
    curve: list[tuple[float, float]]
    """(mean coordinate, score) of bins along the task's coordinate, each with about the same number of scored tokens.
    """

    def better_than(self, other: Score) -> bool:
        """Whether this score is better than another one. NaN is worse than every number."""
        if math.isnan(self.value) or math.isnan(other.value):
            return math.isnan(other.value) and not math.isnan(self.value)
        return self.value < other.value if self.metric == "bits" else self.value > other.value


@torch.no_grad()
def evaluate(model: nn.Module, task: Task, batch: Batch, *, bins: int = 12, rows_at_once: int = 64) -> Score:
    """Score a model on a batch of a task.

    Args:
        model: a language model that takes `inputs` and `resets`; it is put into evaluation mode.
        task: the task that the batch is from; it defines the metric.
        batch: inputs and targets; moved to the model's device.
        bins: number of points on the score's curve.
        rows_at_once: number of rows per forward pass.

    Returns:
        The score, with its curve along the task's coordinate.

    Example:
        >>> import hqlt
        >>> from hqlt.task import Parity, generator_for
        >>> task = Parity()
        >>> model = hqlt.HQLTForCausalLM(hqlt.preset("tiny", vocab_size=task.vocab_size))
        >>> hqlt.evaluate.evaluate(model, task, task.sample(generator_for("test", 0), 8, "test")).metric
        'accuracy'
    """
    model.eval()
    batch = batch.to(next(model.parameters(), batch.inputs).device)
    outcomes, coordinates = [], []
    for rows in torch.arange(len(batch.inputs)).split(rows_at_once):
        targets = batch.targets[rows]
        scored = targets != IGNORE
        last = int(scored.any(dim=0).nonzero().max()) + 1  # right padding needs no computation
        resets = None if batch.resets is None else batch.resets[rows, :last]
        logits = model(batch.inputs[rows, :last], resets=resets, use_cache=False).logits
        scored = scored[:, :last]
        found, where = outcome(task, logits[scored], targets[:, :last][scored]), batch.coordinate[rows, :last][scored]
        if task.metric == "exact":
            each = scored.sum(dim=1).tolist()
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
    """Score each token: its bits, or 1 if it is predicted correctly and 0 otherwise.

    Args:
        task: defines the metric.
        logits ([n, vocabulary]): predictions.
        targets ([n]): the right tokens.

    Returns:
        [n].
    """
    if task.metric == "bits":
        return F.cross_entropy(logits, targets, reduction="none") / math.log(2)
    return (logits.argmax(dim=-1) == targets).float()


def summary(task: Task, outcomes: Tensor) -> float:
    """Average outcomes to mean bits, or to normalized accuracy (accuracy − chance) / (1 − chance)."""
    mean = outcomes.double().mean().item()
    return mean if task.metric == "bits" else (mean - task.chance) / (1 - task.chance)
