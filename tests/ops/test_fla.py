"""Conversion of segments and states for flash-linear-attention, which is replaced by our reference."""

from __future__ import annotations

import importlib.util
import sys
import types
from functools import partial

import pytest
import torch

from hqlt import HybridMemory
from hqlt.bench import gpu, peers
from hqlt.memory.rotary import Rotary
from hqlt.ops import delta_rule, fla, synchronous
from tests.laws import Laws, Memory, close
from tests.ops.inputs import TOLERANCE, queries, strengths, values
from tests.ops.test_live_and_groups import scan_memory
from tests.ops.test_synchronous import INTERPRETED

GPU = torch.cuda.is_available() and importlib.util.find_spec("fla") is not None


def inputs(b, t):
    return queries(b, t), queries(b, t, seed=1), values(b, t), strengths(b, t)


def run(inputs, state, resets, backend="fla"):
    out, W = delta_rule(*inputs, state=state and state[0], resets=resets, backend=backend)
    return out, (W,)


def reference(*arguments):
    return run(*arguments, backend="reference")


def sequence_by_sequence(q, k, v, beta, *, scale, initial_state, output_final_state, cu_seqlens=None):
    """fla's documented signature: sequences as rows, or concatenated in one row and delimited by cu_seqlens."""
    assert output_final_state
    options = {"scale": scale, "backend": "reference"}
    if cu_seqlens is None:
        return delta_rule(q, k, v, beta, state=initial_state, **options)
    assert cu_seqlens.dtype == torch.long and len(q) == 1 and len(initial_state) == len(cu_seqlens) - 1
    parts = [
        delta_rule(*(x[:, begin:end] for x in (q, k, v, beta)), state=initial_state[i : i + 1], **options)
        for i, (begin, end) in enumerate(zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True))
    ]
    outs, states = zip(*parts, strict=True)
    return torch.cat(outs, dim=1), torch.cat(states)


@pytest.fixture
def calls(monkeypatch):
    """Replaces fla's module; the value is the list of its functions that were called."""
    called = []

    def named(name):
        def rule(*arguments, **options):
            called.append(name)
            return sequence_by_sequence(*arguments, **options)

        return rule

    module = types.ModuleType("fla.ops.delta_rule")
    module.chunk_delta_rule, module.fused_recurrent_delta_rule = named("chunks"), named("tokens")
    for name in ("fla", "fla.ops"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(fla, "check_runs", lambda q, v: None)
    return called


class TestLaws(Laws):
    @pytest.fixture
    def build(self, calls):
        return lambda window: Memory(run, reference, inputs)


class TestLiveAndGroupsLaws(Laws):
    @pytest.fixture
    def build(self, calls):
        return lambda window: scan_memory("delta_rule", "fla")


@pytest.mark.parametrize(
    ("t", "width", "dtype", "kind"),
    [
        (63, 4, torch.bfloat16, "tokens"),
        (64, 4, torch.bfloat16, "chunks"),
        (64, 256, torch.float16, "chunks"),
        (64, 257, torch.bfloat16, "tokens"),
        (64, 4, torch.float32, "tokens"),
    ],
)
def test_chunked_kernels_are_used_if_supported(t, width, dtype, kind, calls):
    q = queries(1, t, width=width).to(dtype)
    delta_rule(q, q, values(1, t).to(dtype), strengths(1, t).float(), backend="fla")
    assert calls == [kind]


def test_the_peer_of_the_benchmark_computes_the_same(calls):
    """φ, fla, rotary embedding, window attention, mixer and norm one by one equal `synchronous`."""
    leaves = [x.detach() for x in gpu.inputs(2, 70, 2, 8)]
    rotary = Rotary(10_000.0).table(70, 8, torch.device("cpu"), torch.float32)
    expected, _ = synchronous(*leaves, window=5, rotary=rotary, backend="composed")
    got = gpu.one_by_one(*leaves, attention=partial(peers.band_attention, window=5))
    assert calls
    close(got, expected, 1e-5)


def test_the_benchmark_detects_which_backend_runs(calls):
    layer = HybridMemory(8, 2, window=3)
    x = torch.randn(1, 70, 8)
    assert gpu.uses_backend("fla", lambda: layer(x))
    assert not gpu.uses_backend("dense", lambda: layer(x))
    assert not gpu.uses_backend("fla", lambda: None)


def test_errors_say_what_it_needs(monkeypatch):
    with pytest.raises(RuntimeError, match="'fla': expected tensors on a GPU, got cpu; name another backend"):
        run(inputs(1, 2), None, None)
    monkeypatch.setattr(fla, "check_runs", lambda q, v: None)
    monkeypatch.setitem(sys.modules, "fla", None)
    with pytest.raises(RuntimeError, match=r"expected the package fla-core, found none; pip install .*\[gpu\]'"):
        run(inputs(1, 2), None, None)


@pytest.mark.skipif(not GPU and not INTERPRETED, reason="neither a GPU with fla-core nor TRITON_INTERPRET=1")
@pytest.mark.filterwarnings("ignore")  # of fla's own
@pytest.mark.parametrize("t", [20, 130])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_fla_itself(t, dtype, monkeypatch):
    """Its kernels match the reference, with resets and a state, including gradients."""
    pytest.importorskip("fla")
    if not GPU:
        if dtype == torch.bfloat16 or t > 63:
            pytest.skip("the interpreter's products of bfloat16 are wrong, and fla's chunks ask for a driver")
        monkeypatch.setattr(fla, "check_runs", lambda q, v: None)
    device, width = "cuda" if GPU else "cpu", 16
    x = queries(2, t, width=width), queries(2, t, 1, width=width), values(2, t, width=width), strengths(2, t)
    state = torch.randn(2, x[0].shape[2], width, width)
    leaves = [*(z.to(dtype) for z in x[:3]), x[3].float(), state]
    resets = torch.zeros(2, t, dtype=torch.bool)
    resets[0, 7] = resets[1, 0] = resets[1, 8] = True

    def answers(backend, device, leaves):
        *x, state = leaves = [z.to(device).requires_grad_() for z in leaves]
        out, W = delta_rule(*x, state=state, resets=resets.to(device), backend=backend)
        gradients = torch.autograd.grad(out.double().square().sum() + W.double().square().sum(), leaves)
        return [z.double().cpu() for z in (out, W, *gradients)]

    expected = answers("reference", "cpu", [z.double() for z in leaves])
    for mine, theirs in zip(answers("fla", device, leaves), expected, strict=True):
        close(mine / theirs.norm(), theirs / theirs.norm(), max(TOLERANCE.get(dtype, 1e-2), 1e-4))
