"""What an update costs at least, and what a processor can do at most."""

from __future__ import annotations

import re
import time

import torch

from hqlt.model import HQLTConfig, HQLTForCausalLM

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
    linear = sum(module.weight.numel() for module in model.modules() if isinstance(module, torch.nn.Linear))
    total = 6.0 * linear
    for layer in (block.memory for block in model.model.layers):
        heads = layer.sizes
        if layer.kv is not None:
            reach = min(layer.blend.window or length, length)
            total += 6.0 * heads.queries * (heads.k + heads.v) * (reach * length - reach * (reach - 1) / 2) / length
        if layer.fw is not None:
            total += 6.0 * layer.fw.multiply_adds()
    return total


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
