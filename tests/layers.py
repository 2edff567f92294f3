"""Layers to test: every blend × mixer × write rule, plain and with options, and single memories."""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
from torch import Tensor

from hqlt import HybridMemory, ops
from tests.laws import Memory, normal

HYBRIDS = ("synchronous", "delayed-streaming", "delayed-chunk")
MIXERS = ("vector", "scalar", "sum")
RULES = ("delta", "linear")
HIDDEN, HEADS = 8, 2
GROUPED: dict[str, Any] = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 4, "qk_norm": "head"}

COMMON_OPTIONS: dict[str, Any] = {"conv_size": 3, "output_gate": True}
"""Options of every layer."""
KV_OPTIONS: dict[str, Any] = {"rope_theta": None}
RULE_OPTIONS: dict[str, dict[str, Any]] = {"delta": {"beta_max": 1.0}, "linear": {}}

CHOICES: dict[str, dict[str, Any]] = (
    {
        "-".join([blend, mixer, rule, extra]): {"blend": blend, "mixer": mixer, "fast_weights": rule, **options}
        for blend, mixer, rule in product(HYBRIDS, MIXERS, RULES)
        for extra, options in {"plain": {}, "options": {**COMMON_OPTIONS, **KV_OPTIONS, **RULE_OPTIONS[rule]}}.items()
    }
    | {
        "kv-only": {"blend": "kv-only"},
        "kv-only-full-options": {"blend": "kv-only", "window": None, **COMMON_OPTIONS, **KV_OPTIONS},
        "synchronous-full": {"blend": "synchronous", "window": None},
        "fw-only-delta": {"blend": "fw-only"},
        "fw-only-linear-options": {"blend": "fw-only", "fast_weights": "linear", **COMMON_OPTIONS},
    }
    | {
        # other heads, biases, norms and activations
        "kv-only-grouped": {
            "blend": "kv-only",
            **GROUPED,
            "qkv_bias": True,
            "o_bias": True,
            "partial_rotary_factor": 0.5,
            "output_gate": "sigmoid",
        },
        "fw-only-gated-delta": {"blend": "fw-only", "fast_weights": "gated-delta"},
        "synchronous-gated-delta": {"blend": "synchronous", "fast_weights": "gated-delta"},
        "delayed-streaming-gated-delta": {"blend": "delayed-streaming", "fast_weights": "gated-delta"},
        "fw-only-wide-values": {"blend": "fw-only", "num_value_heads": 4, "value_dim": 3, "beta_bias": 0.5},
        "fw-only-norm-after-gate": {
            "blend": "fw-only",
            "num_value_heads": 4,
            "head_norm": "group",
            "output_gate": True,
            "norm_after_gate": True,
        },
        "synchronous-full-norm": {"blend": "synchronous", "head_norm": "full", "output_gate": "sigmoid"},
        "synchronous-add-grouped": {"blend": "synchronous", "mixer": "add", **GROUPED},
        "delayed-streaming-own": {"blend": "delayed-streaming", "write_gates": "own", "gate_bias": 1.0},
        "delayed-streaming-own-linear": {
            "blend": "delayed-streaming",
            "write_gates": "own",
            "fast_weights": "linear",
            "mixer": "sum",
            **GROUPED,
        },
        "delayed-chunk-add": {
            "blend": "delayed-chunk",
            "mixer": "add",
            "kv_gate": True,
            "qk_norm": "full",
            "zero_centered_norms": True,
        },
        "delayed-chunk-grouped": {"blend": "delayed-chunk", **GROUPED, "fw_activation": None, "kv_activation": None},
        "synchronous-surprise": {"blend": "synchronous", "retention": "surprise", "kept": 3, "sinks": 1},
        "delayed-chunk-random": {"blend": "delayed-chunk", "retention": "random", "kept": 3},
        "synchronous-scaled": {"blend": "synchronous", "rope_scaling": {"rope_type": "linear", "factor": 3.0}},
    }
)
ONE_OF_EACH_BLEND = [f"{blend}-vector-delta-plain" for blend in HYBRIDS] + ["kv-only", "fw-only-delta"]
EVERY_STATE = [name for name in CHOICES if "scalar" not in name and "sum" not in name]
"""Without repeated mixers, which have no state."""


def build_layer(choice: str, window: int = 4, dtype: torch.dtype = torch.float64, **changes: Any) -> HybridMemory:
    """Build a layer with weights large enough that every part matters (default gates hardly open)."""
    options = {"hidden_size": HIDDEN, "num_heads": HEADS, "window": window, **CHOICES.get(choice, {}), **changes}
    layer = HybridMemory(**options).to(torch.float64)
    with torch.no_grad():
        for i, weight in enumerate(layer.parameters()):
            weight.copy_((1.0 if weight.dim() == 1 else 0.0) + 0.6 * normal(*weight.shape, seed=i))
    return layer.to(dtype)


def tokens(b: int, t: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return normal(b, t, HIDDEN, seed=seed, dtype=dtype)


def as_memory(layer: HybridMemory) -> Memory:
    """Wrap a layer for the laws. Every call switches between training and evaluation mode."""

    def run(inputs: Any, state: Any, resets: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
        layer.train(not layer.training)
        out, after = layer(*inputs, state=None if state is None else layer.state_of(state), resets=resets)
        return out, tuple(after.leaves())

    def reference(*arguments: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
        with ops.use_backend("reference"):
            return run(*arguments)

    def inputs(b: int, t: int) -> tuple[Tensor]:
        return (tokens(b, t, seed=t),)  # no token repeats: tied scores have no finite differences

    return Memory(run, reference, inputs, tuple(layer.parameters()))
