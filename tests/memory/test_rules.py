"""Every rule of the family satisfies the laws of a memory in every blend, alone and beside a KV-memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hqlt import registry
from tests.laws import Laws
from tests.layers import as_memory, build_layer

SCHEDULES: dict[str, dict[str, Any]] = {
    "fw-only": {"blend": "fw-only"},
    "synchronous": {"blend": "synchronous"},
    "delayed-streaming": {"blend": "delayed-streaming"},
    "own-gates": {"blend": "delayed-streaming", "write_gates": "own"},
    "delayed-chunk": {"blend": "delayed-chunk"},
}

FAMILY: dict[str, dict[str, Any]] = {
    "gated-delta": {"fast_weights": "gated-delta", "beta_max": 2.0},
    "gated-delta-learned": {"fast_weights": "gated-delta", "feature_map": "learned"},
    "delta-learned": {"fast_weights": "delta", "feature_map": "learned"},
    "linear-hedgehog": {"fast_weights": "linear", "feature_map": "hedgehog"},
    "kda": {"fast_weights": "kda", "beta_max": 2.0, "decay_rank": 3},
    "kda-bounded": {"fast_weights": "kda", "decay_floor": -5.0},
    "delta-product": {"fast_weights": "delta-product", "conv_size": 2},
    "gated-delta-product": {"fast_weights": "gated-delta-product", "num_householder": 3},
    "gla": {"fast_weights": "gla", "decay_rank": 3, "decay_temperature": 2.0},
    "hgrn2": {"fast_weights": "hgrn2", "depth": (1, 3)},
    "lightning": {"fast_weights": "lightning"},
    "mamba2": {"fast_weights": "mamba2"},
    "mlstm": {"fast_weights": "mlstm", "gate_cap": None},
    "retnet": {"fast_weights": "retnet"},
    "comba": {"fast_weights": "comba", "correction": 0.5},
    "rwkv7": {"fast_weights": "rwkv7", "decay_rank": 3},
}
"""Rules with options that matter to the laws; `tests/layers.py` has delta and linear."""

REJECTED: dict[tuple[str, str], str] = {
    (name, "delayed-streaming"): f"write_gates: expected 'own' with fast_weights='{name}', whose gates hold keys"
    for name in ("delta-product", "gated-delta-product")
}
"""Error message by rule and schedule."""

COMBINATIONS = [(rule, schedule) for rule in FAMILY for schedule in SCHEDULES if (rule, schedule) not in REJECTED]


class TestLaws(Laws):
    longest = 14

    @pytest.fixture(params=COMBINATIONS, ids="-".join)
    def build(self, request):
        rule, schedule = request.param
        return lambda window: as_memory(build_layer("", window, **SCHEDULES[schedule], **FAMILY[rule]))


@pytest.mark.parametrize(("rule", "schedule"), REJECTED)
def test_combinations_without_meaning_are_rejected(rule, schedule):
    with pytest.raises(ValueError, match=REJECTED[rule, schedule]):
        build_layer("", **SCHEDULES[schedule], **FAMILY[rule])


def test_every_rule_is_tested():
    ours = {name for name in registry.names("rule") if registry.find("rule", name).__module__.startswith("hqlt.")}
    assert {options["fast_weights"] for options in FAMILY.values()} == ours


@pytest.mark.parametrize(
    ("rule", "passes"), [("linear", 2), ("mamba2", 2), ("delta", 3), ("kda", 3), ("delta-product", 5), ("rwkv7", 5)]
)
def test_multiply_adds(rule, passes):
    """Passes over a 4 × 4 matrix in two heads: one for the read, and for each write one or (if it erases) two."""
    assert build_layer("", fast_weights=rule).fw.multiply_adds() == passes * 2 * 4 * 4


def test_a_learned_map_starts_as_the_identity():
    x = torch.randn(2, 9, 8, dtype=torch.float64)
    for rule in ("delta", "gated-delta", "linear"):
        plain, learned = (build_layer("", fast_weights=rule, feature_map=name) for name in (None, "learned"))
        learned.load_state_dict(plain.state_dict(), strict=False)
        learned.fw.feature_map.init_parameters()
        torch.testing.assert_close(learned(x)[0], plain(x)[0], rtol=0, atol=1e-12)
        learned(x)[0].square().sum().backward()
        assert learned.fw.feature_map.q.grad.abs().sum() > 0
        assert learned.fw.feature_map.k.grad.abs().sum() > 0


def test_hedgehog():
    """The equation, and a matrix of twice as many rows."""
    layer = build_layer("fw-only", fast_weights="linear", feature_map="hedgehog")
    layer.fw.feature_map.init_parameters()
    x = torch.randn(1, 1, 2, 4, dtype=torch.float64)
    phi, _ = layer.fw.feature_map(x, x)
    torch.testing.assert_close(phi, torch.cat([x.softmax(-1), (-x).softmax(-1)], dim=-1))
    assert layer.init_state(3).fw.matrix.shape == (3, 2, 8, 4)
    with pytest.raises(ValueError, match="feature_map: expected one of 'learned', got 'hedgehog'"):
        build_layer("", fast_weights="delta", feature_map="hedgehog")
