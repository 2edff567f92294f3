"""Backends registered from outside the package obey the laws of their operations and can be selected by name."""

from __future__ import annotations

from contextlib import ExitStack
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from hqlt import ops
from hqlt.ops import register_backend
from hqlt.ops.backend import IMPLEMENTATIONS
from tests.laws import Laws, close, normal
from tests.ops import test_boundary, test_live_and_groups

called = []


def toy_delta_rule(q, k, v, beta, *, scale, state, resets, live):
    """W ← (I − β k kᵀ) W + β k vᵀ, as one matrix product after the other."""
    called.append("delta_rule")
    W, reads = state, []
    dead = torch.zeros_like(k[..., 0], dtype=torch.bool) if live is None else ~live[..., None].expand(k.shape[:3])
    k, v, beta = (x.masked_fill(dead.view(*dead.shape, *(1,) * (x.dim() - 3)), 0) for x in (k, v, beta))
    for t in range(q.shape[1]):
        W = W if resets is None else W.masked_fill(resets[:, t, None, None, None], 0)
        key, write = k[:, t, :, :, None], beta[:, t, :, None, None] * k[:, t, :, :, None]
        W = W - write @ (key.mT @ W) + write @ v[:, t, :, None]
        reads.append(scale * (q[:, t].unflatten(1, (k.shape[2], -1)) @ W).flatten(1, 2))
    return torch.stack(reads, dim=1), W


def toy_rms_norm(x, weight, eps):
    called.append("rms_norm")
    return F.rms_norm(x, weight.shape, eps=eps) * weight


def toy_synchronous(inputs):
    called.append("synchronous")
    return IMPLEMENTATIONS["synchronous"]["reference"](inputs)


TOYS = {"delta_rule": toy_delta_rule, "rms_norm": toy_rms_norm, "synchronous": toy_synchronous}


@pytest.fixture(autouse=True, scope="module")
def registered():
    """Registers the toy backends, as a package does on import, and removes them after the tests."""
    with ExitStack() as undone:
        for op, toy in TOYS.items():
            undone.enter_context(mock.patch.dict(IMPLEMENTATIONS[op]))
            assert register_backend(op, "toy")(toy) is toy
        yield


class TestLaws(Laws):
    """The backend is forced, as in a layer that names none."""

    @pytest.fixture
    def build(self):
        memory = test_live_and_groups.scan_memory("delta_rule", None)
        called.clear()
        with ops.use_backend("toy"):
            yield lambda window: memory
        assert "delta_rule" in called


@pytest.mark.parametrize("op", TOYS)
def test_it_is_known_by_name(op):
    inputs, run, _ = test_boundary.case(op, **test_boundary.SIZES)
    q = inputs[0]
    assert ops.explain(op, q, backend="toy").why == "named by the caller"
    assert ops.explain(op, q).name != "toy"
    with ops.use_backend("toy"):
        assert ops.explain(op, q) == ("toy", "forced by hqlt.ops.use_backend")
        assert ops.explain("mix", q).name != "toy"  # no toy backend is registered for it
    called.clear()
    for mine, theirs in zip(run("toy", *inputs), run("reference", *inputs), strict=True):
        close(mine, theirs)
    assert op in called
    empty = test_boundary.case(op, **test_boundary.SIZES | {"b": 0})
    called.clear()
    empty[1]("toy", *empty[0])
    assert not called  # the reference handles empty tensors


def test_unknown_operations_and_taken_names_are_rejected():
    with pytest.raises(
        ValueError, match=r"op: expected one of 'delta_rule', .*got 'delta_rul'; did you mean 'delta_rule'"
    ):
        register_backend("delta_rul", "toy")
    with pytest.raises(ValueError, match=r"not yet a backend of rms_norm, got 'native', which is hqlt.ops.norm.*"):
        register_backend("rms_norm", "native")(toy_rms_norm)
    assert IMPLEMENTATIONS["rms_norm"]["native"].__module__ == "hqlt.ops.norm.native"
    assert register_backend("rms_norm", "toy")(toy_rms_norm) is toy_rms_norm  # as when its module is imported again


def test_under_a_transform_the_reference_runs_instead():
    """A registered backend may not support torch.func: if it is named, an error is raised; otherwise the reference
    runs."""
    x, weight = normal(2, 3), normal(3)
    with pytest.raises(RuntimeError, match="rms_norm: backend 'toy' does not run under"):
        torch.func.grad(lambda x: ops.rms_norm(x, weight, eps=1e-6, backend="toy").sum())(x)
