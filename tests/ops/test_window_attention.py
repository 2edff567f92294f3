from __future__ import annotations

import math

import pytest
import torch

from hqlt.ops import window_attention
from hqlt.ops.backend import IMPLEMENTATIONS
from tests.laws import Laws, Memory, close
from tests.ops.inputs import HEADS, TOLERANCE, queries, strided, values

every_backend = pytest.mark.parametrize("backend", IMPLEMENTATIONS["window_attention"])


def memory(backend, window, reach="sliding"):
    """Attention as a memory. Its state is the held entries: those of the window, or all if the reach needs them."""

    def run(inputs, state, resets, backend=backend):
        q, *entries = inputs
        new = [*entries, q.new_zeros(q.shape[:2], dtype=torch.bool) if resets is None else resets]
        k, v, marked = new if state is None else (torch.cat(x, dim=1) for x in zip(state, new, strict=True))
        out = window_attention(q, k, v, window=window, reach=reach, resets=marked, backend=backend)
        held = max(k.shape[1] - window + 1, 0) if window and reach == "sliding" else 0
        return out, (k[:, held:], v[:, held:], marked[:, held:])

    def inputs(b, t):
        return 3 * queries(b, t), queries(b, t, 1), values(b, t)

    return Memory(run, lambda *x: run(*x, backend="reference"), inputs, canonical=False)


@pytest.fixture(params=IMPLEMENTATIONS["window_attention"])
def backend(request):
    return request.param


class TestSlidingLaws(Laws):
    longest = 150

    @pytest.fixture
    def build(self, backend):
        return lambda window: memory(backend, window)


class TestChunkLaws(Laws):
    longest = 150

    @pytest.fixture
    def build(self, backend):
        return lambda window: memory(backend, window, "chunk")


class TestFullAttentionLaws(Laws):
    @pytest.fixture
    def build(self, backend):
        return lambda window: memory(backend, None)


class TestByHand:
    """A query of zeros weighs all visible entries equally, so it reads the mean of their values (1, 2, 3, 4, 5)."""

    def means(self, backend, window, held=0, reset=None, **options):
        v = torch.arange(1.0, 6.0).view(1, 5, 1, 1)
        resets = None if reset is None else (torch.arange(5) == reset)[None]
        k, q = torch.ones(1, 5, 1, 1), torch.zeros(1, 5 - held, 1, 1)
        out = window_attention(q, k, v, window=window, resets=resets, backend=backend, **options)
        return out.flatten().tolist()

    def test_window_counts_the_token_itself(self, backend):
        assert self.means(backend, 1) == [1, 2, 3, 4, 5]
        assert self.means(backend, 2) == [1, 1.5, 2.5, 3.5, 4.5]

    def test_a_window_longer_than_the_sequence_equals_full_attention(self, backend):
        assert self.means(backend, 9) == self.means(backend, None) == [1, 1.5, 2, 2.5, 3]

    def test_held_entries_come_before_the_new_ones(self, backend):
        assert self.means(backend, 2, held=3) == [3.5, 4.5]

    def test_nothing_is_read_across_a_reset(self, backend):
        assert self.means(backend, 2, reset=3) == [1, 1.5, 2.5, 4, 4.5]

    def test_chunks_are_counted_from_the_segment(self, backend):
        assert self.means(backend, 2, reach="chunk") == [1, 1.5, 3, 3.5, 5]
        assert self.means(backend, 2, reset=3, reach="chunk") == [1, 1.5, 3, 4, 4.5]

    def test_weights_are_a_softmax(self, backend):
        """Scores ln 3 and 0 give weights 3/4 and 1/4, so that the values 4 and 0 are read as 3."""
        k = torch.tensor([math.log(3), 0]).view(1, 2, 1, 1)
        v = torch.tensor([4.0, 0.0]).view(1, 2, 1, 1)
        out = window_attention(torch.ones_like(k), k, v, window=2, scale=1.0, backend=backend)
        close(out[0, 1, 0], torch.tensor([3.0]), 1e-6)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_dtypes(backend, dtype):
    inputs = [x.to(dtype) for x in memory("reference", 7).inputs(2, 90)]
    out = window_attention(*inputs, window=7, backend=backend)
    assert out.dtype == dtype
    expected = window_attention(*(x.double() for x in inputs), window=7, backend="reference")
    close(out.double(), expected, TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("t", "window"), [(0, 3), (1, 1), (1, 9), (65, 64), (130, 200), (300, 1), (300, 70), (9, None)]
)
@pytest.mark.parametrize(("b", "k", "v"), [(1, 4, 3), (4, 3, 7)])
@pytest.mark.parametrize("held", [0, 1, 20])
def test_sizes(backend, t, window, b, k, v, held):
    inputs = queries(b, t, width=k), queries(b, held + t, 1, width=k), values(b, held + t, width=v)
    out = window_attention(*inputs, window=window, backend=backend)
    assert out.shape == (b, t, HEADS, v)
    close(out, window_attention(*inputs, window=window, backend="reference"))


@pytest.mark.parametrize("t", [1, 5, 150])
def test_large_scores_do_not_overflow(backend, t):
    q, k, v = memory(backend, 4).inputs(1, t)
    out = window_attention(1e4 * q.float(), 1e4 * k.float(), v.float(), window=4, backend=backend)
    assert out.isfinite().all()


def test_memory_layout_does_not_matter(backend):
    inputs = memory(backend, 5).inputs(2, 80)
    expected = window_attention(*inputs, window=5, backend=backend)
    close(window_attention(*map(strided, inputs), window=5, backend=backend), expected)


@pytest.mark.parametrize(("t", "window"), [(1, 3), (70, 3), (150, 70)])
def test_every_output_is_written(backend, t, window, poisoned_memory):
    inputs = [x.requires_grad_() for x in memory(backend, window).inputs(2, t)]
    out = window_attention(*inputs, window=window, backend=backend)
    for x in (out, *torch.autograd.grad(out.sum(), inputs)):
        assert x.isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": 0}, "window: expected at least 1 .* got 0"),
        ({"reach": "near"}, 'reach: expected "sliding" or "chunk", got \'near\''),
        ({"k": torch.zeros(2, 4, HEADS, 4), "v": torch.zeros(2, 4, HEADS, 3)}, "at least as many entries as the 5"),
        ({"resets": torch.zeros(2, 4, dtype=torch.bool)}, r"resets: .*\[2, 5\]"),
        (
            {"backend": "chunked"},
            "window_attention: backend: expected one of 'reference', 'dense', 'blocked', 'native', got 'chunked'",
        ),
    ],
)
def test_wrong_arguments_are_named(change, message):
    right = dict(zip(("q", "k", "v"), memory("reference", 3).inputs(2, 5), strict=True))
    with pytest.raises(ValueError, match=message):
        window_attention(**{**right, "window": 3, **change})
