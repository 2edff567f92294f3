"""What an update costs at least, and what a processor can do at most."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from typing import NamedTuple

import torch

from hqlt.model import HQLTConfig, HQLTForCausalLM
from hqlt.model.loss import MAX_LOGITS

PEAKS = {
    "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "A100": 312e12,
    "L40S": 362e12, "L40": 181e12, "L4": 121e12, "4090": 165e12,
}  # fmt: skip
"""Operations of dense bfloat16 products a second, by words of the device's name, the first that fit (data sheets)."""


def flops_per_token(config: HQLTConfig, length: int) -> float:
    """Operations of training on a token of a sequence of `length`: forward, twice as many backward.

        linear maps      6 · weights, embeddings left out
        KV read          12 · hidden_size · pairs read, on average over the sequence
        FW write, read   6 · the rule's multiply-adds

    Source: Kaplan et al. 2020, "Scaling Laws for Neural Language Models", section 2.1; memories counted alike.
    """
    with torch.device("meta"):
        model = HQLTForCausalLM(config)
    total = linear_flops_per_token(config)
    for layer in (block.memory for block in model.model.layers):
        heads = layer.sizes
        if layer.kv is not None:
            reach = min(layer.blend.window or length, length)
            total += 6.0 * heads.queries * (heads.k + heads.v) * (reach * length - reach * (reach - 1) / 2) / length
        if layer.fw is not None:
            total += 6.0 * layer.fw.multiply_adds()
    return total


def linear_flops_per_token(config: HQLTConfig) -> float:
    """6 · weights of the linear maps."""
    with torch.device("meta"):
        model = HQLTForCausalLM(config)
    return 6.0 * sum(module.weight.numel() for module in model.modules() if isinstance(module, torch.nn.Linear))


def peak_flops(device: torch.device) -> float | None:
    """Operations a second of one processor: a GPU's from its data sheet (None: not known), a CPU's measured now."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return next((peak for words, peak in PEAKS.items() if re.search(rf"\b{words}\b", name)), None)
    a, b = torch.rand(1024, 1024), torch.rand(1024, 1024)
    best = float("inf")
    for _ in range(4):
        begun = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - begun)
    return 2 * 1024**3 / best


class Part(NamedTuple):
    """A part of an update: what it multiplies, and what it reads from memory and writes to it."""

    name: str
    operations: float
    """Of matrix products; what else is computed is hidden behind the bytes."""
    bytes: float
    """Beyond the operands of matrix products, which are bound by their operations."""
    slower: float = 1.0
    """How many times its bound it is taken to need."""

    def seconds(self, dense: float, bandwidth: float) -> float:
        """dense: operations a second; bandwidth: bytes a second."""
        return self.slower * max(self.operations / dense, self.bytes / bandwidth)


class Moved(NamedTuple):
    """Numbers that a block's elementwise operations read and write for a token, forward and backward."""

    hidden: int
    """In units of hidden_size."""
    inner: int
    """In units of intermediate_size."""


EAGER = Moved(hidden=42, inner=14)
"""Forward: two norms 4, SiLU(v) 2, two sums 6; SiLU 2 and product 3 of the MLP. Backward: norms 6, SiLU(v) 3, gradients
that meet at a sum, at q, k, v, gate and β, and at the MLP's two maps 21; product 6, SiLU 3."""
COMPILED = Moved(hidden=27, inner=9)
"""Forward: norm 2, SiLU(v) 2, sum and norm 4, sum 3; the MLP 3. Backward: seven read and one written where q, k, v,
gate, β, norm and residual meet 8, MLP, norm and residual 5, SiLU(v) 3; the MLP 6."""
PLAIN_LOSS, LOSS_IN_CHUNKS = 34, 18
"""Bytes of a logit from the head's product to its gradient's: in bfloat16 and float32, and in one pass of softmax."""
GEMMS_SLOWER, MEMORIES_SLOWER = 1.27, 1.67
"""Matrix products of these sizes beside the largest ones; kernels of the memories beside their bytes."""


def parts_of_update(
    config: HQLTConfig, rows: int, length: int, *, compiled: bool, in_chunks: bool, memory_units: float
) -> list[Part]:
    """What an update of a synchronous model in bfloat16 costs on a GPU, without recomputation.

    compiled: whether blocks are; in_chunks: whether the loss is computed in chunks of positions. memory_units: what the
    memories' kernels read and write, forward and backward, in tensors [b, t, h, k] (docs/gpu.md counts them).
    """
    with torch.device("meta"):
        size = sum(weight.numel() for weight in HQLTForCausalLM(config).parameters())
    tokens, layers, vocabulary = rows * length, config.num_hidden_layers, config.vocab_size
    assert config.intermediate_size is not None, "the config sets it"
    moved = COMPILED if compiled else EAGER
    numbers = moved.hidden * config.hidden_size + moved.inner * config.intermediate_size
    chunks = -(-tokens * vocabulary // MAX_LOGITS) if in_chunks else 0
    logits = tokens * vocabulary * (LOSS_IN_CHUNKS if in_chunks else PLAIN_LOSS)
    return [
        Part("matrix products", tokens * linear_flops_per_token(config), 0, GEMMS_SLOWER),
        Part("memories", 0, 2.0 * tokens * layers * config.hidden_size * memory_units, MEMORIES_SLOWER),
        Part("elementwise", 0, 2.0 * tokens * layers * numbers),
        Part("loss", 0, logits + 12.0 * chunks * vocabulary * config.hidden_size),  # and the head's gradient, summed
        Part("AdamW", 0, 28.0 * size),  # weight, gradient and two moments read, all but the gradient written: float32
        Part("clipping, casts", 0, 24.0 * size),  # the norm 4, its factor 8; weights to bfloat16 6, gradients back 6
    ]


def share_of_dense(parts: Iterable[Part], flops: float, dense: float, bandwidth: float) -> float:
    """flops: what an update counts as (`flops_per_token`, times its tokens)."""
    return flops / dense / sum(part.seconds(dense, bandwidth) for part in parts)
