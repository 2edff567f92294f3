"""The minimum cost of an update, and the peak performance of a processor."""

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
"""Dense bfloat16 operations per second, from data sheets, by the first key that the device's name contains."""


def flops_per_token(config: HQLTConfig, length: int) -> float:
    """Training operations per token of a sequence of `length`; the backward pass needs twice as many as the forward.

        linear maps      6 · weights without embeddings
        KV read          12 · hidden_size · KV entries read, averaged over the sequence
        FW write, read   6 · the rule's multiply-adds

    Source: Kaplan et al. 2020, "Scaling Laws for Neural Language Models", section 2.1, extended to both memories.
    """
    with torch.device("meta"):
        model = HQLTForCausalLM(config)
    total = linear_flops_per_token(config)
    for layer in (block.memory for block in model.model.layers):
        heads = layer.heads
        if layer.kv is not None:
            window = min(layer.blend.window or length, length)
            total += 6.0 * heads.queries * (heads.k + heads.v) * (window * length - window * (window - 1) / 2) / length
        if layer.fw is not None:
            total += 6.0 * layer.fw.multiply_adds()
    return total


def linear_flops_per_token(config: HQLTConfig) -> float:
    """Training operations per token of the linear maps: 6 · weights."""
    with torch.device("meta"):
        model = HQLTForCausalLM(config)
    return 6.0 * sum(module.weight.numel() for module in model.modules() if isinstance(module, torch.nn.Linear))


def peak_flops(device: torch.device) -> float | None:
    """Peak operations per second: of a GPU from its data sheet (None: unknown), of a CPU by measurement."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return next((peak for words, peak in PEAKS.items() if re.search(rf"\b{words}\b", name)), None)
    a, b = torch.rand(1024, 1024), torch.rand(1024, 1024)
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - start)
    return 2 * 1024**3 / best


class Part(NamedTuple):
    """A part of an update: its arithmetic and its memory traffic."""

    name: str
    operations: float
    """Operations of matrix products; other arithmetic is hidden by the memory traffic."""
    bytes: float
    """Bytes read and written, except operands of matrix products, which are compute-bound."""
    slower: float = 1.0
    """Assumed time as a multiple of the bound."""

    def seconds(self, dense: float, bandwidth: float) -> float:
        """Time in seconds. dense: operations per second; bandwidth: bytes per second."""
        return self.slower * max(self.operations / dense, self.bytes / bandwidth)


class ElementwiseTraffic(NamedTuple):
    """Values that the elementwise operations of a block read and write per token, forward and backward."""

    hidden: int
    """In units of hidden_size."""
    inner: int
    """In units of intermediate_size."""


EAGER = ElementwiseTraffic(hidden=42, inner=14)
"""Forward: two norms 4, SiLU(v) 2, two sums 6; SiLU 2 and product 3 of the MLP. Backward: norms 6, SiLU(v) 3, summing
gradients at the sums, at q, k, v, gate and β, and at the MLP's two maps 21; product 6, SiLU 3."""
COMPILED = ElementwiseTraffic(hidden=27, inner=9)
"""Forward: norm 2, SiLU(v) 2, sum and norm 4, sum 3; the MLP 3. Backward: reading seven gradients (q, k, v, gate, β,
norm, residual) and writing their sum 8, MLP, norm and residual 5, SiLU(v) 3; the MLP 6."""
PLAIN_LOSS, LOSS_IN_CHUNKS = 34, 18
"""Bytes per logit, forward and backward: with separate bfloat16 and float32 passes, and with one softmax pass."""
GEMMS_SLOWER, MEMORIES_SLOWER = 1.27, 1.67
"""Slowdown of matrix products relative to the largest sizes, and of the memories' kernels relative to their traffic."""


def parts_of_update(
    config: HQLTConfig, rows: int, length: int, *, compiled: bool, in_chunks: bool, memory_units: float
) -> list[Part]:
    """The cost of an update of a synchronous model in bfloat16 on a GPU, without activation checkpointing.

    compiled: whether the blocks are compiled. in_chunks: whether the loss is computed in chunks of positions.
    memory_units: memory traffic of the memories' kernels, forward and backward, in units of one [b, t, h, k] tensor
    (see docs/gpu.md).
    """
    with torch.device("meta"):
        size = sum(weight.numel() for weight in HQLTForCausalLM(config).parameters())
    tokens, layers, vocabulary = rows * length, config.num_hidden_layers, config.vocab_size
    assert config.intermediate_size is not None, "set by the config"
    traffic = COMPILED if compiled else EAGER
    values = traffic.hidden * config.hidden_size + traffic.inner * config.intermediate_size
    chunks = -(-tokens * vocabulary // MAX_LOGITS) if in_chunks else 0
    logits = tokens * vocabulary * (LOSS_IN_CHUNKS if in_chunks else PLAIN_LOSS)
    return [
        Part("matrix products", tokens * linear_flops_per_token(config), 0, GEMMS_SLOWER),
        Part("memories", 0, 2.0 * tokens * layers * config.hidden_size * memory_units, MEMORIES_SLOWER),
        Part("elementwise", 0, 2.0 * tokens * layers * values),
        Part(
            "loss", 0, logits + 12.0 * chunks * vocabulary * config.hidden_size
        ),  # plus summing the gradient of the head
        Part("AdamW", 0, 28.0 * size),  # float32: reads weight, gradient and two moments, writes all but the gradient
        Part("clipping, casts", 0, 24.0 * size),  # norm 4, scaling 8; casting weights to bfloat16 6, gradients back 6
    ]


def share_of_dense(parts: Iterable[Part], flops: float, dense: float, bandwidth: float) -> float:
    """The share of peak operations that an update achieves. flops: `flops_per_token` times the tokens of the update."""
    return flops / dense / sum(part.seconds(dense, bandwidth) for part in parts)
