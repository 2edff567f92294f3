"""Layers exported to ONNX give the same results in onnxruntime as in PyTorch, for other batch sizes and lengths.

Run with `make test-onnx`, which installs the packages.
"""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from hqlt import ops
from hqlt.memory.state import leaves
from tests.laws import normal
from tests.layers import EVERY_STATE, HIDDEN, ONE_OF_EACH_BLEND, build_layer
from tests.onnx import ANY, Exported, check_same, needs_onnx, tensors
from tests.ops.inputs import HEADS, queries, strengths, values
from tests.ops.test_fast_weights import Kind

SIZES = ((2, 11), (1, 1), (3, 17))


def some_tokens(b: int, t: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return normal(b, t, HIDDEN, seed=t, dtype=dtype)


@needs_onnx
@pytest.mark.parametrize(
    "name", [*ONE_OF_EACH_BLEND, "synchronous-vector-linear-plain", "synchronous-scalar-delta-plain"]
)
def test_whole_sequences(name):
    layer = build_layer(name, dtype=torch.float32).eval()
    text = Exported(layer, (some_tokens(2, 5),), {"x": {0: ANY, 1: ANY}})
    for b, t in SIZES:
        x = some_tokens(b, t)
        check_same(text(x), layer(x))


@needs_onnx
@torch.no_grad()
@pytest.mark.parametrize("name", EVERY_STATE)
def test_call_by_call_with_resets(name):
    # onnxruntime supports neither ELU nor Softplus in float64, and a norm's ε is always float32
    dtype, tolerance = (torch.float32, 3e-5) if "linear" in name or "gated" in name else (torch.float64, 1e-8)
    layer = build_layer(name, dtype=dtype).eval()
    x, resets = some_tokens(2, 5, dtype), torch.arange(10).view(2, 5) % 4 == 3
    _, state = layer(x)
    sizes = ((None, *entry.sizes) for entry in leaves(layer.entries))
    rows = layer.state_of({i: ANY for i, size in enumerate(axes) if size is None} for axes in sizes)
    exported = Exported(layer, (x, state, resets), ({0: ANY, 1: ANY}, rows, {0: ANY, 1: ANY}))
    for b, t in SIZES:
        mine = theirs = layer.init_state(b)
        for length in (t, 1, 6):
            x, resets = some_tokens(b, length, dtype), normal(b, length, seed=length) < -0.8
            y, theirs = layer(x, theirs, resets)
            y_too, *mine = exported(x, mine, resets)
            check_same([y_too, *mine], (y, theirs), tolerance)


@needs_onnx
@torch.no_grad()
@pytest.mark.parametrize("name", ["delayed-chunk-vector-delta-plain", "synchronous-vector-linear-options"])
def test_one_token_with_its_state(name):
    layer = build_layer(name, dtype=torch.float32).eval()
    _, state = layer(some_tokens(2, 5))
    step = Exported(layer, (some_tokens(2, 1), state), ({0: ANY}, layer.state_of([{0: ANY}] * len(leaves(state)))))
    mine = theirs = layer.init_state(3)
    for t in range(9):
        x = normal(3, 1, HIDDEN, seed=t, dtype=torch.float32)
        y, theirs = layer(x, theirs)
        y_too, *mine = step(x, mine)
        check_same([y_too, *mine], (y, theirs))


@needs_onnx
def test_float64():
    layer = build_layer("delayed-chunk-vector-delta-plain").eval()
    text = Exported(layer, (normal(2, 5, HIDDEN),), {"x": {0: ANY, 1: ANY}})
    x = normal(3, 17, HIDDEN)
    for mine, theirs in zip(text(x), tensors(layer(x)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-10)


class Cummax(nn.Module):
    def forward(self, x):
        return x.cummax(dim=1)


class Sort(nn.Module):
    def __init__(self, descending: bool) -> None:
        super().__init__()
        self.descending = descending

    def forward(self, x):
        return torch.sort(x, dim=-2, stable=True, descending=self.descending)


@needs_onnx
@pytest.mark.parametrize("module", [Cummax(), Sort(False), Sort(True)], ids=["cummax", "sort", "descending"])
def test_operators_that_the_exporter_of_torch_does_not_support(module):
    """With ties, whose order matters."""
    x = torch.randint(0, 4, (2, 9, 3), generator=torch.Generator().manual_seed(0))
    exported = Exported(module.eval(), (x,), {"x": {0: ANY, 1: ANY}})
    for inputs in (x, x[:1, :1], x.repeat(2, 2, 1).contiguous()):
        check_same(exported(inputs), module(inputs))


@needs_onnx
def test_a_cumulative_maximum_stays_nan():
    x = torch.tensor([[1.0, 3.0, 3.0, torch.nan, 5.0, torch.nan, 2.0]])
    exported = Exported(Cummax().eval(), (x,), {"x": {1: ANY}})
    for mine, theirs in zip(exported(x), x.cummax(dim=1), strict=True):
        torch.testing.assert_close(mine, theirs, equal_nan=True)


def test_the_error_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    monkeypatch.delitem(sys.modules, "hqlt.ops.onnx", raising=False)
    with pytest.raises(
        ModuleNotFoundError, match=r"expected the package onnxscript, found none; pip install .*\[onnx\]"
    ):
        ops.onnx_translations()


class Grouped(nn.Module):
    """An operation with grouped query heads and marks on its tokens."""

    def __init__(self, op: str) -> None:
        super().__init__()
        self.op = op

    def forward(self, q, k, v, beta, resets, live):
        if self.op == "delta_rule":
            return ops.delta_rule(q, k, v, beta, resets=resets, live=live)
        if self.op == "linear_attention":
            return ops.linear_attention(q.exp(), k.exp(), v, resets=resets, live=live)
        return ops.window_attention(q, k, v, window=3, resets=resets)


@needs_onnx
@torch.no_grad()
@pytest.mark.parametrize("op", ["delta_rule", "linear_attention", "window_attention"])
def test_groups_and_tokens_that_are_not_live(op):
    def inputs_of(b, t):
        floats = queries(b, t, heads=6), queries(b, t, 1), values(b, t), strengths(b, t)
        return *(x.float() for x in floats), normal(b, t, seed=4) > 1, normal(b, t, seed=5) > 0

    module = Grouped(op).eval()
    exported = Exported(module, inputs_of(2, 5), ({0: ANY, 1: ANY},) * 6)
    for sizes in SIZES:
        inputs = inputs_of(*sizes)
        names = {x.name for x in exported.session.get_inputs()}
        used = [x for name, x in zip(("q", "k", "v", "beta", "resets", "live"), inputs, strict=True) if name in names]
        check_same(exported(*used), module(*inputs))


class Retained(nn.Module):
    """Entries that stay visible beyond the window, with other queries and keys there, and marks on the tokens."""

    def forward(self, q, k, v, q_far, k_far, scores, used, resets):
        l = scores.shape[1]
        leaves = torch.arange(l).expand(scores.shape[:2]) + 2
        outcome = ops.expiry(scores, leaves, kept=2, used=used)
        both = ops.Beyond(outcome, 2, q_far, k_far), ops.Beyond(ops.expiry(scores, leaves, kept=3, resets=resets), 3)
        return tuple(ops.window_attention(q, k, v, window=2, resets=resets, beyond=x) for x in both)


@needs_onnx
@torch.no_grad()
def test_entries_beyond_the_window():
    def inputs_of(b, t):
        floats = queries(b, t, heads=4), queries(b, t, 1), values(b, t), queries(b, t, 2, heads=4), queries(b, t, 3)
        scores = (2 * normal(b, t, HEADS, seed=6)).round()
        return *(x.float() for x in (*floats, scores)), normal(b, t, seed=5) > 0, normal(b, t, seed=4) > 1

    module = Retained().eval()
    exported = Exported(module, inputs_of(2, 9), ({0: ANY, 1: ANY},) * 8)
    for sizes in SIZES:
        check_same(exported(*inputs_of(*sizes)), module(*inputs_of(*sizes)))


class Written(nn.Module):
    """A write rule, with marks on the tokens."""

    def __init__(self, kind: Kind) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, resets, live, *inputs):
        return self.kind.call(inputs, resets=resets, live=live)


@needs_onnx
@torch.no_grad()
@pytest.mark.parametrize("kind", [Kind("matrix", "k"), Kind("rows", "none", 1, 3), Kind("rows", "other", 2)], ids=str)
def test_fast_weights(kind):
    def inputs_of(b, t):
        return normal(b, t, seed=4) > 1, normal(b, t, seed=5) > 0, *(x.float() for x in kind.inputs(b, t))

    module = Written(kind).eval()
    exported = Exported(module, inputs_of(2, 5), ({0: ANY, 1: ANY},) * 2 + (({0: ANY, 1: ANY},) * len(kind.names),))
    for sizes in SIZES:
        check_same(exported(*inputs_of(*sizes)), module(*inputs_of(*sizes)))
