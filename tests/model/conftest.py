"""Small models of every kind, in float64, so that results agree to 1e-10."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hqlt.model import HQLTConfig, HQLTForCausalLM

SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "num_heads": 2,
    "window": 4,
    "num_hidden_layers": 2,
    "intermediate_size": 24,
    "vocab_size": 23,
    "initializer_range": 0.3,
}
KINDS: dict[str, dict[str, Any]] = {
    "synchronous": {},
    "delayed-streaming": {"blend": "delayed-streaming"},
    "delayed-chunk": {"blend": "delayed-chunk"},
    "linear": {"fast_weights": "linear", "mixer": "scalar", "rope_theta": None},
    "convolution": {"blend": "delayed-streaming", "mixer": "sum", "conv_size": 3, "output_gate": True},
    "transformer": {"layer_kinds": ["kv", "kv"]},
    "own fields": {
        "layer_kinds": ["fw", "kv"], "zero_centered_block_norms": True,
        "of_kind": {
            "fw": {"fast_weights": "gated-delta", "num_value_heads": 4, "conv_size": 3, "output_gate": "silu"},
            "kv": {"num_kv_heads": 1, "output_gate": "sigmoid", "block_norms": "after"},
        },
    },
    "alternating": {"layer_kinds": ["fw", "kv", "hybrid"], "num_hidden_layers": 3, "kv_window": 3, "beta_max": 1.0},
}  # fmt: skip


@pytest.fixture
def small() -> dict[str, Any]:
    """The config fields of a small model."""
    return dict(SMALL)


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest) -> HQLTForCausalLM:
    """A model of each kind: three blends, both write rules, all mixers, one memory alone, alternating over depth."""
    torch.manual_seed(0)
    return HQLTForCausalLM(HQLTConfig(**{**SMALL, **KINDS[request.param]})).double().eval()


@pytest.fixture
def one_model() -> HQLTForCausalLM:
    """A model for tests that do not depend on its kind."""
    torch.manual_seed(0)
    return HQLTForCausalLM(HQLTConfig(**SMALL)).double().eval()


@pytest.fixture
def tokens() -> torch.Tensor:
    """[3, 11]: longer than two windows of 4, and not a multiple of 4."""
    return torch.randint(1, 23, (3, 11), generator=torch.Generator().manual_seed(1))
