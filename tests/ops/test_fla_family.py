"""The kernels of flash-linear-attention that are used for each write rule. They are replaced by our reference."""

from __future__ import annotations

import sys
import types
from itertools import pairwise

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_leaves

from hqlt.ops import backend, explain, fast_weights, fla
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
    """Sequences as rows, or concatenated in one row and delimited by cu_seqlens."""
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


# The signatures documented by fla-core 0.6.0, as far as they are used.


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
    """Replaces fla's modules; the value is the list of their functions that were called."""
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
def test_a_rule_that_fla_does_not_support_is_rejected(kind, calls):
    with pytest.raises(
        ValueError, match=rf"'fla': expected a write rule .* got .*, {kind.writes} writes per token; name"
    ):
        kind.call(kind.inputs(2, 5), backend="fla")
    assert not calls


def test_keys_too_wide_for_its_kernels_are_rejected(calls):
    kind = Kind("rows", "k")
    inputs = kind.inputs(1, 2, k=257)
    with pytest.raises(ValueError, match="expected a key width of at most 256 for chunk_kda, got 257"):
        kind.call(inputs, backend="fla")


def test_dtypes_that_its_kernels_do_not_support_are_rejected(monkeypatch, calls):
    monkeypatch.setattr(fla, "CHUNKED_DTYPES", (torch.bfloat16, torch.float16))
    kind = Kind("matrix", "k", 2)
    inputs = kind.inputs(1, 2)
    with pytest.raises(ValueError, match="expected bfloat16 or float16 for chunk_gated_delta_product, got torch"):
        kind.call(inputs, backend="fla")


class TestCheck:
    """On a GPU its kernels are selected if they match the reference; CPU tensors stand in for a GPU's."""

    kind = Kind("matrix", "k")

    @pytest.fixture(autouse=True)
    def on_a_gpu(self, monkeypatch, calls):
        monkeypatch.setattr(fla, "on_gpu", lambda q: True)
        monkeypatch.setattr(backend, "_tried", {})
        native_last = sorted(backend.RULES["fast_weights"], key=lambda rule: rule.choice.name == "native")
        monkeypatch.setitem(backend.RULES, "fast_weights", tuple(native_last))

    def explained(self, t=70, **changes):
        fields = {"k": 8, "v": 8, "dtype": torch.float64, "decay": 3} | changes
        return explain("fast_weights", torch.zeros(1, t, 2, fields["k"]), kind=fla.Kind("fast_weights", **fields))

    def wrong(self, monkeypatch, error):
        right = chunk_gated_delta_rule

        def chunk(*arguments, **options):
            out, final = right(*arguments, **options)
            return out, error(final)

        monkeypatch.setattr(sys.modules["fla.ops.gated_delta_rule"], "chunk_gated_delta_rule", chunk)

    def test_correct_results(self, calls):
        for segments in (False, True):
            choice = self.explained(segments=segments)
            assert choice.name == "fla"
            assert "matched the reference on this GPU" in choice.why
        assert len(calls) == 2
        assert self.explained().name == "fla"
        assert len(calls) == 2, "checked once per kind"

    def test_wrong_results(self, monkeypatch):
        self.wrong(monkeypatch, lambda final: 1.01 * final)
        name, why = self.explained()
        assert name == "chunked"
        assert why.endswith("; not fla: its matrix differs from the reference's by 1e-02 of the norm on this GPU")

    def test_a_wrong_gradient(self, monkeypatch):
        self.wrong(monkeypatch, lambda final: final.detach() + 0.9 * (final - final.detach()))
        assert "not fla: its gradient of k differs" in self.explained().why

    def test_nan(self, monkeypatch):
        self.wrong(monkeypatch, lambda final: torch.nan * final)
        assert "not fla: its matrix differs" in self.explained().why

    def test_an_exception(self, monkeypatch):
        self.wrong(monkeypatch, lambda final: 1 / 0)
        assert self.explained().why.endswith("not fla: division by zero")

    def test_not_installed(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "fla", None)
        monkeypatch.setitem(sys.modules, "fla.ops.gated_delta_rule", None)
        assert "expected the package fla-core, found none" in self.explained().why

    def test_an_unsupported_rule(self):
        assert "not fla: backend 'fla': expected a write rule" in self.explained(writes=2, decay=4).why
        assert self.explained(t=63) == self.explained(t=63, decay=0)

    def test_a_call_of_the_operation_runs_the_check(self, calls):
        inputs = self.kind.inputs(2, 70)
        got = self.kind.call(inputs, state=None)
        assert len(calls) == 2, "the check, then the call"
        for mine, theirs in zip(got, self.kind.call(inputs, state=None, backend="reference"), strict=True):
            close(mine, theirs)

    @pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # raised by torch's tracer
    def test_compiled_code_runs_the_check(self, calls):
        torch._dynamo.reset()
        inputs, graphs = self.kind.inputs(2, 70), []
        torch.compile(self.kind.call, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph)(inputs)
        assert torch.ops.hqlt.fla.default in {node.target for node in graphs[0].graph.nodes}

    def test_the_global_random_state_is_not_changed(self):
        before = torch.get_rng_state()
        self.explained()
        assert torch.equal(before, torch.get_rng_state())

    def test_fake_tensors_do_not_run_the_check(self):
        with FakeTensorMode():
            assert "not tried yet" in self.explained().why
        assert self.explained().name == "fla"


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # raised by torch's tracer
@pytest.mark.parametrize("kind", [Kind("matrix", "k"), Kind("none", "k"), Kind("rows", "none")], ids=str)
def test_compiled_code_contains_one_operator(kind, calls):
    torch._dynamo.reset()
    inputs, state = kind.inputs(2, 5), normal(2, HEADS, KEY, VALUE)
    leaves = [x.requires_grad_() for x in tree_leaves(inputs) if isinstance(x, torch.Tensor)] + [state.requires_grad_()]
    resets = torch.zeros(2, 5, dtype=torch.bool)
    resets[0, 3] = True

    def loss(backend):
        out, matrix = kind.call(inputs, state=state, resets=resets, backend=backend)[:2]
        return out.square().sum() + matrix.square().sum()

    expected = torch.autograd.grad(loss("reference"), leaves)
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")("fla"), leaves)
    for mine, theirs in zip(got, expected, strict=True):
        close(mine, theirs)


def test_the_operator_is_registered_correctly(calls):
    from hqlt.ops.fast_weights.fla import operator

    q, k, v, beta, decay = Kind("matrix", "k").inputs(2, 5)
    tensors = q, k[:, :, 0], v[:, :, 0], beta[:, :, 0], decay, normal(2, HEADS, KEY, VALUE)
    arguments = *(x.requires_grad_() for x in tensors), None, True, 0.5
    torch.library.opcheck(operator, arguments)
