"""The native implementations against the references: outputs, final states and gradients, on every instruction set."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hqlt import native
from hqlt.ops.delta_rule import native as delta_native
from hqlt.ops.delta_rule import reference as delta_reference
from hqlt.ops.fast_weights import native as fast_native
from hqlt.ops.fast_weights import reference as fast_reference
from hqlt.ops.linear_attention import LinearState
from hqlt.ops.linear_attention import native as linear_native
from hqlt.ops.linear_attention import reference as linear_reference
from hqlt.ops.window_attention import native as window_native
from hqlt.ops.window_attention import reference as window_reference

pytestmark = pytest.mark.skipif(bool(native.why_not()), reason=native.why_not() or "native")

TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5}
DTYPES = [torch.float64, torch.float32]
LENGTHS = [1, 2, 31, 33, 100]
WIDTHS = [(1, 1), (3, 3), (16, 16), (50, 50), (64, 64), (128, 128), (3, 70), (50, 16), (16, 50), (128, 5)]
RULES = {
    # decay, erase, writes per token
    "gated-delta": ("matrix", True, 1),
    "kda": ("rows", True, 1),
    "gla": ("rows", False, 1),
    "delta-product": (None, True, 3),
    "everything": ("rows", "other", 2),
}
FORMS = {
    "delta_rule": (delta_reference.delta_rule, delta_native.delta_rule),
    **dict.fromkeys(RULES, (fast_reference.fast_weights, fast_native.fast_weights)),
    "linear_attention": (linear_reference.linear_attention, linear_native.linear_attention),
    "window_attention": (window_reference.window_attention, window_native.window_attention),
}


def case(op: str, b: int, t: int, h: int, k: int, v: int, dtype: torch.dtype, *, held=0, window=7, g=1):
    """Returns tensors to differentiate, and a function (implementation, tensors) → flat tuple of outputs.

    The function also passes random resets and live marks, if the operation supports them, unless marked=False.
    """
    generator = torch.Generator().manual_seed(t + 1000 * k + v)
    normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=dtype)  # noqa: E731
    resets = torch.rand(b, t + held, generator=generator) < 0.15
    marks = {"resets": resets, "live": torch.rand(b, t + held, generator=generator) < 0.7}
    nothing = dict.fromkeys(marks)
    unit = torch.nn.functional.normalize
    if op == "delta_rule":
        beta = 2 * torch.rand(b, t, h, generator=generator, dtype=dtype)
        inputs = unit(normal(b, t, g * h, k), dim=-1), unit(normal(b, t, h, k), dim=-1), normal(b, t, h, v), beta
        inputs = (*inputs, normal(b, h, k, v))

        def run(form, tensors, marked=True):
            *x, state = tensors
            return form(*x, scale=0.7, state=state, **(marks if marked else nothing))

    elif op in RULES:
        decay, erase, m = RULES[op]
        beta = 2 * torch.rand(b, m * t, h, generator=generator, dtype=dtype)
        inputs = [
            unit(normal(b, t, g * h, k), dim=-1),
            unit(normal(b, m * t, h, k), dim=-1),
            normal(b, m * t, h, v),
            beta,
        ]
        inputs += [normal(b, t, h, *((k,) if decay == "rows" else ())).abs().neg()] if decay else []
        inputs += [unit(normal(b, m * t, h, k), dim=-1)] if erase == "other" else []
        inputs += [normal(b, h, k, v)]

        def run(form, tensors, marked=True):
            q, key, v, beta, *x, state = tensors
            alpha = x.pop(0) if decay else None
            a = x.pop() if x else erase
            return form(q, key, v, beta, alpha, a, scale=0.7, state=state, **(marks if marked else nothing))

    elif op == "linear_attention":
        inputs = normal(b, t, g * h, k).exp(), normal(b, t, h, k).exp(), normal(b, t, h, v)
        inputs = (*inputs, normal(b, h, k, v), normal(b, h, k).exp())

        def run(form, tensors, marked=True):
            *x, matrix, key_sum = tensors
            out, state = form(*x, state=LinearState(matrix, key_sum), **(marks if marked else nothing))
            return out, *state

    else:
        inputs = normal(b, t, g * h, k), normal(b, t + held, h, k), normal(b, t + held, h, v)

        def run(form, tensors, marked=True):
            return (form(*tensors, window=window, scale=0.7, resets=resets if marked else None),)

    return [x.requires_grad_() for x in inputs], run


def assert_same(op: str, inputs: list[Tensor], run, **options) -> None:
    reference, fast = FORMS[op]
    expected, got = run(reference, inputs, **options), run(fast, inputs, **options)
    weights = [torch.randn_like(x) for x in expected]
    expected += torch.autograd.grad(expected, inputs, weights)
    got += torch.autograd.grad(got, inputs, weights)
    for i, (e, g) in enumerate(zip(expected, got, strict=True)):
        assert e.shape == g.shape and e.dtype == g.dtype
        error = (e - g).norm() / e.norm().clamp_min(1)
        assert error < TOLERANCE[e.dtype], f"{op}: tensor {i} of outputs and gradients is off by {error:.1e}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", FORMS)
@pytest.mark.parametrize("t", LENGTHS)
@pytest.mark.parametrize("marked", [False, True])
def test_lengths(op, t, dtype, marked):
    inputs, run = case(op, 2, t, 3, 16, 20, dtype)
    assert_same(op, inputs, run, marked=marked)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", FORMS)
@pytest.mark.parametrize(("k", "v"), WIDTHS)
def test_widths(op, k, v, dtype):
    assert_same(op, *case(op, 2, 19, 2, k, v, dtype))


@settings(max_examples=25)
@given(
    st.sampled_from(sorted(FORMS)),
    st.integers(1, 3), st.integers(1, 40), st.integers(1, 3), st.integers(1, 70), st.integers(1, 70),
    st.integers(0, 20), st.integers(1, 50), st.sampled_from(DTYPES), st.integers(1, 4), st.booleans(),
)  # fmt: skip
def test_any_shape(op, b, t, h, k, v, held, window, dtype, g, marked):
    held = held if op == "window_attention" else 0
    assert_same(op, *case(op, b, t, h, k, v, dtype, held=held, window=window, g=g), marked=marked)


@pytest.mark.parametrize(("t", "window"), [(300, 64), (700, 200), (130, 1), (257, 1000), (1030, 129)])
def test_windows_over_several_stretches_of_queries(t, window):
    for g in (1, 3):
        inputs, run = case("window_attention", 1, t, 1, 8, 8, torch.float64, held=37, window=window, g=g)
        assert_same("window_attention", inputs, run)


@pytest.mark.parametrize("op", FORMS)
def test_tensors_that_are_not_contiguous(op):
    inputs, run = case(op, 2, 9, 3, 16, 20, torch.float64)
    strided = [x.detach().mT.contiguous().mT.requires_grad_() for x in inputs]
    assert not all(x.is_contiguous() for x in strided)
    assert_same(op, strided, run)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("op", FORMS)
def test_half_precision_gradients_keep_their_type(op, dtype):
    inputs, run = case(op, 2, 9, 3, 16, 20, torch.float32)
    halves = [x.detach().to(dtype).requires_grad_() for x in inputs]
    states = {"linear_attention": 2, "window_attention": 0}.get(op, 1)
    halves = halves[: len(halves) - states] + [x.detach().requires_grad_() for x in inputs[len(inputs) - states :]]
    outputs = run(FORMS[op][1], halves)
    grads = torch.autograd.grad(outputs, halves, [torch.ones_like(o) for o in outputs])
    for grad, x in zip(grads, halves, strict=True):
        assert grad.dtype == x.dtype and grad.isfinite().all()


@pytest.fixture(params=["torch's threads", "our own threads"])
def thread_pool(request):
    native._library.hqlt_use_openmp(native._openmp() if request.param == "torch's threads" else None)
    yield
    native._library.hqlt_use_openmp(native._openmp())


@pytest.mark.usefixtures("thread_pool")
@pytest.mark.parametrize("op", FORMS)
def test_every_number_of_threads_gives_the_same_numbers(op):
    inputs, run = case(op, 1, 300, 2, 64, 64, torch.float32, window=64, g=2)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5, 1):
            torch.set_num_threads(threads)
            out = run(FORMS[op][1], inputs)
            results.append((*out, *torch.autograd.grad(out, inputs, [torch.ones_like(o) for o in out])))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for expected, got in zip(results[0], other, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("op", FORMS)
def test_every_output_is_written(op):
    for k, v in WIDTHS:
        inputs, run = case(op, 2, 21, 2, k, v, torch.float32)
        outputs = run(FORMS[op][1], inputs)
        for x in (*outputs, *torch.autograd.grad(outputs, inputs, [torch.ones_like(o) for o in outputs])):
            assert x.isfinite().all()


@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize("op", FORMS)
def test_registration(op, marked):
    inputs, _ = case(op, 2, 5, 2, 4, 6, torch.float64, g=2)
    resets, live = torch.rand(2, 2, 5) < 0.3 if marked else (None, None)
    if op == "delta_rule":
        arguments, forward = (*inputs, resets, live, 0.5, True), delta_native._forward
    elif op in RULES:
        decay, erase, _ = RULES[op]
        *x, state = inputs
        x += [None] * (not decay) + [None] * (erase != "other")
        arguments, forward = (*x, state, resets, live, bool(erase), 0.5, True), fast_native._forward
    elif op == "linear_attention":
        arguments, forward = (*inputs, resets, live), linear_native._forward
    else:
        arguments, forward = (*inputs, resets, None, None, None, 3, 0, 0.5), window_native._forward
    torch.library.opcheck(forward, arguments)


@pytest.mark.parametrize("op", FORMS)
def test_gradients_by_finite_differences(op):
    inputs, run = case(op, 1, 4, 1, 2, 3, torch.float64, g=2)
    assert torch.autograd.gradcheck(lambda *x: run(FORMS[op][1], x), inputs)


@pytest.mark.parametrize("op", ["delta_rule", *RULES])
def test_second_derivatives_by_finite_differences(op):
    inputs, run = case(op, 1, 3, 1, 2, 2, torch.float64)
    assert torch.autograd.gradgradcheck(lambda *x: run(FORMS[op][1], x), inputs)


def _in_child(queue, run, inputs) -> None:
    queue.put(run(FORMS["delta_rule"][1], inputs)[0].tolist())


def test_a_forked_child_uses_its_own_threads():
    # The child calls only the kernel, because PyTorch's OpenMP threads hang in a forked child.
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        inputs, run = case("delta_rule", 1, 300, 2, 64, 64, torch.float32)
        inputs = [x.detach() for x in inputs]
        expected = run(FORMS["delta_rule"][1], inputs)[0].tolist()
        context = multiprocessing.get_context("fork")
        queue = context.Queue()
        child = context.Process(target=_in_child, args=(queue, run, inputs))
        child.start()
        assert queue.get(timeout=60) == expected
        child.join(60)
        assert child.exitcode == 0
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif("HQLT_NATIVE_ISA" in os.environ, reason="runs only in the parent process")
@pytest.mark.parametrize("isa", ["plain", "avx2", "avx512"])
def test_every_instruction_set(isa):
    environment = os.environ | {"HQLT_NATIVE_ISA": isa}
    command = [sys.executable, "-c", "from hqlt import native; print(native.instruction_set())"]
    if subprocess.run(command, env=environment, capture_output=True, text=True).stdout.strip() != isa:
        pytest.skip(f"this machine has no {isa}")
    tests = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(Path(__file__))]
    tests += [str(Path(__file__).with_name("test_beyond.py")), "-k", "widths or stretches or any_shape"]
    run = subprocess.run(tests, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:]


def test_a_missing_library_warns_once(monkeypatch):
    monkeypatch.setattr(native, "_library", None)
    monkeypatch.setattr(native, "_why_not", "gone for this test")
    monkeypatch.setattr(native, "_warned", False)
    with pytest.warns(RuntimeWarning, match="gone for this test"):
        assert not native.available()
    assert not native.available()
    with pytest.raises(RuntimeError, match="gone for this test"):
        native.run("delta_rule_forward", (1,), 1.0, (torch.ones(1),))


def test_a_library_built_from_other_sources_is_rejected(monkeypatch):
    """After an update without a rebuild, its functions might be called with the wrong arguments."""
    assert native._load()[1] == ""
    monkeypatch.setattr(native, "_digest_of_sources", lambda: b"others")
    library, why = native._load()
    assert library is None
    assert "built from other sources" in why
