"""The losses of the stages."""

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
"""(layer, input of its attention [b, t, d], resets, output of its attention [b, t, d])"""


def beyond(batch: Batch, visible: int) -> Tensor:
    """Bool[b, t]: whether a token has at least `visible` tokens before it in its segment."""
    b, t = batch.inputs.shape
    start = torch.zeros(b, dtype=torch.long, device=batch.inputs.device)
    return positions(batch.resets, start, t) >= visible


@torch.no_grad()
def watch_attention(teacher: HQLTForCausalLM, batch: Batch, watch: Watch) -> None:
    """Run the teacher on a batch, and call `watch` with the input and output of each layer's attention.

    No activations are kept from one layer to the next.
    """

    def hook(layer: int) -> Callable[..., None]:
        def call_watch(memory: HybridMemory, inputs: Any, outputs: Any) -> None:
            x, _, resets = inputs
            watch(layer, x, resets, outputs[0])

        return call_watch

    with contextlib.ExitStack() as hooks:
        for layer, block in enumerate(teacher.model.layers):
            memory: Any = block.memory
            hooks.callback(memory.register_forward_hook(hook(layer)).remove)
        teacher.model(batch.inputs, resets=batch.resets, use_cache=False)


def relative_error(output: Hidden, target: Hidden, scored: Tensor) -> Tensor:
    """Σ ‖output − target‖² / Σ ‖target‖² over the scored tokens, Bool[b, t]."""
    output, target = output[scored].float(), target[scored].float()
    return (output - target).square().sum() / target.square().sum()


def layer_errors(
    teacher: HQLTForCausalLM, student: HQLTForCausalLM, batch: Batch, scored: Tensor, layers: list[int], weight: float
) -> dict[int, float]:
    """The relative error of each layer of the student, on the teacher's inputs.

    If gradients are enabled, each error is multiplied by the weight and followed by its own backward pass, so that
    activations of only one layer are kept at a time.
    """
    errors: dict[int, float] = {}
    learn = torch.is_grad_enabled()

    def watch(layer: int, x: Hidden, resets: Resets | None, target: Hidden) -> None:
        if layer not in layers:
            return
        with torch.set_grad_enabled(learn):
            block: Any = student.model.layers[layer]
            error = relative_error(block.memory(x, None, resets)[0], target, scored)
            if learn:
                (error * weight).backward()
        errors[layer] = error.item()

    watch_attention(teacher, batch, watch)
    return errors


def logits_at(model: HQLTForCausalLM, batch: Batch, scored: Tensor) -> Tensor:
    """Logits at the scored tokens, [n, vocabulary], in float32."""
    hidden = model.model(batch.inputs, resets=batch.resets, use_cache=False).last_hidden_state
    logits: Tensor = model.lm_head(hidden[scored])
    return logits.float()


def divergence(teacher: HQLTForCausalLM, student: HQLTForCausalLM, batch: Batch, scored: Tensor) -> Tensor:
    """Summed KL(teacher ‖ student) of the next token at the scored tokens, in nats."""
    with torch.no_grad():
        theirs = logits_at(teacher, batch, scored).log_softmax(dim=-1)
    ours = logits_at(student, batch, scored).log_softmax(dim=-1)
    return F.kl_div(ours, theirs, log_target=True, reduction="sum")


def next_token(student: HQLTForCausalLM, batch: Batch, scored: Tensor) -> Tensor:
    """Summed cross-entropy of the next token at the scored tokens that have one, in nats."""
    logits = logits_at(student, batch, scored)
    return F.cross_entropy(logits, batch.targets[scored], ignore_index=IGNORE, reduction="sum")


def micro_batches(batch: Batch, rows: int, visible: int) -> Iterator[tuple[Batch, Tensor, float]]:
    """Split a batch into (micro-batch, scored tokens, share of all scored tokens); skips those without any."""
    total = int(beyond(batch, visible).sum())
    for part in batch.split(rows):
        scored = beyond(part, visible)
        if count := int(scored.sum()):
            yield part, scored, count / total
