"""Training one model on one task within a fixed budget: select on validation, test once."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from hqlt.evaluate.scores import Score, evaluate
from hqlt.ranges import COUNT, FRACTION, NON_NEGATIVE, POSITIVE, check_ranges
from hqlt.task import IGNORE, Batch, Growing, Task, generator_for
from hqlt.train.schedule import warmup_then_cosine


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What every model of a comparison gets alike."""

    steps: int
    """Updates."""
    batch_size: int
    """Sequences in an update."""
    learning_rate: float = 1e-2
    """Peak of the schedule: linear warm-up, then a cosine."""
    warmup_ratio: float = 0.1
    """Share of the steps that the learning rate takes to its peak."""
    min_lr_ratio: float = 0.001
    """What the learning rate falls to at the end, as a share of its peak."""
    weight_decay: float = 0.0
    """AdamW's, on matrices; norms and embeddings have none."""
    max_grad_norm: float = 1.0
    """Greatest norm of a gradient; a longer one is shortened to it."""
    ema_decay: float = 0.0
    """Decay of an exponential average of the weights, which is scored and kept in their place; 0: none."""
    curriculum: float = 0.0
    """Share of the steps over which the greatest training length grows from the least to its own; 0: none."""
    pack: bool = False
    """Whether two training sequences share a row, with a reset between them: half the padding, the same loss."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the activations; weights and their updates are float32."""
    validations: int = 10
    """How often a checkpoint is scored on the validation set, evenly over the steps."""
    validation_rows: int = 128
    """Sequences in the validation set."""
    test_rows: int = 512
    """Sequences in the test set."""

    def __post_init__(self) -> None:
        check_ranges(self, steps=COUNT, batch_size=COUNT, validations=COUNT, validation_rows=COUNT, test_rows=COUNT)
        check_ranges(self, learning_rate=POSITIVE, max_grad_norm=POSITIVE, weight_decay=NON_NEGATIVE)
        check_ranges(self, warmup_ratio=FRACTION, min_lr_ratio=FRACTION, ema_decay=FRACTION, curriculum=FRACTION)

    def learning_rate_at(self, step: int) -> float:
        """step counts from 0."""
        warm = max(round(self.warmup_ratio * self.steps), 1)
        return self.learning_rate * warmup_then_cosine(
            step, warmup_steps=warm, steps=self.steps, min_ratio=self.min_lr_ratio
        )

    def task_at(self, task: Task, step: int) -> Task:
        """The task with the training lengths of this step."""
        grows_until = round(self.curriculum * self.steps)
        if step >= grows_until:
            return task
        if not isinstance(task, Growing):
            raise ValueError(f"curriculum: expected 0 for a task whose lengths do not grow, got {self.curriculum}")
        shortest, longest = task.train_lengths
        reached = shortest + math.ceil((longest - shortest) * (step + 1) / grows_until)
        return dataclasses.replace(task, train_lengths=(shortest, reached))

    def average_decay_at(self, step: int) -> float:
        """step counts from 0. Early weights are forgotten sooner."""
        return min(self.ema_decay, (step + 1) / (step + 10))


class Progress(NamedTuple):
    """What is known after an update."""

    step: int
    """Updates done."""
    loss: float
    gradient_norm: float
    """Before clipping."""
    seconds: float
    """Since training began."""
    tokens: int
    """Seen so far."""
    validation: float | None
    """The validation score, at the steps where it was taken."""
    skipped: int = 0
    """Updates so far whose gradient was not finite: they changed nothing."""


class Fit(NamedTuple):
    best_step: int
    validation: Score
    test: Score


def fit(model: nn.Module, task: Task, budget: Budget, seed: int) -> Iterator[Progress | Fit]:
    """Train, and yield Progress after each update; last, with the best checkpoint's weights loaded, the Fit.

    model: a causal language model of transformers' form, on the device that is to train it. An update whose gradient
    is not finite is skipped and counted. The training data depends on the seed alone, validation and test sets on
    nothing: they are the same for all.
    """
    device = next(model.parameters()).device
    optimiser = torch.optim.AdamW(parameter_groups(model, budget.weight_decay), lr=budget.learning_rate)
    source = generator_for("train", seed)
    validation_set = task.sample(generator_for("validation", 0), budget.validation_rows, "validation")
    validate_at = {round(budget.steps * (i + 1) / budget.validations) for i in range(budget.validations)}
    average = averaged(model, budget) if budget.ema_decay else None
    scored = average.module if average else model
    best_step, best, best_weights = 0, None, dict[str, Tensor]()
    tokens, skipped, begun = 0, 0, time.perf_counter()
    for step in range(budget.steps):
        batch = budget.task_at(task, step).sample(source, budget.batch_size, "train")
        batch = (batch.packed() if budget.pack else batch).to(device)
        for group in optimiser.param_groups:
            group["lr"] = budget.learning_rate_at(step)
        model.train()
        loss = loss_of(model, batch, budget.precision)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), budget.max_grad_norm)
        if norm.isfinite():
            optimiser.step()
        else:
            skipped += 1
        if average:
            average.update_parameters(model)
        tokens += batch.inputs.numel()
        score = None
        if step + 1 in validate_at:
            score = evaluate(scored, task, validation_set)
            if best is None or score.better_than(best):
                best_step, best = step + 1, score
                best_weights = {name: weight.detach().clone() for name, weight in scored.state_dict().items()}
        seconds = time.perf_counter() - begun
        yield Progress(step + 1, loss.item(), norm.item(), seconds, tokens, score.value if score else None, skipped)
    assert best is not None
    model.load_state_dict(best_weights)
    test_set = task.sample(generator_for("test", 0), budget.test_rows, "test")
    yield Fit(best_step, best, evaluate(model, task, test_set))


def averaged(model: nn.Module, budget: Budget) -> AveragedModel:
    """ā ← decay · ā + (1 − decay) · a at each update, from the first weights on."""
    average = AveragedModel(
        model, avg_fn=lambda kept, weight, n: kept.lerp(weight, 1 - budget.average_decay_at(int(n) - 1))
    )
    average.n_averaged += 1  # otherwise the first update would be copied
    return average


def loss_of(model: nn.Module, batch: Batch, precision: str = "float32") -> Tensor:
    """Mean cross-entropy in nats over the scored tokens."""
    with torch.autocast(batch.inputs.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        logits = model(batch.inputs, resets=batch.resets, use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORE)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Matrices decay; norms, convolutions and embeddings do not."""
    linear = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    linear -= {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}  # a tied head
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in parameters if id(p) in linear], "weight_decay": weight_decay},
        {"params": [p for p in parameters if id(p) not in linear], "weight_decay": 0.0},
    ]
