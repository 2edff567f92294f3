"""Which of flash-linear-attention's kernels serves which rule, and how. Their place is taken by our reference."""

from __future__ import annotations

import sys
import types
from itertools import pairwise

import pytest
import torch

from hqlt.ops import fast_weights, fla
from tests.laws import Laws, close, normal
from tests.ops.inputs import HEADS, KEY, VALUE
from tests.ops.test_fast_weights import KINDS, Kind, memory

FUNCTIONS = {
    ("none", "k", 1): "chunk_delta_rule",
    ("matrix", "k", 1): "chunk_gated_delta_rule",
    ("rows", "k", 1): "chunk_kda",
    ("none", "k", 2): "chunk_gated_delta_product",
    ("matrix", "k", 2): "chunk_gated_delta_product",
    ("matrix", "k", 3): "chunk_gated_delta_product",
    ("none", "none", 1): "chunk_simple_gla",
    ("matrix", "none", 1): "chunk_simple_gla",
    ("rows", "none", 1): "chunk_gla",
}
SERVED = [kind for kind in KINDS if (kind.decay, kind.erase, kind.writes) in FUNCTIONS]
REFUSED = [kind for kind in KINDS if kind not in SERVED]


def sequence_by_sequence(q, k, v, cu_seqlens, initial_state, m=1, **given):
    """Sequences as rows, or end to end in one row between bounds."""
    if cu_seqlens is None:
        return fast_weights(q, k, v, state=initial_state, backend="reference", **given)
    assert cu_seqlens.dtype == torch.long and len(q) == 1 and len(initial_state) == len(cu_seqlens) - 1
    results, bounds = [], cu_seqlens.tolist()
    for i, (begin, end) in enumerate(pairwise(bounds)):
        token, write = slice(begin, end), slice(m * begin, m * end)
        own = {n: x[:, write if n == "beta" else token] if isinstance(x, torch.Tensor) else x for n, x in given.items()}
        state = initial_state[i : i + 1]
        results.append(fast_weights(q[:, token], k[:, write], v[:, write], state=state, backend="reference", **own))
    outs, states = zip(*results, strict=True)
    return torch.cat(outs, dim=1), torch.cat(states)


# The signatures that fla-core 0.6.0 documents, as far as they are used.


def chunk_delta_rule(q, k, v, beta, scale=None, initial_state=None, output_final_state=False, cu_seqlens=None):
    assert output_final_state
    return sequence_by_sequence(q, k, v, cu_seqlens, initial_state, beta=beta, scale=scale)


def chunk_gated_delta_rule(q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False, cu_seqlens=None):
    assert output_final_state and g.shape == q.shape[:3] and beta.shape == v.shape[:3]
    return sequence_by_sequence(q, k, v, cu_seqlens, initial_state, beta=beta, decay=g, scale=scale)


def chunk_kda(q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False, cu_seqlens=None):
    assert output_final_state and g.shape == q.shape
    return sequence_by_sequence(q, k, v, cu_seqlens, initial_state, beta=beta, decay=g, scale=scale)


def chunk_gated_delta_product(
    q, k, v, g, beta, num_householder, scale=None, initial_state=None, output_final_state=False, cu_seqlens=None
):
    assert output_final_state and k.shape[1] == num_householder * q.shape[1]
    given = {"beta": beta, "decay": g, "scale": scale}
    return sequence_by_sequence(q, k, v, cu_seqlens, initial_state, num_householder, **given)


def chunk_simple_gla(q, k, v, g=None, scale=None, initial_state=None, output_final_state=False, cu_seqlens=None):
    assert output_final_state and (g is None or g.shape == q.shape[:3])
    return sequence_by_sequence(q, k, v, cu_seqlens, initial_state, decay=g, erase=False, scale=scale)


def chunk_gla(q, k, v, g, scale=None, initial_state=None, output_final_state=False, cu_seqlens=None):
    assert output_final_state and g.shape == q.shape
    return sequence_by_sequence(q, k, v, cu_seqlens, initial_state, decay=g, erase=False, scale=scale)


@pytest.fixture
def calls(monkeypatch):
    """Modules in fla's place, and the names of their functions as they are called."""
    called = []

    def named(function):
        def kernel(*arguments, **options):
            called.append(function.__name__)
            return function(*arguments, **options)

        return kernel

    for name in ("fla", "fla.ops"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    functions = (chunk_delta_rule, chunk_gated_delta_rule, chunk_kda, chunk_gated_delta_product, chunk_simple_gla)
    for function in (*functions, chunk_gla):
        module = types.ModuleType(f"fla.ops.{function.__name__.removeprefix('chunk_')}")
        setattr(module, function.__name__, named(function))
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(fla, "check_runs", lambda q, v: None)
    monkeypatch.setattr(fla, "CHUNKED_DTYPES", (torch.float64,))
    return called


@pytest.mark.parametrize("marks", [False, True])
@pytest.mark.parametrize("kind", SERVED, ids=str)
class TestLaws(Laws):
    longest = 9

    @pytest.fixture
    def build(self, calls, kind, marks):
        return lambda window: memory(kind, "fla", marks)


@pytest.mark.parametrize("kind", SERVED, ids=str)
def test_each_rule_has_its_kernel(kind, calls):
    inputs, state = kind.inputs(2, 5), normal(2, HEADS, KEY, VALUE)
    got = kind.call(inputs, state=state, backend="fla")
    for mine, theirs in zip(got, kind.call(inputs, state=state, backend="reference"), strict=True):
        close(mine, theirs)
    assert calls == [FUNCTIONS[kind.decay, kind.erase, kind.writes]]


@pytest.mark.parametrize("kind", REFUSED, ids=str)
def test_a_rule_that_fla_has_not_is_refused(kind, calls):
    with pytest.raises(
        ValueError, match=rf"'fla': expected a write rule .* got .*, {kind.writes} writes? a token; name"
    ):
        kind.call(kind.inputs(2, 5), backend="fla")
    assert not calls


def test_keys_wider_than_its_kernels_take_are_refused(calls):
    kind = Kind("rows", "k")
    inputs = kind.inputs(1, 2, k=257)
    with pytest.raises(ValueError, match="expected keys of at most 256 numbers, as chunk_kda takes, got 257"):
        kind.call(inputs, backend="fla")


def test_types_that_its_kernels_do_not_take_are_refused(monkeypatch, calls):
    monkeypatch.setattr(fla, "CHUNKED_DTYPES", (torch.bfloat16, torch.float16))
    kind = Kind("matrix", "k", 2)
    inputs = kind.inputs(1, 2)
    with pytest.raises(ValueError, match="expected bfloat16 or float16, as chunk_gated_delta_product takes, got torch"):
        kind.call(inputs, backend="fla")
