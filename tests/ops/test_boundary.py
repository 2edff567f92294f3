"""Operations on empty and invalid arguments: a result of the right shape, or an error that says what was expected."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hqlt import native, ops
from hqlt.ops import LinearState, step
from hqlt.ops.backend import IMPLEMENTATIONS
from tests.laws import close, normal

INDICES = ("expiry",)
"""Operations whose outputs are integers, without gradients; see tests/ops/test_expiry.py."""
EVERY = [(op, backend) for op, names in IMPLEMENTATIONS.items() for backend in names if op not in INDICES]
SIZES = {"b": 2, "t": 3, "h": 2, "k": 4, "v": 3, "held": 2}


def case(op, b, t, h, k, v, held):
    """Returns differentiable tensors, a function of a backend and these tensors, and the shapes of its outputs."""
    q, key, value, beta = normal(b, t, h, k), normal(b, t, h, k), normal(b, t, h, v), normal(b, t, h)
    resets = torch.zeros(b, t + held, dtype=torch.bool)
    resets[:, 1:2] = True
    longer = normal(b, t + held, h, k), normal(b, t + held, h, v)
    cos, sin = normal(2, t + held, 1, k // 2)
    if op == "delta_rule":
        run = lambda backend, *x: ops.delta_rule(*x[:-1], state=x[-1], resets=resets[:, :t], backend=backend)  # noqa: E731
        return [q, key, value, beta, normal(b, h, k, v)], run, [(b, t, h, v), (b, h, k, v)]
    if op == "fast_weights":

        def run(backend, q, k, v, beta, decay, erase, state):
            options = {"beta": beta, "erase": erase, "state": state, "resets": resets[:, :t], "backend": backend}
            return ops.fast_weights(q, k, v, decay=-decay.square(), **options)

        return [q, key, value, beta, beta, key + 1, normal(b, h, k, v)], run, [(b, t, h, v), (b, h, k, v)]
    if op == "linear_attention":

        def run(backend, *x):
            state = LinearState(*x[3:])
            out, after = ops.linear_attention(*x[:3], state=state, resets=resets[:, :t], backend=backend)
            return out, *after

        tensors = [q.exp(), key.exp(), value, normal(b, h, k, v), normal(b, h, k).exp()]
        return tensors, run, [(b, t, h, v), (b, h, k, v), (b, h, k)]
    if op == "window_attention":
        run = lambda backend, *x: (ops.window_attention(*x, window=2, resets=resets, backend=backend),)  # noqa: E731
        return [q, *longer], run, [(b, t, h, v)]
    if op == "synchronous":

        def run(backend, *x):
            options = {"state": x[-1], "resets": resets, "rotary": (cos, sin), "backend": backend}
            return ops.synchronous(*x[:-1], window=2, **options)

        return [q, *longer, beta, value, normal(v), normal(b, h, k, v)], run, [(b, t, h, v), (b, h, k, v)]
    if op == "rotated":
        return [longer[0]], lambda backend, x: (ops.rotated(x, cos, sin, backend=backend),), [(b, t + held, h, k)]
    if op == "unit_silu":
        return [q], lambda backend, x: (ops.unit_silu(x, backend=backend),), [(b, t, h, k)]
    if op == "rms_norm":
        run = lambda backend, *x: (ops.rms_norm(*x, eps=1e-6, backend=backend),)  # noqa: E731
        return [q, normal(k)], run, [(b, t, h, k)]
    run = lambda backend, *x: (ops.mix(*x, eps=1e-6, backend=backend),)  # noqa: E731
    return [value, value + 1, value - 1, normal(v)], run, [(b, t, h, v)]


@pytest.mark.parametrize("names", [*SIZES, "bt", "tk", "kv", "t-held", "bthkv"])
@pytest.mark.parametrize(("op", "backend"), EVERY)
def test_a_size_of_zero_gives_the_reference_result(op, backend, names):
    """Forward and backward. With t = 0 the state is unchanged; with k = 0 a memory reads 0, and attention the mean."""
    empty = names.split("-") if len(names) > 2 and names != "bthkv" else list(names)
    sizes = SIZES | dict.fromkeys(["held"] if names == "held" else empty, 0)
    if names == "held" and backend in ("fla", "triton"):
        pytest.skip("no tensor is empty in this case, so that it needs a GPU")
    inputs, run, shapes = case(op, **sizes)
    results = []
    for name in (backend, "reference"):
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = run(name, *leaves)
        assert [tuple(x.shape) for x in out] == shapes
        gradients = torch.autograd.grad(out, leaves, [torch.ones_like(x) for x in out], allow_unused=True)
        assert all(g is None or g.shape == x.shape for g, x in zip(gradients, leaves, strict=True))
        results.append([*out, *(g for g in gradients if g is not None)])
        if 0 in (sizes["b"], sizes["t"], sizes["h"], sizes["v"]):
            assert results[-1][0].numel() == 0 or op in ("rotated", "unit_silu", "rms_norm")
    for mine, theirs in zip(*results, strict=True):
        close(mine, theirs)


EVERY_HERE = [(op, name) for op, name in EVERY if name not in ("fla", "triton")]


def test_with_key_width_zero_memories_read_zero_and_attention_the_mean():
    inputs, run, _ = case("window_attention", **SIZES | {"k": 0, "held": 0})
    v = inputs[2]
    close(run(None, *inputs)[0][:, 2], v[:, 1:].mean(dim=1))  # reset at 1
    assert not case("delta_rule", **SIZES | {"k": 0})[1](None, *case("delta_rule", **SIZES | {"k": 0})[0])[0].any()


@pytest.mark.parametrize(("op", "backend"), EVERY_HERE)
@pytest.mark.parametrize(
    ("change", "message"),
    [(torch.Tensor.long, "floating-point"), (lambda x: x.to("meta"), "expected on"), (lambda x: x[None], "axes|got")],
)
def test_a_tensor_of_another_kind_is_named(op, backend, change, message):
    inputs, run, _ = case(op, **SIZES)
    for i in range(len(inputs)):
        if (len(inputs) == 1 and message == "expected on") or (op == "rms_norm" and message == "axes|got" and i == 0):
            continue  # a single tensor may be on any device, and x may have any number of axes
        wrong = [change(x) if j == i else x for j, x in enumerate(inputs)]
        with pytest.raises(ValueError, match=message):
            run(backend, *wrong)


def test_resets_elsewhere_are_named():
    q, k, v, beta = normal(1, 2, 1, 2), normal(1, 2, 1, 2), normal(1, 2, 1, 2), normal(1, 2, 1)
    with pytest.raises(ValueError, match="resets: expected on cpu"):
        ops.delta_rule(q, k, v, beta, resets=torch.zeros(1, 2, dtype=torch.bool, device="meta"))


@pytest.mark.parametrize("table", [(5, 1, 2), (3, 1, 3), (3, 2, 2), (3, 2)])
def test_angles_that_do_not_fit_are_named(table):
    for backend in IMPLEMENTATIONS["rotated"]:
        with pytest.raises(ValueError, match=r"cos|sin"):
            ops.rotated(normal(1, 3, 2, 4), normal(*table), normal(*table), backend=backend)


def test_angles_that_are_learned_get_gradients():
    cos, sin = (x.requires_grad_() for x in normal(2, 3, 1, 2))
    ops.rotated(normal(1, 3, 2, 4), cos, sin).sum().backward()
    assert cos.grad is not None and sin.grad is not None


needs_native = pytest.mark.skipif(bool(native.why_not()), reason=native.why_not() or "native")


@needs_native
def test_negated_and_misaligned_memory_is_read_correctly():
    x = normal(2, 3, 2, 4)
    raw = bytearray(8 * x.numel() + 1)
    moved = torch.frombuffer(raw, dtype=x.dtype, offset=1, count=x.numel()).view(x.shape).copy_(x)
    for like in (torch._neg_view(-x), moved):
        close(ops.unit_silu(like, backend="native"), ops.unit_silu(x, backend="reference"))


@needs_native
@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ((torch.ones(2, 3), torch.ones(3, 2)), r"tensor 1: expected \[\*, k\]"),
        ((torch.ones(2, 3), torch.ones(2, 3).double()), "got torch.float64"),
        ((torch.ones(2, 3).half(), torch.ones(2, 3).half()), "expected float32 or float64, got torch.float16"),
        ((torch.ones(2, 3), torch.ones(3, 2).T), "contiguous"),
        ((torch.ones(2, 3, device="meta"), torch.ones(2, 3)), "meta"),
        ((torch.ones(2, 0), torch.ones(2, 0)), "at least 1"),
        ((torch.ones(2, 3), torch._efficientzerotensor(2, 3)), "in CPU memory"),
    ],
)
def test_kernels_reject_other_tensors(tensors, message):
    with pytest.raises(ValueError, match=message):
        native.run("unit_silu_forward", 1e-6, tensors)


@needs_native
def test_one_token_rejects_tensors_without_memory():
    with pytest.raises(ValueError, match="sizes of at least 1, and tensors with memory"):
        native.one_token(0, bytes(step.SIZES_AND_FACTORS.size + step.ADDRESSES.size))


@needs_native
def test_arbitrary_arguments_do_not_crash_the_process():
    root = Path(__file__).parents[2]
    program = [sys.executable, "-m", "tests.ops.fuzz_native", "25"]
    done = subprocess.run(program, cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


LIMITED = """
import resource, torch
from hqlt import ops
x = torch.ones(1, 400_000, 1, 8)
ops.window_attention(x[:, :8], x[:, :8], x[:, :8], window=8, backend="native")
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 40_000_000,) * 2)
try:
    ops.window_attention(x, x, x, window=400_000, backend="native")
except (MemoryError, RuntimeError) as error:
    print(type(error).__name__)
"""


@needs_native
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux's memory limits")
def test_running_out_of_memory_raises_an_error():
    done = subprocess.run([sys.executable, "-c", LIMITED], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "Error" in done.stdout, done.stderr[-2000:]


@needs_native
def test_the_kernel_rejects_query_heads_that_are_not_a_multiple():
    q, k = torch.ones(1, 2, 3, 4), torch.ones(1, 2, 2, 4)
    with pytest.raises(ValueError, match="expected query heads in a multiple of the heads of k"):
        native.run("window_attention_forward", 1.0, (q, k, k, *(None,) * 4, torch.empty_like(q)), 1, 1)
