"""The cell of a grid that trains a language model on a task."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from hqlt.evaluate import evaluate
from hqlt.layer import HybridMemory, with_retention
from hqlt.registry import build
from hqlt.task import Task, generator_for
from hqlt.train.fit import Budget, Progress, fit
from hqlt.train.grid import Cell, Event, Result, load_result


@dataclass(frozen=True, kw_only=True)
class TaskCell(Cell):
    """A model trained on a task. `config` has fields of HQLTConfig; the task determines the vocabulary size."""

    unit = "tokens"
    loss_unit = "nats"

    budget: Budget

    @property
    def metric(self) -> str:
        return self.build_task().metric

    @property
    def coordinate_name(self) -> str | None:
        return self.build_task().coordinate_name

    def build_task(self) -> Task:
        task: Task = build("task", self.task, **self.task_options)
        return task

    def run(self, folder: Path, device: str = "cpu") -> Iterator[Event | Result]:
        from transformers.utils import logging

        from hqlt.model import HQLTConfig, HQLTForCausalLM

        logging.disable_progress_bar()  # of saving a small model
        task = self.build_task()
        done = load_result(folder, self.trained) if self.trained_as else None
        if done is not None:
            model = HQLTForCausalLM.from_pretrained(folder / "models" / self.trained.name)
        else:
            torch.manual_seed(self.seed)
            model = HQLTForCausalLM(HQLTConfig(**self.config, vocab_size=task.vocab_size))
        torch.nn.Module.to(model, device)
        history, fitted = (done.history, done.fit) if done else ([], None)
        for item in () if done else fit(model, task, self.budget, self.seed):
            if isinstance(item, Progress):
                event = Event(self, item)
                if event.in_history:
                    history.append(item)
                yield event
            else:
                fitted = item
        assert fitted is not None, "fit ends with it"
        if self.switched:
            model = with_retention(model, **self.switched)
            test_set = task.sample(generator_for("test", 0), self.budget.test_rows, "test")
            fitted = fitted._replace(test=evaluate(model, task, test_set))
        model.save_pretrained(folder / "models" / self.name)
        size, state = model.num_parameters(), state_bytes([block.memory for block in model.model.layers])
        yield Result(self, size, history[-1].seconds, fitted, history, state)


def state_bytes(layers: Sequence[HybridMemory]) -> int | None:
    """Size of the state of one sequence in all layers; None: it grows with the context."""
    if any(None in sizes for layer in layers for sizes in layer.sizes_held):
        return None
    return sum(layer.init_state(1).bytes_per_row() for layer in layers)
