"""Training one model on one task within a fixed budget, with selection on the validation set and one test."""

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
from hqlt.task import IGNORE, Batch, Task, VariableLengthTask, generator_for
from hqlt.train.schedule import warmup_then_cosine


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The training budget, which is the same for all models of a comparison."""

    steps: int
    """Number of optimizer updates."""
    batch_size: int
    """Sequences per update."""
    learning_rate: float = 1e-2
    """Peak learning rate; the schedule is linear warmup, then cosine decay."""
    warmup_ratio: float = 0.1
    """Warmup length as a share of the steps."""
    min_lr_ratio: float = 0.001
    """Final learning rate as a share of the peak."""
    weight_decay: float = 0.0
    """AdamW weight decay of linear layers; norms and embeddings are not decayed."""
    max_grad_norm: float = 1.0
    """Maximum gradient norm; larger gradients are scaled down."""
    ema_decay: float = 0.0
    """Decay of an exponential moving average of the weights, which is evaluated and saved instead of them; 0: none."""
    curriculum: float = 0.0
    """Share of the steps over which the maximum training length grows from the minimum to its full value; 0: none."""
    pack: bool = False
    """Whether two training sequences are packed into each row, with a reset between them: less padding, same loss."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Precision of the activations; weights and updates are float32."""
    validations: int = 10
    """Number of evaluations on the validation set, evenly spaced over the steps."""
    validation_rows: int = 128
    """Number of validation sequences."""
    test_rows: int = 512
    """Number of test sequences."""

    def __post_init__(self) -> None:
        check_ranges(self, steps=COUNT, batch_size=COUNT, validations=COUNT, validation_rows=COUNT, test_rows=COUNT)
        check_ranges(self, learning_rate=POSITIVE, max_grad_norm=POSITIVE, weight_decay=NON_NEGATIVE)
        check_ranges(self, warmup_ratio=FRACTION, min_lr_ratio=FRACTION, ema_decay=FRACTION, curriculum=FRACTION)

    def learning_rate_at(self, step: int) -> float:
        """The learning rate at a step, counted from 0."""
        warm = max(round(self.warmup_ratio * self.steps), 1)
        return self.learning_rate * warmup_then_cosine(
            step, warmup_steps=warm, steps=self.steps, min_ratio=self.min_lr_ratio
        )

    def task_at(self, task: Task, step: int) -> Task:
        """The task with the training lengths of a step, counted from 0."""
        grows_until = round(self.curriculum * self.steps)
        if step >= grows_until:
            return task
        if not isinstance(task, VariableLengthTask):
            raise ValueError(f"curriculum: expected 0 for a task whose lengths do not grow, got {self.curriculum}")
        shortest, longest = task.train_lengths
        reached = shortest + math.ceil((longest - shortest) * (step + 1) / grows_until)
        return dataclasses.replace(task, train_lengths=(shortest, reached))

    def ema_decay_at(self, step: int) -> float:
        """The decay at a step, counted from 0. It is smaller at the beginning."""
        return min(self.ema_decay, (step + 1) / (step + 10))


class Progress(NamedTuple):
    """The state of a training run after an update."""

    step: int
    """Number of updates so far."""
    loss: float
    """Training loss, nats per scored token."""
    gradient_norm: float
    """Gradient norm before clipping."""
    seconds: float
    """Time since the start of training."""
    tokens: int
    """Training tokens so far."""
    validation: float | None
    """The validation score; None at steps without validation."""
    skipped: int = 0
    """Number of updates skipped so far because their gradient was not finite."""


class Fit(NamedTuple):
    """The result of a training run."""

    best_step: int
    """The step with the best validation score, whose weights are kept."""
    validation: Score
    """The validation score at that step."""
    test: Score
    """The test score of those weights."""


def fit(model: nn.Module, task: Task, budget: Budget, seed: int) -> Iterator[Progress | Fit]:
    """Train a model on a task.

    The weights with the best validation score are loaded into the model at the end and tested once. Updates whose
    gradient is not finite are skipped and counted. Validation and test sets are the same for all models and seeds.

    Args:
        model: a causal language model with the interface of transformers, on the device to train on.
        task: generates the sequences.
        budget: steps, batch size and optimizer settings.
        seed: determines the training data.

    Returns:
        An iterator that performs one update at a time and yields its `Progress`; the last item is the `Fit`.

    Example:
        >>> from hqlt.model import HQLTForCausalLM, preset
        >>> from hqlt.task import Parity
        >>> from hqlt.train import Budget, fit
        >>> model, task = HQLTForCausalLM(preset("tiny", num_hidden_layers=1, vocab_size=Parity().vocab_size)), Parity()
        >>> budget = Budget(steps=2, batch_size=4, validations=1, validation_rows=8, test_rows=8)
        >>> [type(item).__name__ for item in fit(model, task, budget, seed=0)]
        ['Progress', 'Progress', 'Fit']
    """
    device = next(model.parameters()).device
    optimiser = torch.optim.AdamW(parameter_groups(model, budget.weight_decay), lr=budget.learning_rate)
    source = generator_for("train", seed)
    validation_set = task.sample(generator_for("validation", 0), budget.validation_rows, "validation")
    validate_at = {round(budget.steps * (i + 1) / budget.validations) for i in range(budget.validations)}
    ema = averaged(model, budget) if budget.ema_decay else None
    scored = ema.module if ema else model
    best_step, best, best_weights = 0, None, dict[str, Tensor]()
    tokens, skipped, start = 0, 0, time.perf_counter()
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
        if ema:
            ema.update_parameters(model)
        tokens += batch.inputs.numel()
        score = None
        if step + 1 in validate_at:
            score = evaluate(scored, task, validation_set)
            if best is None or score.better_than(best):
                best_step, best = step + 1, score
                best_weights = {name: weight.detach().clone() for name, weight in scored.state_dict().items()}
        seconds = time.perf_counter() - start
        yield Progress(step + 1, loss.item(), norm.item(), seconds, tokens, score.value if score else None, skipped)
    assert best is not None
    model.load_state_dict(best_weights)
    test_set = task.sample(generator_for("test", 0), budget.test_rows, "test")
    yield Fit(best_step, best, evaluate(model, task, test_set))


def averaged(model: nn.Module, budget: Budget) -> AveragedModel:
    """The moving average ā ← decay · ā + (1 − decay) · a of the weights a, starting from the initial weights."""
    ema = AveragedModel(model, avg_fn=lambda mean, weight, n: mean.lerp(weight, 1 - budget.ema_decay_at(int(n) - 1)))
    ema.n_averaged += 1  # otherwise the first update would be copied
    return ema


def loss_of(model: nn.Module, batch: Batch, precision: str = "float32") -> Tensor:
    """Mean cross-entropy over the scored tokens, in nats."""
    with torch.autocast(batch.inputs.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        logits = model(batch.inputs, resets=batch.resets, use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORE)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """AdamW parameter groups: weight decay for linear layers; none for norms, convolutions and embeddings."""
    linear = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    linear -= {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}  # a tied head
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in parameters if id(p) in linear], "weight_decay": weight_decay},
        {"params": [p for p in parameters if id(p) not in linear], "weight_decay": 0.0},
    ]
