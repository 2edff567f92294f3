"""φ, rotary embedding, RMSNorm and the mixer with RMSNorm: the native implementations against the references."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hqlt import native, ops
from hqlt.ops.features import native as native_features
from hqlt.ops.features import rotated, unit_silu
from hqlt.ops.norm import mix, rms_norm
from hqlt.ops.norm import native as native_norm
from tests.laws import close, normal
from tests.ops.inputs import strided

needs_native = pytest.mark.skipif(bool(native.why_not()), reason=native.why_not() or "native")
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5}
WIDTHS = [1, 2, 3, 6, 16, 20, 32, 50, 64, 128]


def case(op, b, t, h, k, dtype=torch.float64):
    """Returns tensors to differentiate, and a function of a backend and these tensors."""
    x = 3 * normal(b, t, h, k, dtype=dtype)
    if op == "unit_silu":
        return [x.requires_grad_()], lambda backend, x: unit_silu(x, backend=backend)
    if op == "rotated":
        cos, sin = normal(2, t, 1, k // 2, dtype=dtype, seed=1)
        return [x.requires_grad_()], lambda backend, x: rotated(x, cos, sin, backend=backend)
    if op == "rms_norm":
        inputs = [x, normal(k, dtype=dtype, seed=2)]
        return [y.requires_grad_() for y in inputs], lambda backend, *x: rms_norm(*x, eps=1e-6, backend=backend)
    inputs = [x, *normal(2, b, t, h, k, dtype=dtype, seed=1), normal(k, dtype=dtype, seed=2)]
    run = lambda backend, *inputs: mix(*inputs, eps=1e-6, backend=backend)  # noqa: E731
    return [y.requires_grad_() for y in inputs], run


OPS = ["unit_silu", "rotated", "rms_norm", "mix"]


def assert_same(inputs, run):
    results = []
    for backend in ("reference", "native"):
        y = run(backend, *inputs)
        results.append((y, *torch.autograd.grad(y, inputs, normal(*y.shape, dtype=y.dtype, seed=5))))
    for expected, got in zip(*results, strict=True):
        assert got.dtype == expected.dtype and got.shape == expected.shape
        close(got, expected, TOLERANCE[got.dtype] * max(expected.abs().max().item(), 1))


@needs_native
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("op", OPS)
def test_widths(op, width, dtype):
    if op == "rotated" and width % 2:
        pytest.skip("halves are rotated")
    assert_same(*case(op, 2, 7, 3, width, dtype))


@needs_native
@settings(max_examples=25)
@given(st.sampled_from(OPS), st.integers(1, 3), st.integers(1, 40), st.integers(1, 3), st.integers(1, 35))
def test_any_shape(op, b, t, h, half):
    assert_same(*case(op, b, t, h, 2 * half))


@needs_native
@pytest.mark.parametrize("op", OPS)
def test_many_rows_over_threads(op):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert_same(*case(op, 2, 700, 3, 32))
    finally:
        torch.set_num_threads(before)


@needs_native
@pytest.mark.parametrize("op", OPS)
def test_tensors_with_gaps(op):
    inputs, run = case(op, 2, 7, 3, 16)
    assert_same([strided(x.detach()).requires_grad_() for x in inputs], run)


@needs_native
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("width", [2, 20, 64])
@pytest.mark.parametrize("op", OPS)
def test_every_output_is_written(op, width):
    inputs, run = case(op, 2, 7, 3, width)
    y = run("native", *inputs)
    for x in (y, *torch.autograd.grad(y.sum(), inputs)):
        assert x.isfinite().all()


@pytest.mark.parametrize("backend", ["reference", pytest.param("native", marks=needs_native)])
@pytest.mark.parametrize("op", OPS)
def test_gradients_by_finite_differences(op, backend):
    inputs, run = case(op, 1, 2, 2, 4)
    assert torch.autograd.gradcheck(lambda *x: run(backend, *x), inputs)


@pytest.mark.parametrize("backend", ["reference", pytest.param("native", marks=needs_native)])
@pytest.mark.parametrize("op", OPS)
def test_nan_stays_nan_and_stays_in_its_row(op, backend):
    inputs, run = case(op, 1, 3, 1, 4)
    inputs[0] = inputs[0].detach().clone()
    inputs[0][0, 1] = torch.nan
    y = run(backend, *inputs)
    assert y[0, 1].isnan().all() and y[0, [0, 2]].isfinite().all()


@needs_native
def test_registration():
    x, fw, kv, gate = (y.requires_grad_() for y in normal(4, 2, 5, 2, 4))
    cos, sin = normal(2, 5, 1, 2, seed=1)
    torch.library.opcheck(native_features._unit_silu_op, (x,))
    torch.library.opcheck(native_features._rotate_op, (x, cos, sin, 1.0))
    weight = normal(4).requires_grad_()
    torch.library.opcheck(native_norm._rms_norm_op, (x, weight, 1e-6))
    torch.library.opcheck(native_norm._mix_op, (fw, kv, gate, weight, 1e-6))


def test_half_precision_uses_the_reference():
    x = normal(1, 2, 1, 4).bfloat16().requires_grad_()
    y = unit_silu(x)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("op", OPS)
def test_the_choice_has_a_reason(op):
    wide, narrow = ops.explain(op, normal(1, 2, 1, 4)), ops.explain(op, normal(1, 2, 1, 4).bfloat16())
    assert wide.why and narrow.name == "reference"
    with ops.use_backend("reference"):
        assert ops.explain(op, normal(1, 2, 1, 4)).name == "reference"


def test_an_unknown_backend_is_rejected():
    with pytest.raises(ValueError, match=r"unit_silu: backend: expected one of .*, got 'triton'"):
        unit_silu(normal(1, 1, 1, 2), backend="triton")


def test_reads_that_do_not_match_the_gate_are_rejected():
    with pytest.raises(ValueError, match="gate: expected"):
        mix(*normal(2, 1, 2, 1, 4), normal(1, 2, 1, 3), normal(4), eps=1e-6)
    with pytest.raises(ValueError, match="weight: expected"):
        rms_norm(normal(1, 2, 1, 4), normal(3), eps=1e-6)
