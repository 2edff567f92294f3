from __future__ import annotations

import importlib

import pytest
import torch

from hqlt import ops


@pytest.mark.parametrize("op", ["delta_rule", "linear_attention", "window_attention", "synchronous"])
@pytest.mark.parametrize("t", [0, 1, 200])
def test_the_choice_is_an_implementation_and_has_a_reason(op, t):
    options = {"window": 8} if op == "window_attention" else {}
    choice = ops.explain(op, torch.zeros(1, t, 2, 4), **options)
    assert choice.name in importlib.import_module(f"hqlt.ops.{op}").IMPLEMENTATIONS
    assert choice.why


def test_a_named_backend_wins_over_a_forced_one():
    q = torch.zeros(1, 9, 2, 4)
    with ops.use_backend("reference"):
        assert ops.explain("delta_rule", q).name == "reference"
        assert ops.explain("delta_rule", q, backend="chunked").name == "chunked"
    assert ops.explain("delta_rule", q).why != "forced by hqlt.ops.use_backend"


def test_the_forced_backend_ends_with_its_context_even_after_an_error():
    q = torch.zeros(1, 9, 2, 4)
    before = ops.explain("delta_rule", q)
    with pytest.raises(RuntimeError), ops.use_backend("reference"):
        raise RuntimeError
    assert ops.explain("delta_rule", q) == before


def test_unknown_operation_is_named():
    with pytest.raises(ValueError, match=r"op: expected one of delta_rule.*got 'attention'"):
        ops.explain("attention", torch.zeros(1, 1, 1, 1))
