"""Tokens that are not live, and grouped query heads, in every operation and backend."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hqlt import ops
from hqlt.ops.backend import IMPLEMENTATIONS
from tests.laws import Laws, Memory, close, normal
from tests.ops.inputs import HEADS, queries, strengths, values

GROUP = 3
SCANS = ("delta_rule", "fast_weights", "linear_attention")
EVERY_SCAN = [(op, name) for op in SCANS for name in IMPLEMENTATIONS[op] if name != "fla"]  # fla needs a GPU
EVERY = [*EVERY_SCAN, *(("window_attention", name) for name in IMPLEMENTATIONS["window_attention"])]


def scan(op, backend, inputs, state=None, **options):
    """Returns the output, and the state as a tuple.

    inputs: q, k and v; for the delta rule also β; for `fast_weights` also β, log α and the erased keys.
    """
    if op == "fast_weights":
        q, k, v, *others = inputs
        optional = dict(zip(("beta", "decay", "erase"), others, strict=True))
        out, W = ops.fast_weights(q, k, v, **optional, state=state and state[0], backend=backend, **options)
        return out, (W,)
    if op == "delta_rule":
        out, W = ops.delta_rule(*inputs, state=state and state[0], backend=backend, **options)
        return out, (W,)
    return ops.linear_attention(*inputs, state=state and ops.LinearState(*state), backend=backend, **options)


def scan_inputs(op, b, t, g=GROUP, k=4, v=3):
    q, key, value = queries(b, t, 0, k, g * HEADS), queries(b, t, 1, k), values(b, t, width=v)
    if op == "fast_weights":
        return q, key, value, strengths(b, t), -normal(b, t, HEADS, k, seed=33).exp(), queries(b, t, 2, k)
    return (q, key, value, strengths(b, t)) if op == "delta_rule" else (q.exp(), key.exp(), value)


def state_of(op, b, k=4, v=3):
    matrix = normal(b, HEADS, k, v, seed=30)
    return (matrix, normal(b, HEADS, k, seed=31).exp()) if op == "linear_attention" else (matrix,)


def scan_memory(op, backend):
    """The operation as a memory. The sign of an additional input marks the live tokens."""

    def run(inputs, state, resets, backend=backend):
        *inputs, mark = inputs
        return scan(op, backend, inputs, state, resets=resets, live=mark > 0)

    return Memory(
        run, lambda *x: run(*x, backend="reference"), lambda b, t: (*scan_inputs(op, b, t), normal(b, t, seed=32))
    )


class TestScanLaws(Laws):
    longest = 70

    @pytest.fixture(params=EVERY_SCAN, ids="-".join)
    def build(self, request):
        return lambda window: scan_memory(*request.param)


def attention_memory(backend, window):
    def run(inputs, state, resets, backend=backend):
        q, *entries = inputs
        new = [*entries, q.new_zeros(q.shape[:2], dtype=torch.bool) if resets is None else resets]
        k, v, marked = new if state is None else (torch.cat(x, dim=1) for x in zip(state, new, strict=True))
        out = ops.window_attention(q, k, v, window=window, resets=marked, backend=backend)
        held = max(k.shape[1] - window + 1, 0)
        return out, (k[:, held:], v[:, held:], marked[:, held:])

    def inputs(b, t):
        return 3 * queries(b, t, heads=GROUP * HEADS), queries(b, t, 1), values(b, t)

    return Memory(run, lambda *x: run(*x, backend="reference"), inputs, canonical=False)


class TestWindowLaws(Laws):
    longest = 150

    @pytest.fixture(params=IMPLEMENTATIONS["window_attention"])
    def build(self, request):
        return lambda window: attention_memory(request.param, window)


@pytest.mark.parametrize(("op", "backend"), EVERY_SCAN)
def test_a_token_that_is_not_live_is_read_and_not_written(op, backend):
    """The other tokens give the same results without such tokens, which read the state before them."""
    inputs, state, live = scan_inputs(op, 1, 40), state_of(op, 1), normal(1, 40, seed=3) > 0
    out, after = scan(op, backend, inputs, state, live=live)
    alone, alone_after = scan(op, backend, [x[live][None] for x in inputs], state)
    close(out[live], alone[0])
    for mine, theirs in zip(after, alone_after, strict=True):
        close(mine, theirs)
    for i in (~live[0]).nonzero().flatten().tolist():
        _, (W, *key_sum) = scan(op, "reference", [x[:, :i] for x in inputs], state, live=live[:, :i])
        q = inputs[0][0, i].unflatten(0, (HEADS, GROUP))
        read = torch.einsum("hkv,hgk->hgv", W[0], q)
        read = read / torch.einsum("hk,hgk->hg", key_sum[0][0], q)[..., None] if key_sum else read / 2
        close(out[0, i], read.flatten(0, 1))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("with_resets", [False, True])
@pytest.mark.parametrize(("op", "backend"), EVERY_SCAN)
def test_inputs_of_tokens_that_are_not_live_have_no_effect(op, backend, with_resets, bad):
    live = normal(2, 37, seed=3) > 0
    resets = normal(2, 37, seed=4) > 1 if with_resets else None
    results = []
    for filling in (0.0, bad):
        q, *rest = scan_inputs(op, 2, 37)
        for x in rest:
            x[~live] = filling
        leaves = [x.requires_grad_() for x in (q, *rest, *state_of(op, 2))]
        count = len(rest) + 1
        out, after = scan(op, backend, leaves[:count], tuple(leaves[count:]), resets=resets, live=live)
        number = sum((x * normal(*x.shape, seed=5)).sum() for x in (out, *after))
        gradients = torch.autograd.grad(number, leaves)
        assert not any(x[~live].any() for x in gradients[1:count])
        with torch.no_grad():
            again = scan(op, backend, leaves[:count], tuple(leaves[count:]), resets=resets, live=live)
        results.append((out, *after, *gradients, again[0], *again[1]))
    for mine, theirs in zip(*results, strict=True):
        close(mine, theirs)


@pytest.mark.parametrize(("op", "backend"), EVERY_SCAN)
def test_all_live_equals_the_default(op, backend):
    inputs = scan_inputs(op, 2, 37)
    got, expected = (scan(op, backend, inputs, live=live) for live in (torch.ones(2, 37, dtype=torch.bool), None))
    close(got[0], expected[0])
    for mine, theirs in zip(got[1], expected[1], strict=True):
        close(mine, theirs)


@given(data=st.data())
@pytest.mark.parametrize(("op", "backend"), EVERY)
def test_grouped_heads_equal_repeated_heads(op, backend, data):
    """With k, v, β and the state repeated for each query head, reads and matrices are equal, and gradients add up."""
    b, t, g, k, v = (data.draw(st.integers(1, most)) for most in (3, 40, 4, 20, 20))
    window, held = data.draw(st.integers(1, 9)), data.draw(st.integers(0, 5))
    resets, live = (data.draw(st.none() | st.just(normal(b, t, seed=i) > 0.7)) for i in (40, 41))
    if op == "window_attention":
        inputs = queries(b, t, 0, k, g * HEADS), queries(b, held + t, 1, k), values(b, held + t, width=v)
    else:
        inputs = *scan_inputs(op, b, t, g, k, v), *state_of(op, b, k, v)
    states = {"delta_rule": 1, "fast_weights": 1, "linear_attention": 2}.get(op, 0)

    def run(backend, *x):
        if op == "window_attention":
            return (ops.window_attention(*x, window=window, backend=backend),)
        out, after = scan(op, backend, x[:-states], x[-states:], resets=resets, live=live)
        return out, *after

    def repeated(q, *x):
        axes = [*(2,) * (len(x) - states), *(1,) * states]
        out, *after = run("reference", q, *(y.repeat_interleave(g, dim=a) for y, a in zip(x, axes, strict=True)))
        return out, *(y[:, ::g] for y in after)

    results = []
    for function in (lambda *x: run(backend, *x), repeated):
        leaves = [x.detach().requires_grad_() for x in inputs]
        outputs = function(*leaves)
        number = sum((x * normal(*x.shape, seed=i)).sum() for i, x in enumerate(outputs))
        results.append((*outputs, *torch.autograd.grad(number, leaves, materialize_grads=True)))
    for mine, theirs in zip(*results, strict=True):
        assert mine.shape == theirs.shape
        close(mine, theirs)


@pytest.mark.parametrize("heads", [0, 1, 3])
@pytest.mark.parametrize("op", [*SCANS, "window_attention"])
def test_query_heads_that_are_not_a_multiple_are_rejected(op, heads):
    q, *rest = scan_inputs(op, 2, 5)
    q = q[:, :, :heads]
    with pytest.raises(ValueError, match=f"q: expected heads in a multiple of the 2 heads of k and v, got {heads}"):
        ops.window_attention(q, *rest, window=2) if op == "window_attention" else scan(op, None, (q, *rest))


@pytest.mark.parametrize("op", SCANS)
def test_invalid_marks_are_rejected(op):
    inputs = scan_inputs(op, 2, 5)
    with pytest.raises(
        ValueError, match=r"live: expected a bool tensor of shape \[b, t\] = \[2, 5\].*float32 \[2, 5\]"
    ):
        scan(op, None, inputs, live=torch.ones(2, 5))
    with pytest.raises(ValueError, match="live: expected on cpu"):
        scan(op, None, inputs, live=torch.ones(2, 5, dtype=torch.bool, device="meta"))
