from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hqlt import native
from hqlt.ops import expiry
from hqlt.ops.backend import IMPLEMENTATIONS, explain
from hqlt.ops.expiry import NEVER
from hqlt.ops.expiry import native as expiry_native

NOTHING = {"used": torch.tensor(True), "resets": torch.tensor(False)}

every_backend = pytest.mark.parametrize("backend", IMPLEMENTATIONS["expiry"])


def by_rank(scores, leaves, kept, used, resets):
    """Expiry of one head, entry by entry: a list sorted by rank, from which entries after the first `kept` are
    dropped."""
    out, ranked = [NEVER] * len(scores), []
    for i, score in enumerate(scores):
        if resets[i]:
            out, ranked = [min(until, i) for until in out[:i]] + out[i:], []
        if not used[i]:
            out[i] = 0
            continue
        ranked = sorted([*ranked, (-score, i)])
        for _, j in ranked[kept:]:
            out[j] = max(leaves[i], leaves[j])
        ranked = ranked[:kept]
    return out


SCORES = st.one_of(st.integers(0, 4).map(float), st.floats(allow_nan=False, width=32))


@st.composite
def calls(draw):
    """scores, leaves, kept, used and resets of one head; entries leave the window in order of age."""
    l = draw(st.integers(0, 40))
    some = lambda elements: draw(st.lists(elements, min_size=l, max_size=l))  # noqa: E731
    leaves = sorted(some(st.integers(0, 60)))
    return (
        some(SCORES),
        leaves,
        draw(st.integers(1, 45)),
        some(st.booleans()),
        some(st.integers(0, 9).map(lambda x: not x)),
    )


def call(backend, scores, leaves, kept, used, resets, dtype=torch.float32):
    scores, leaves = torch.tensor(scores, dtype=dtype).view(1, -1, 1), torch.tensor(leaves, dtype=torch.int64)[None]
    marks = {name: torch.tensor(x, dtype=torch.bool)[None] for name, x in (("used", used), ("resets", resets))}
    return expiry(scores, leaves, kept=kept, **marks, backend=backend).flatten().tolist()


@every_backend
@settings(max_examples=60)
@given(calls())
def test_it_equals_a_list_sorted_by_rank(backend, arguments):
    assert call(backend, *arguments) == by_rank(*arguments)


@every_backend
def test_by_hand(backend):
    """Of the scores 3, 1, 2, 2, the two highest stay: the first 2 displaces 1 when it leaves the window, and of equal
    scores the older stays. An infinite score stays until the end of its segment."""
    inf = float("inf")
    scores, leaves = [3.0, 1.0, 2.0, 2.0, inf, -inf, -inf], [4, 5, 6, 7, 8, 9, 10]
    everything, begins = [True] * 7, [False] * 6 + [True]
    assert call(backend, scores, leaves, 2, everything, [False] * 7) == [NEVER, 6, 8, 7, NEVER, 9, 10]
    assert call(backend, scores, leaves, 2, everything, begins) == [6, 6, 6, 6, 6, 6, NEVER]
    assert call(backend, scores, leaves, 2, [True, True, False, True, True, True, True], [False] * 7)[1:4] == [7, 0, 8]


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("b", "l", "h", "kept"), [(2, 300, 3, 5), (1, 200, 17, 70), (3, 130, 1, 1), (2, 5, 2, 2**40)])
@pytest.mark.parametrize("marked", [False, True])
def test_rows_and_heads_are_independent(backend, dtype, b, l, h, kept, marked):
    generator = torch.Generator().manual_seed(l)
    draw = lambda *shape: torch.rand(*shape, generator=generator)  # noqa: E731
    scores, leaves = (20 * draw(b, l, h)).round().to(dtype), torch.arange(l).expand(b, l) + 7
    marks = {"used": draw(b, l) > 0.2, "resets": draw(b, l) < 0.02} if marked else {}
    out = expiry(scores, leaves, kept=kept, **marks, backend=backend)
    assert out.dtype == torch.int64 and out.shape == scores.shape
    used, resets = ((marks.get(name, value.expand(b, l))).tolist() for name, value in NOTHING.items())
    for i in range(b):
        for j in range(h):
            expected = by_rank(scores[i, :, j].tolist(), leaves[i].tolist(), kept, used[i], resets[i])
            assert out[i, :, j].tolist() == expected


@every_backend
def test_the_result_has_no_gradient(backend):
    scores = torch.randn(1, 9, 2, requires_grad=True)
    assert not expiry(scores, torch.arange(9)[None], kept=2, backend=backend).requires_grad


@every_backend
@pytest.mark.parametrize("shape", [(0, 3, 2), (2, 0, 2), (2, 3, 0)])
def test_a_size_of_zero_gives_an_empty_result(backend, shape):
    assert expiry(torch.zeros(shape), torch.zeros(shape[:2], dtype=torch.int64), kept=2, backend=backend).shape == shape


def test_vmap_gives_the_same_result():
    scores, leaves = torch.randn(3, 2, 9, 2), torch.arange(9).expand(2, 9) + 3
    run = lambda x: expiry(x, leaves, kept=2)  # noqa: E731
    assert torch.equal(torch.func.vmap(run)(scores), torch.stack([run(x) for x in scores]))


@pytest.mark.skipif(bool(native.why_not()), reason=native.why_not() or "native")
@pytest.mark.parametrize("marked", [False, True])
def test_registration(marked):
    used, resets = torch.rand(2, 2, 9) < 0.5 if marked else (None, None)
    arguments = torch.randn(2, 9, 3), torch.arange(9).expand(2, 9), used, resets, 2
    torch.library.opcheck(expiry_native._expiry, arguments)


def test_the_native_backend_is_selected_on_a_cpu():
    choice = explain("expiry", torch.zeros(1, 9, 2)).name
    assert choice == ("chunked" if native.why_not() else "native")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kept": 0}, "kept: expected at least 1 entry, got 0"),
        (
            {"leaves": torch.arange(5)[None]},
            r"leaves: expected int64 \[1, 4\], one index per entry, got .*\[1, 5\]",
        ),
        ({"leaves": torch.zeros(1, 4)}, "leaves: expected int64 .* got torch.float32"),
        ({"used": torch.ones(1, 3, dtype=torch.bool)}, "used"),
        ({"resets": torch.ones(1, 3, dtype=torch.bool)}, "resets"),
        ({"scores": torch.zeros(1, 4)}, "scores"),
        ({"backend": "blocked"}, "expiry: backend: expected one of 'reference', .* got 'blocked'"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    right = {"scores": torch.zeros(1, 4, 2), "leaves": torch.arange(4)[None], "kept": 2}
    arguments = right | change
    with pytest.raises(ValueError, match=message):
        expiry(arguments.pop("scores"), arguments.pop("leaves"), **arguments)
