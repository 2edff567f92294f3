"""Transforms of PyTorch give correct results, or an error that says what to do."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad

from hqlt import native, ops
from tests.laws import close, normal
from tests.ops.test_boundary import EVERY_HERE, SIZES, case

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # raised by torch's forward-mode AD
OWN = ("reference", "composed")
needs_native = pytest.mark.skipif(bool(native.why_not()), reason=native.why_not() or "native")


def first_output(op, backend=None):
    """Returns a function of the first input alone, and that input."""
    inputs, run, _ = case(op, **SIZES)
    return lambda x: run(backend, x, *inputs[1:])[0], inputs[0]


def jvp(f, x):
    return torch.func.jvp(f, (x,), (x.cos(),))[1]


def dual(f, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, x.cos()))).tangent


def vmap(f, x):
    return torch.func.vmap(lambda scale: f(scale * x))(torch.arange(1.0, 3.0, dtype=x.dtype))


TRANSFORMS = {
    "jvp": jvp,
    "dual levels": dual,
    "grad": lambda f, x: torch.func.grad(lambda x: f(x).square().sum())(x),
    "jacrev": lambda f, x: torch.func.jacrev(lambda x: f(x).sum(dim=(0, 1)))(x),
    "vmap": vmap,
    "vmap of grad": lambda f, x: vmap(torch.func.grad(lambda x: f(x).square().sum()), x),
    "functionalize": lambda f, x: torch.func.functionalize(f)(x),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize(("op", "backend"), EVERY_HERE)
def test_a_transform_gives_the_reference_result(op, backend, transform):
    """By default. A named backend that does not support the transform raises an error."""
    run, x = first_output(op)
    with ops.use_backend("reference"):
        expected = TRANSFORMS[transform](run, x)
    close(TRANSFORMS[transform](run, x), expected)
    named = first_output(op, backend)[0]
    if backend in OWN:
        close(TRANSFORMS[transform](named, x), expected)
    else:
        with pytest.raises(RuntimeError, match=r"does not run under forward-mode AD or a transform .*reference"):
            TRANSFORMS[transform](named, x)


def test_forward_mode_ad_matches_finite_differences():
    f, x = first_output("delta_rule")
    step = 1e-6 * x.cos()
    close(jvp(f, x), (f(x + step) - f(x - step)) / 2e-6, 1e-7)


@pytest.mark.parametrize(("op", "backend"), EVERY_HERE)
def test_second_derivatives_match_the_reference(op, backend):
    inputs, run, _ = case(op, **SIZES)
    results = []
    for name in (backend, "reference"):
        leaves = [x.clone().requires_grad_() for x in inputs]
        number = sum(x.square().sum() for x in run(name, *leaves))
        first = torch.autograd.grad(number, leaves, create_graph=True)
        results.append(torch.autograd.grad(sum(x.square().sum() for x in first), leaves, allow_unused=True))
    for mine, theirs in zip(*results, strict=True):
        close(mine, theirs, 1e-8)


@pytest.mark.parametrize("with_gradients", [False, True])
@pytest.mark.parametrize(("op", "backend"), EVERY_HERE)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_traced_program_works_on_other_inputs(op, backend, with_gradients):
    for name in (None, backend):
        run, x = first_output(op, name)
        with torch.set_grad_enabled(with_gradients):
            if name in ("chunked", "blocked", "dense"):
                with pytest.raises(RuntimeError, match=r"does not run under torch\.jit\.trace"):
                    torch.jit.trace(run, (x,), check_trace=False)
                continue
            program = torch.jit.trace(run, (x.sin().requires_grad_(with_gradients),), check_trace=False)
            close(program(x), run(x))


@pytest.mark.skipif(torch.__version__ < "2.10", reason="torch 2.9 loses the names of *arguments in its checks")
@needs_native
@pytest.mark.parametrize("op", [op for op, backend in EVERY_HERE if backend == "native"])
def test_an_exported_program_supports_any_batch_and_length(op):
    """Exported with b = 2 and t = 3, run with 5 and 11; without state and held entries."""
    sizes = SIZES | {"held": 0}

    class Program(torch.nn.Module):
        def forward(self, *x):
            if op in ("delta_rule", "linear_attention"):
                return getattr(ops, op)(*x)[0]
            if op == "fast_weights":
                return ops.fast_weights(*x[:3], beta=x[3], decay=-x[4].square(), erase=x[5])[0]
            options = {"window_attention": {"window": 2}, "rms_norm": {"eps": 1e-6}, "mix": {"eps": 1e-6}}
            return getattr(ops, op)(*x, **options.get(op, {}))

    def inputs_of(sizes):
        inputs = case(op, **sizes)[0]
        inputs = inputs[: {"delta_rule": 4, "linear_attention": 3, "fast_weights": 6}.get(op)]
        return (*inputs, *normal(2, sizes["t"], 1, 2)) if op == "rotated" else tuple(inputs)

    b, t = torch.export.Dim("b"), torch.export.Dim("t")
    dynamic = [{0: b, 1: t} if x.shape[0] == 2 and x.dim() > 2 else {} for x in inputs_of(sizes)]
    if op == "rotated":
        dynamic[1] = dynamic[2] = {0: t}
    program = torch.export.export(Program(), inputs_of(sizes), dynamic_shapes={"x": tuple(dynamic)}).module()
    for other in (sizes, sizes | {"b": 5, "t": 11}):
        close(program(*inputs_of(other)), Program()(*inputs_of(other)))
