"""Window attention with entries that stay visible beyond the window: every implementation against the reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hqlt import native
from hqlt.ops import Beyond, expiry, window_attention
from hqlt.ops.backend import IMPLEMENTATIONS
from hqlt.ops.expiry import NEVER
from hqlt.ops.window_attention import native as window_native
from tests.laws import close

BACKENDS = [name for name in IMPLEMENTATIONS["window_attention"] if name != "reference"]
every_backend = pytest.mark.parametrize("backend", BACKENDS)
needs_native = pytest.mark.skipif(bool(native.why_not()), reason=native.why_not() or "native")


class Case:
    """Inputs with `kept` entries that stay, by random scores. others: use other queries and keys beyond the window."""

    def __init__(self, b=2, t=40, l=None, h=2, g=1, k=4, v=3, window=5, kept=4, others=False, marked=False,
                 reach="sliding", dtype=torch.float64, seed=0):  # fmt: skip
        generator = torch.Generator().manual_seed(seed)
        normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=dtype)  # noqa: E731
        l = t if l is None else l
        shapes = [(b, t, g * h, k), (b, l, h, k), (b, l, h, v)]
        self.inputs = [normal(*shape).requires_grad_() for shape in (shapes + shapes[:2] if others else shapes)]
        self.resets = torch.rand(b, l, generator=generator) < 0.02 if marked else None
        leaves = torch.arange(l).expand(b, l) + window
        self.expiry = expiry(normal(b, l, h), leaves, kept=kept, resets=self.resets, backend="reference")
        self.kept, self.options = kept, {"window": window, "resets": self.resets, "reach": reach}

    def __call__(self, backend, inputs=None):
        q, k, v, *others = self.inputs if inputs is None else inputs
        beyond = Beyond(self.expiry, self.kept, *others)
        return window_attention(q, k, v, **self.options, beyond=beyond, backend=backend)

    def results(self, backend):
        """The output and all gradients."""
        out = self(backend)
        weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        return out, *torch.autograd.grad(out, self.inputs, weights)

    def check(self, backend, tolerance=1e-10):
        for mine, theirs in zip(self.results(backend), self.results("reference"), strict=True):
            close(mine, theirs, tolerance)

    def sees(self, entry, head=0, row=0):
        """The queries that see an entry, within the window or beyond it, Bool[t]. Without resets."""
        q, k, *_ = self.inputs
        now = torch.arange(k.shape[1])[-q.shape[1] :]
        return (entry <= now) & ((now < entry + self.options["window"]) | (now < self.expiry[row, entry, head]))


@every_backend
@pytest.mark.parametrize("others", [False, True])
@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize("reach", ["sliding", "chunk"])
@pytest.mark.parametrize("window", [1, 5, 40])
def test_reaches(backend, window, reach, marked, others):
    Case(t=70, window=window, reach=reach, marked=marked, others=others).check(backend)


@every_backend
@pytest.mark.parametrize("others", [False, True])
@pytest.mark.parametrize(
    "sizes",
    [
        {"t": 1, "l": 30}, {"t": 1, "l": 1}, {"t": 9, "l": 90, "g": 3}, {"t": 400, "marked": True, "b": 1, "g": 2},
        {"t": 300, "l": 420, "kept": 20, "window": 130, "b": 1}, {"t": 290, "kept": 300, "b": 1, "h": 1},
        {"t": 33, "k": 17, "v": 70}, {"t": 20, "h": 3, "b": 3}, {"t": 150, "kept": 1, "window": 1},
    ],
    ids=str,
)  # fmt: skip
def test_sizes(backend, sizes, others):
    Case(**sizes, others=others).check(backend)


@every_backend
@pytest.mark.parametrize("others", [False, True])
def test_single_precision(backend, others):
    Case(t=300, k=16, v=16, dtype=torch.float32, others=others).check(backend, 2e-5)


@every_backend
@settings(max_examples=20)
@given(
    st.integers(1, 2), st.integers(1, 60), st.integers(0, 40), st.integers(1, 3), st.integers(1, 3),
    st.integers(1, 20), st.integers(1, 20), st.integers(1, 12), st.integers(1, 8), st.booleans(), st.booleans(),
    st.sampled_from(["sliding", "chunk"]),
)  # fmt: skip
def test_any_shape(backend, b, t, held, h, g, k, v, window, kept, others, marked, reach):
    Case(b, t, t + held, h, g, k, v, window, kept, others, marked, reach).check(backend)


@pytest.mark.parametrize("backend", IMPLEMENTATIONS["window_attention"])
@pytest.mark.parametrize("reach", ["sliding", "chunk"])
def test_without_visible_entries_beyond_it_equals_the_window(backend, reach):
    case = Case(t=200, kept=2, reach=reach, marked=True)
    case.expiry = torch.zeros_like(case.expiry)
    close(case(backend), window_attention(*case.inputs, **case.options, backend=backend))


@pytest.mark.parametrize("backend", IMPLEMENTATIONS["window_attention"])
def test_if_all_entries_stay_it_equals_full_attention(backend):
    case = Case(t=200, kept=200)
    case.expiry = torch.full_like(case.expiry, NEVER)
    close(case(backend), window_attention(*case.inputs, window=None, backend=backend))


@pytest.mark.parametrize("backend", IMPLEMENTATIONS["window_attention"])
def test_by_hand(backend):
    """A query of zeros reads the mean of the values (1 … 5) that it sees: its own, and entry 0 until index 3."""
    case = Case(b=1, t=5, h=1, k=1, v=1, window=1, kept=1)
    case.inputs = [torch.zeros(1, 5, 1, 1), torch.ones(1, 5, 1, 1), torch.arange(1.0, 6.0).view(1, 5, 1, 1)]
    case.expiry = torch.tensor([3, 0, 0, 0, 0]).view(1, 5, 1)
    assert case(backend).flatten().tolist() == [1, 1.5, 2, 4, 5]


@needs_native
class TestNative:
    @pytest.mark.parametrize("tensor", range(5))
    @pytest.mark.parametrize("number", [float("nan"), float("inf")])
    def test_non_finite_numbers_reach_only_what_sees_them(self, tensor, number):
        """A non-finite entry affects exactly the queries that see it; a non-finite query affects only itself."""
        case = Case(t=300, h=1, b=1, others=True, kept=3)
        entry = int(
            (case.expiry[0, :100, 0] == case.expiry[0, :100, 0][case.expiry[0, :100, 0] != NEVER].max()).nonzero()[0]
        )
        inputs = [x.detach().clone() for x in case.inputs]
        inputs[tensor][0, entry, 0, 1] = number
        sees, index = case.sees(entry), torch.arange(300)
        near, far = sees & (index < entry + 5), sees & (index >= entry + 5)
        assert far.any()
        expected = [index == entry, near, sees, index == entry, far][tensor]
        if tensor == 3:  # only if it sees any entry beyond its window
            expected = expected & torch.stack([case.sees(j) & (index >= j + 5) for j in range(300)]).any(dim=0)
        assert torch.equal(case("native", inputs).isnan().any(dim=-1)[0, :, 0], expected)

    def test_a_non_finite_query_makes_the_gradients_it_reaches_non_finite(self):
        case = Case(t=200, h=1, b=1, kept=3)
        inputs = [x.detach().clone() for x in case.inputs]
        inputs[0][0, 150] = float("nan")
        leaves = [x.requires_grad_() for x in inputs]
        dq, dk, dv = torch.autograd.grad(case("native", leaves).sum(), leaves)
        seen = torch.stack([case.sees(j)[150] for j in range(200)])
        assert seen[:140].any()
        for x in (dk, dv):
            assert torch.equal(x.isnan().any(dim=-1)[0, :, 0], seen)
        assert torch.equal(dq.isnan().any(dim=-1)[0, :, 0], torch.arange(200) == 150)

    @pytest.mark.parametrize("others", [False, True])
    @pytest.mark.parametrize("sizes", [{"b": 1, "h": 1, "g": 2}, {"b": 1, "h": 3}, {"b": 2, "h": 2}], ids=str)
    def test_every_number_of_threads_gives_the_same_numbers(self, sizes, others):
        case = Case(t=700, k=32, v=32, kept=40, others=others, **sizes)
        before, results = torch.get_num_threads(), []
        try:
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                results.append(case.results("native"))
        finally:
            torch.set_num_threads(before)
        for other in results[1:]:
            for mine, theirs in zip(other, results[0], strict=True):
                close(mine, theirs)

    @pytest.mark.usefixtures("poisoned_memory")
    @pytest.mark.parametrize("others", [False, True])
    def test_every_output_is_written(self, others):
        for t in (1, 3, 150):
            assert all(x.isfinite().all() for x in Case(t=t, l=t + 9, others=others).results("native"))

    @pytest.mark.parametrize("others", [False, True])
    def test_registration(self, others):
        case = Case(t=9, g=2, others=others, marked=True)
        q, k, v, *far = case.inputs
        arguments = q, k, v, case.resets, case.expiry, *(far or (None, None)), 3, case.kept, 0.5
        torch.library.opcheck(window_native._forward, arguments)

    @pytest.mark.parametrize("others", [False, True])
    def test_derivatives_by_finite_differences(self, others):
        case = Case(b=1, t=6, h=1, g=2, k=2, v=2, window=2, kept=2, others=others)
        run = lambda *inputs: case("native", inputs)  # noqa: E731
        assert torch.autograd.gradcheck(run, case.inputs)
        assert torch.autograd.gradgradcheck(run, case.inputs)

    def test_compiled(self):
        def run(scores, q, k, v):
            leaves = torch.arange(scores.shape[1]).expand(scores.shape[:2]) + 5
            until = expiry(scores, leaves, kept=4, backend="native")
            return window_attention(q, k, v, window=5, beyond=Beyond(until, 4), backend="native")

        inputs = torch.randn(2, 40, 2), *Case().inputs
        torch._dynamo.reset()
        close(torch.compile(run, backend="aot_eager", fullgraph=True)(*inputs), run(*inputs))
