"""Fuzz test of the native operations with hypothesis. It is a program, so that a crash becomes an exit status.

Accepted arguments must give the reference's results; all others must raise a ValueError or one of PyTorch's own errors.
"""

from __future__ import annotations

import sys

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from hqlt import native, ops

OPERATORS = torch.ops.hqlt
REFUSALS = (ValueError, RuntimeError, NotImplementedError, MemoryError, IndexError, TypeError)
OPS = ["delta_rule", "fast_weights", "linear_attention", "window_attention", "beyond", "expiry"]
OPS += ["unit_silu", "rotated", "mix", "rms_norm"]
SIZES = st.sampled_from([1, 0, 2, 3, 5, 16, 17, 33])
LAYOUTS = (
    "plain",
    "plain",
    "plain",
    "expanded",
    "transposed",
    "gaps",
    "offset",
    "misaligned",
    "negated",
    "meta",
    "other",
)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same numbers (except for meta) in another memory layout."""
    if layout == "expanded" and x.dim():
        return x[:1].expand(x.shape)
    if layout == "transposed" and x.dim() > 1:
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "gaps":
        return torch.stack([x, torch.full_like(x, True)], dim=-1)[..., 0]
    if layout == "offset":
        return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
    if layout == "misaligned" and x.numel():
        raw = bytearray(x.numel() * x.element_size() + 1)
        moved = torch.frombuffer(raw, dtype=x.dtype, offset=1, count=x.numel()).view(x.shape)
        return moved.copy_(x)
    if layout == "negated" and x.is_floating_point():
        return torch._neg_view(-x)
    if layout == "meta":
        return x.to("meta")
    return x.double() if layout == "other" and x.is_floating_point() else x


@st.composite
def calls(draw):
    b, t, h, k, v, held = (draw(SIZES) for _ in range(6))
    queries = h * draw(st.sampled_from([1, 1, 2, 3]))
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    wrong = draw(st.integers(0, 30))  # index of a tensor with a wrong shape; mostly there is none

    def tensor(*shape, marks=None, like=None):
        nonlocal wrong
        wrong -= 1
        if wrong == 0:
            shape = (*shape[:-1], shape[-1] + 1)
        x = torch.rand(shape) < marks if marks else (0.01 + 0.3 * torch.rand(shape)).to(dtype)
        x = like(shape).expand(shape) if like else x
        return laid_out(x, draw(st.sampled_from(LAYOUTS)))

    def marks(l, part=0.3):
        return draw(st.sampled_from([None, 1])) and tensor(b, l, marks=part)

    op = draw(st.sampled_from(OPS))
    if op == "delta_rule":
        q, key, value, beta = tensor(b, t, queries, k), tensor(b, t, h, k), tensor(b, t, h, v), tensor(b, t, h)
        options = {"state": tensor(b, h, k, v), "resets": marks(t), "live": marks(t, 0.7)}
        return op, (q, key, value, beta), options
    if op == "fast_weights":
        n = t * draw(st.sampled_from([1, 1, 2, 3]))
        arguments = tensor(b, t, queries, k), tensor(b, n, h, k), tensor(b, n, h, v)
        given = {"beta": tensor(b, n, h), "decay": draw(st.sampled_from([None, -tensor(b, t, h), -tensor(b, t, h, k)]))}
        given["erase"] = draw(st.sampled_from([True, False, tensor(b, n, h, k)]))
        return op, arguments, {**given, "state": tensor(b, h, k, v), "resets": marks(t), "live": marks(t, 0.7)}
    if op == "linear_attention":
        state = ops.LinearState(tensor(b, h, k, v), tensor(b, h, k))
        inputs = tensor(b, t, queries, k), tensor(b, t, h, k), tensor(b, t, h, v)
        return op, inputs, {"state": state, "resets": marks(t), "live": marks(t, 0.7)}
    if op in ("window_attention", "beyond"):
        l, window = t + held, draw(st.sampled_from([1, 3, 40, 2**40, None]))
        inputs = tensor(b, t, queries, k), tensor(b, l, h, k), tensor(b, l, h, v)
        options = {"window": window, "resets": marks(l), "reach": draw(st.sampled_from(["sliding", "chunk"]))}
        if op == "window_attention":
            return op, inputs, options
        never = draw(st.sampled_from([l, 2**62, 2**63 - 1, -(2**63)]))
        expiry = tensor(
            b, l, h, like=lambda shape: torch.randint(-3, l + 9, shape).masked_fill(torch.rand(shape) < 0.1, never)
        )
        far = draw(st.sampled_from([None, 1])) and (tensor(b, t, queries, k), tensor(b, l, h, k))
        beyond = ops.Beyond(expiry, draw(st.sampled_from([0, 7, 2**40])), *(far or ()))
        return "window_attention", inputs, options | {"beyond": beyond}
    if op == "expiry":
        leaves = tensor(b, t, like=lambda shape: torch.arange(shape[-1]) + held)
        kept = draw(st.sampled_from([1, 3, 40, 2**40]))
        return op, (tensor(b, t, h), leaves), {"kept": kept, "used": marks(t, 0.7), "resets": marks(t)}
    if op == "rotated":
        return op, (tensor(b, t, h, k), tensor(t, 1, k // 2), tensor(t, 1, k // 2)), {}
    if op == "mix":
        return op, (*(tensor(b, t, h, v) for _ in range(3)), tensor(v)), {"eps": 1e-6}
    if op == "rms_norm":
        return op, (tensor(b, t, h, k), tensor(k)), {"eps": 1e-6}
    return op, (tensor(b, t, h, k),), {}


def flat(result):
    return [result] if isinstance(result, Tensor) else [y for x in result for y in flat(x)]


def outcome(op, arguments, options, backend):
    count, named = len(arguments), {name: x for name, x in options.items() if isinstance(x, Tensor)}
    leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in (*arguments, *named.values())]
    given = options | dict(zip(named, leaves[count:], strict=True))
    try:
        out = flat(getattr(ops, op)(*leaves[:count], **given, backend=backend))
        tracked, variables = [x for x in out if x.requires_grad], [x for x in leaves if x.requires_grad]
        ones = [torch.ones_like(x) for x in tracked]
        grads = torch.autograd.grad(tracked, variables, ones, allow_unused=True) if tracked else ()
        with torch.no_grad():
            plain = flat(getattr(ops, op)(*arguments, **options, backend=backend))
    except REFUSALS as refusal:
        return refusal
    return [*out, *plain, *(g for g in grads if g is not None)]


def check_operation(call):
    op, arguments, options = call
    expected, got = (outcome(op, arguments, options, backend) for backend in ("reference", "native"))
    if isinstance(expected, list) and isinstance(got, list):
        for mine, theirs in zip(got, expected, strict=True):
            assert mine.shape == theirs.shape, (op, mine.shape, theirs.shape)
            if not mine.is_meta and not theirs.is_meta:
                assert mine.isfinite().all()
                error = (mine.double() - theirs.double()).norm() / theirs.double().norm().clamp_min(0.1)
                assert error < 0.03, (op, error)
    elif isinstance(expected, list):
        assert isinstance(got, ValueError), (op, got)


def check_operators(call):
    """Call the registered operators with arbitrary arguments, as an exported program might."""
    op, arguments, options = call
    name = {"rotated": "rotate"}.get(op, op)
    state, resets, live = (options.get(name) for name in ("state", "resets", "live"))
    gates, erase = [options.get(name) for name in ("beta", "decay")], options.get("erase")
    a = erase if isinstance(erase, Tensor) else None
    until, most, *far = options.get("beyond") or (None, 0, None, None)
    rest = {
        "fast_weights": (*gates, a, state, resets, live, erase is not False, 0.5, True),
        "delta_rule": (state, resets, live, 0.5, True),
        "linear_attention": (*(state if isinstance(state, tuple) else ()), resets, live),
        "window_attention": (resets, until, *far, options.get("window") or 7, most, 0.5),
        "expiry": (options.get("used"), resets, options.get("kept")),
        "unit_silu": (),
        "rotated": (1.0,),
    }.get(op, (1e-6,))
    for operator in (name, f"{name}_backward"):
        for extra in ((), arguments[-1:], (arguments[0], state) if isinstance(state, Tensor) else arguments[:2]):
            try:
                getattr(OPERATORS, operator)(*arguments, *extra, *rest)
            except (*REFUSALS, AttributeError):
                continue


def main(examples: int) -> None:
    options = {"max_examples": examples, "deadline": None, "database": None, "derandomize": True}
    profile = settings(**options, suppress_health_check=list(HealthCheck))
    assert not native.why_not(), native.why_not()
    torch.manual_seed(0)
    profile(given(calls())(check_operation))()
    profile(given(calls())(check_operators))()


if __name__ == "__main__":
    main(int(sys.argv[1]))
