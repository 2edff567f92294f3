"""Layers to test: every blend × mixer × write rule, plain and with every option, and the memories alone."""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
from torch import Tensor

from hqlt import HybridMemory, MemoryState, ops
from tests.laws import Memory, normal

HYBRIDS = ("synchronous", "delayed-streaming", "delayed-chunk")
MIXERS = ("vector", "scalar", "sum")
RULES = ("delta", "linear")
HIDDEN, HEADS = 8, 2

PLAIN: dict[str, Any] = {}
WITH_ALL_OPTIONS = {"conv_size": 3, "output_gate": True, "beta_max": 1.0, "rope_theta": None}

CHOICES: dict[str, dict[str, Any]] = {
    "-".join([blend, mixer, rule, extra]): {"blend": blend, "mixer": mixer, "fast_weights": rule, **options}
    for blend, mixer, rule, (extra, options) in product(
        HYBRIDS, MIXERS, RULES, [("plain", PLAIN), ("options", WITH_ALL_OPTIONS)]
    )
} | {
    "kv-only": {"blend": "kv-only"},
    "kv-only-full-options": {"blend": "kv-only", "window": None, **WITH_ALL_OPTIONS},
    "synchronous-full": {"blend": "synchronous", "window": None},
    "fw-only-delta": {"blend": "fw-only"},
    "fw-only-linear-options": {"blend": "fw-only", "fast_weights": "linear", **WITH_ALL_OPTIONS},
}
ONE_OF_EACH_BLEND = [f"{blend}-vector-delta-plain" for blend in HYBRIDS] + ["kv-only", "fw-only-delta"]
EVERY_STATE = [name for name in CHOICES if "scalar" not in name and "sum" not in name]
"""Mixers hold no state: one of them is enough where only the state matters."""


def build_layer(choice: str, window: int = 4, dtype: torch.dtype = torch.float64, **changes: Any) -> HybridMemory:
    """With weights large enough that every part matters (the default initialisation's gates hardly open)."""
    options = {"hidden_size": HIDDEN, "num_heads": HEADS, "window": window, **CHOICES[choice], **changes}
    layer = HybridMemory(**options).to(torch.float64)
    with torch.no_grad():
        for i, weight in enumerate(layer.parameters()):
            weight.copy_((1.0 if weight.dim() == 1 else 0.0) + 0.6 * normal(*weight.shape, seed=i))
    return layer.to(dtype)


def tokens(b: int, t: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return normal(b, t, HIDDEN, seed=seed, dtype=dtype)


def as_memory(layer: HybridMemory) -> Memory:
    """The layer as the laws see it. It changes between training and evaluation mode at every call."""

    def run(inputs: Any, state: Any, resets: Any) -> tuple[Tensor, MemoryState]:
        layer.train(not layer.training)
        return layer(*inputs, state=state, resets=resets)

    def reference(*arguments: Any) -> tuple[Tensor, MemoryState]:
        with ops.use_backend("reference"):
            return run(*arguments)

    return Memory(run, reference, lambda b, t: (tokens(b, t),), tuple(layer.parameters()))
