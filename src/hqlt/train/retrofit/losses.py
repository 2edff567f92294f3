"""What each stage brings down, and what both models say of a batch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hqlt.layer import HybridMemory
from hqlt.model import HQLTForCausalLM
from hqlt.ops.segments import positions
from hqlt.shapes import Hidden, Resets
from hqlt.task.task import IGNORE, Batch

Watch = Callable[[int, Hidden, "Resets | None", Hidden], None]
"""(layer, the input of its attention [b, t, d], resets, its output [b, t, d])"""


def beyond(batch: Batch, reach: int) -> Tensor:
    """Bool[b, t]: tokens with at least `reach` others before them in their segment."""
    b, t = batch.inputs.shape
    start = torch.zeros(b, dtype=torch.long, device=batch.inputs.device)
    return positions(batch.resets, start, t) >= reach


@torch.no_grad()
def read_watched(teacher: HQLTForCausalLM, batch: Batch, watch: Watch) -> None:
    """Let the teacher read a batch, and call `watch` with what each attention is given and makes of it.

    Nothing is held from layer to layer: what `watch` computes is gone before the next one.
    """

    def hook(layer: int) -> Callable[..., None]:
        def seen(memory: HybridMemory, given: Any, made: Any) -> None:
            x, _, resets = given
            watch(layer, x, resets, made[0])

        return seen

    with contextlib.ExitStack() as hooks:
        for layer, block in enumerate(teacher.model.layers):
            memory: Any = block.memory
            hooks.callback(memory.register_forward_hook(hook(layer)).remove)
        teacher.model(batch.inputs, resets=batch.resets, use_cache=False)


def relative_error(made: Hidden, wanted: Hidden, scored: Tensor) -> Tensor:
    """Σ ‖made − wanted‖² / Σ ‖wanted‖² over the scored tokens, Bool[b, t]."""
    made, wanted = made[scored].float(), wanted[scored].float()
    return (made - wanted).square().sum() / wanted.square().sum()


def layer_errors(
    teacher: HQLTForCausalLM, student: HQLTForCausalLM, batch: Batch, scored: Tensor, layers: list[int], weight: float
) -> dict[int, float]:
    """By layer: the relative error of the student's attention on the teacher's inputs.

    Where gradients are enabled, each is followed by its own backward pass, times the weight, so that one layer's
    activations are all that is held.
    """
    errors: dict[int, float] = {}
    learn = torch.is_grad_enabled()

    def watch(layer: int, x: Hidden, resets: Resets | None, wanted: Hidden) -> None:
        if layer not in layers:
            return
        with torch.set_grad_enabled(learn):
            block: Any = student.model.layers[layer]
            error = relative_error(block.memory(x, None, resets)[0], wanted, scored)
            if learn:
                (error * weight).backward()
        errors[layer] = error.item()

    read_watched(teacher, batch, watch)
    return errors


def logits_at(model: HQLTForCausalLM, batch: Batch, scored: Tensor) -> Tensor:
    """[scored tokens, vocabulary], in float32."""
    hidden = model.model(batch.inputs, resets=batch.resets, use_cache=False).last_hidden_state
    logits: Tensor = model.lm_head(hidden[scored])
    return logits.float()


def divergence(teacher: HQLTForCausalLM, student: HQLTForCausalLM, batch: Batch, scored: Tensor) -> Tensor:
    """Σ KL(teacher ‖ student) of the next token over the scored tokens, in nats."""
    with torch.no_grad():
        theirs = logits_at(teacher, batch, scored).log_softmax(dim=-1)
    ours = logits_at(student, batch, scored).log_softmax(dim=-1)
    return F.kl_div(ours, theirs, log_target=True, reduction="sum")


def next_token(student: HQLTForCausalLM, batch: Batch, scored: Tensor) -> Tensor:
    """Σ −log p(next token) over the scored tokens that have one, in nats."""
    logits = logits_at(student, batch, scored)
    return F.cross_entropy(logits, batch.targets[scored], ignore_index=IGNORE, reduction="sum")


def micro_batches(batch: Batch, rows: int, reach: int) -> Iterator[tuple[Batch, Tensor, float]]:
    """The parts of a batch that have scored tokens, which those are, and the part's share of all of them."""
    total = int(beyond(batch, reach).sum())
    for part in batch.split(rows):
        scored = beyond(part, reach)
        if count := int(scored.sum()):
            yield part, scored, count / total
