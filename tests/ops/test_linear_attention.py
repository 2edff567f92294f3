from __future__ import annotations

import pytest
import torch

from hqlt.ops import LinearState, linear_attention
from hqlt.ops.backend import IMPLEMENTATIONS
from tests.laws import Laws, Memory, close, normal
from tests.ops.inputs import HEADS, TOLERANCE, queries, strided, values

every_backend = pytest.mark.parametrize("backend", IMPLEMENTATIONS["linear_attention"])


def positive(b, t, seed=0, width=4):
    return queries(b, t, seed, width).exp()


def memory(backend):
    def run(inputs, state, resets, backend=backend):
        return linear_attention(*inputs, state=state, resets=resets, backend=backend)

    def inputs(b, t):
        return positive(b, t), positive(b, t, 1), values(b, t)

    return Memory(run, lambda *x: run(*x, backend="reference"), inputs)


class TestLaws(Laws):
    longest = 150

    @pytest.fixture(params=IMPLEMENTATIONS["linear_attention"])
    def build(self, request):
        return lambda window: memory(request.param)


@every_backend
class TestByHand:
    def test_normaliser_sums_over_time_not_over_heads(self, backend):
        """Head 0: k = 1, 3 with v = 2, 6: 2/1, then (2 + 18)/(1 + 3) = 5. Head 1: k = 1, 1 with v = 0, 4: 0, then 2.

        Summed over heads instead, the second read of head 0 would be 20/(3 + 1) = 5 too, but its first 2/2 = 1.
        """
        k = torch.tensor([[1.0, 1.0], [3.0, 1.0]], dtype=torch.float64).view(1, 2, 2, 1)
        v = torch.tensor([[2.0, 0.0], [6.0, 4.0]], dtype=torch.float64).view(1, 2, 2, 1)
        out, (W, z) = linear_attention(torch.ones_like(k), k, v, backend=backend)
        close(out.squeeze(), torch.tensor([[2.0, 0.0], [5.0, 2.0]]), 1e-9)
        assert W.flatten().tolist() == [20, 4]
        assert z.flatten().tolist() == [4, 2]

    def test_scale_of_the_query_cancels(self, backend):
        q, k, v = memory(backend).inputs(2, 9)
        once, _ = linear_attention(q, k, v, backend=backend)
        close(linear_attention(100 * q, k, v, backend=backend)[0], once, 1e-8)

    def test_empty_memory_reads_zero(self, backend):
        """A zero key writes nothing."""
        q, k, v = memory(backend).inputs(1, 2)
        assert not linear_attention(q, 0 * k, v, backend=backend)[0].any()


@every_backend
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_dtypes(backend, dtype):
    inputs = [x.to(dtype) for x in memory("reference").inputs(2, 90)]
    out, state = linear_attention(*inputs, backend=backend)
    expected, exact = linear_attention(*(x.double() for x in inputs), backend="reference")
    assert out.dtype == dtype
    close(out.double(), expected, TOLERANCE[dtype])
    for mine, theirs in zip(state, exact, strict=True):
        assert mine.dtype == torch.promote_types(dtype, torch.float32)
        close(mine.double(), theirs, min(TOLERANCE[dtype], 2e-5))


@every_backend
@pytest.mark.parametrize("t", [0, 1, 63, 64, 65, 131])
@pytest.mark.parametrize(("b", "k", "v"), [(1, 4, 3), (5, 3, 7), (2, 1, 1)])
def test_sizes(backend, t, b, k, v):
    inputs = positive(b, t, width=k), positive(b, t, 1, width=k), values(b, t, width=v)
    state = LinearState(normal(b, HEADS, k, v), normal(b, HEADS, k).exp())
    out, after = linear_attention(*inputs, state=state, backend=backend)
    expected, expected_after = linear_attention(*inputs, state=state, backend="reference")
    for mine, theirs in zip((out, *after), (expected, *expected_after), strict=True):
        close(mine, theirs)


@every_backend
def test_memory_layout_does_not_matter(backend):
    inputs = memory(backend).inputs(2, 37)
    expected, _ = linear_attention(*inputs, backend=backend)
    close(linear_attention(*map(strided, inputs), backend=backend)[0], expected)


@every_backend
@pytest.mark.parametrize("t", [1, 17, 70])
def test_every_output_is_written(backend, t, poisoned_memory):
    inputs = [x.requires_grad_() for x in memory(backend).inputs(2, t)]
    out, state = linear_attention(*inputs, backend=backend)
    for x in (out, *state, *torch.autograd.grad(out.sum() + sum(z.sum() for z in state), inputs)):
        assert x.isfinite().all()


def test_state_of_wrong_shape_is_named():
    q, k, v = memory("reference").inputs(2, 5)
    with pytest.raises(ValueError, match=r"key_sum: .* with h = 2"):
        linear_attention(q, k, v, state=LinearState(torch.zeros(2, HEADS, 4, 3), torch.zeros(2, 1, 4)))
