"""The laws of a memory, written once and inherited by every operation, backend, blend, mixer and write rule.

A class of tests inherits `Laws` and gives one fixture, `build`: a function from a window to a `Memory` in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

Inputs = tuple[Tensor, ...]  # each [b, t, …]
State = tuple[Tensor, ...] | None  # each [b, …]
Run = Callable[[Inputs, State, Tensor | None], tuple[Tensor, State]]


class Memory(NamedTuple):
    """A memory as the laws see it."""

    run: Run
    """(inputs, state, resets) → (outputs [b, t, …], state)"""
    reference: Run
    """The same memory, by its equation token by token."""
    inputs: Callable[[int, int], Inputs]
    """Random inputs of b rows and t tokens."""
    parameters: tuple[Tensor, ...] = ()
    """What else a gradient goes to."""
    canonical: bool = True
    """Whether memories that will say the same have equal states. (Not where what is out of reach is held on to.)"""


class Story(NamedTuple):
    """What happens to a memory: its window, b rows of t tokens, where the calls are cut, which tokens are resets."""

    window: int
    b: int
    t: int
    cuts: list[int]
    resets: Tensor | None


@st.composite
def stories(draw: Any, longest: int, shortest: int = 0) -> Story:
    t, b = draw(st.integers(shortest, longest)), draw(st.integers(1, 3))
    cuts = sorted(draw(st.lists(st.integers(0, t), max_size=4)))  # a cut named twice is an empty piece
    marks = st.lists(st.tuples(st.integers(0, b - 1), st.integers(0, max(t - 1, 0))), max_size=6)
    marked = draw(st.none() | marks)
    resets = None if marked is None else torch.zeros(b, t, dtype=torch.bool)
    for row, token in marked or [] if t else []:
        resets[row, token] = True
    return Story(draw(st.sampled_from([3, 1, 2, 4, 7, 40])), b, t, cuts, resets)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """The same random numbers for the same shape, whatever was drawn before."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance, check_dtype=False)


def cut(inputs: Inputs, begin: int, end: int | None = None) -> Inputs:
    return tuple(x[:, begin:end] for x in inputs)


def rows(parts: Iterable[Tensor], *which: int) -> tuple[Tensor, ...]:
    return tuple(x[list(which)] for x in parts)


def in_pieces(run: Run, inputs: Inputs, resets: Tensor | None, cuts: Iterable[int]) -> tuple[Tensor, State]:
    """The whole sequence in several calls, the state carried from one to the next."""
    outputs, state = [], None
    for begin, end in pairwise([0, *cuts, inputs[0].shape[1]]):
        marked = None if resets is None else resets[:, begin:end]
        if marked is not None and not marked.any():
            marked = None  # no resets and none marked are the same thing
        out, state = run(cut(inputs, begin, end), state, marked)
        outputs.append(out)
    return torch.cat(outputs, dim=1), state


def segments(resets: Tensor | None, row: int, t: int) -> Iterator[tuple[int, int]]:
    """(begin, end) of each segment of a row."""
    marked = [] if resets is None else resets[row].nonzero().flatten().tolist()
    yield from ((begin, end) for begin, end in pairwise([0, *marked, t]) if begin < end)


def floats(parts: Iterable[Tensor]) -> list[Tensor]:
    return [x for x in parts if x.is_floating_point()]


def with_floats(state: State, changed: Iterable[Tensor]) -> State:
    """The state with its floating-point parts exchanged: what a gradient can go to."""
    changed = iter(changed)
    parts = [next(changed) if x.is_floating_point() else x for x in state]
    return state._make(parts) if hasattr(state, "_make") else tuple(parts)


def gradients(memory: Memory, run: Run, inputs: Inputs, state: State, resets: Tensor | None) -> list[Tensor]:
    """Of one number made from all outputs and the whole final state, to inputs, initial state and parameters."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    given_state = [x.detach().requires_grad_() for x in floats(state)]
    out, after = run(tuple(inputs), with_floats(state, given_state), resets)
    number = sum((x * normal(*x.shape, seed=i)).sum() for i, x in enumerate([out, *floats(after)]))
    return torch.autograd.grad(number, [*inputs, *given_state, *memory.parameters], materialize_grads=True)


class Laws:
    longest = 18
    """Tokens in a drawn sequence, at most: more than a chunk of whatever is tested."""

    def same(self, memory: Memory, got: State, expected: State) -> None:
        """Two states are the same memory: they say the same from here on (and hold the same numbers)."""
        b = len(expected[0])
        probe = memory.inputs(b, 3)
        close(memory.run(probe, got, None)[0], memory.run(probe, expected, None)[0])
        if memory.canonical:
            for mine, theirs in zip(got, expected, strict=True):
                close(mine, theirs)

    @given(data=st.data())
    def test_one_pass_is_in_pieces_is_step_by_step(self, build: Any, data: Any) -> None:
        story = data.draw(stories(self.longest))
        memory = build(story.window)
        inputs = memory.inputs(story.b, story.t)
        out, state = memory.run(inputs, None, story.resets)
        for cuts in (story.cuts, range(1, story.t)):
            pieces_out, pieces_state = in_pieces(memory.run, inputs, story.resets, cuts)
            close(pieces_out, out)
            self.same(memory, pieces_state, state)

    @given(data=st.data())
    def test_resets_make_separate_sequences(self, build: Any, data: Any) -> None:
        story = data.draw(stories(self.longest))
        memory = build(story.window)
        inputs = memory.inputs(story.b, story.t)
        out, state = in_pieces(memory.run, inputs, story.resets, story.cuts)
        for row in range(story.b):
            alone = None
            for begin, end in segments(story.resets, row, story.t):
                alone_out, alone = memory.run(cut(rows(inputs, row), begin, end), None, None)
                close(out[row, begin:end], alone_out[0])
            if alone is not None:
                self.same(memory, rows_of(state, row), alone)

    @given(data=st.data())
    def test_left_padding_is_no_padding(self, build: Any, data: Any) -> None:
        """Row r has r + r·window tokens of rubbish before its first real token, which is marked as a reset."""
        story = data.draw(stories(self.longest))
        memory = build(story.window)
        inputs = memory.inputs(3, story.t + 1)
        padding = [min(row * (story.window + 1), story.t) for row in range(3)]
        resets = torch.zeros(3, story.t + 1, dtype=torch.bool)
        for row, begin in enumerate(padding):
            resets[row, begin] = True
        out, state = memory.run(inputs, None, resets)
        for row, begin in enumerate(padding):
            alone_out, alone = memory.run(cut(rows(inputs, row), begin), None, None)
            close(out[row, begin:], alone_out[0])
            self.same(memory, rows_of(state, row), alone)

    @given(data=st.data())
    def test_the_future_changes_nothing(self, build: Any, data: Any) -> None:
        story = data.draw(stories(self.longest, shortest=1))
        memory = build(story.window)
        now = data.draw(st.integers(0, story.t))
        inputs = [x.requires_grad_() for x in memory.inputs(story.b, story.t)]
        future = [torch.cat([x[:, :now], -3 * x[:, now:].flip(1)], dim=1) for x in inputs]
        out, _ = memory.run(tuple(inputs), None, story.resets)
        changed, _ = memory.run(tuple(future), None, story.resets)
        close(changed[:, :now], out[:, :now], 1e-12)
        for gradient in torch.autograd.grad(out[:, :now].square().sum(), inputs, materialize_grads=True):
            assert not gradient[:, now:].any()

    @given(data=st.data())
    def test_rows_are_independent(self, build: Any, data: Any) -> None:
        """Each row gives what it gives alone, even beside a row of NaN."""
        story = data.draw(stories(self.longest))
        memory = build(story.window)
        inputs = memory.inputs(story.b + 1, story.t)
        for x in inputs:
            x[-1] = torch.nan
        resets = story.resets if story.resets is None else torch.cat([story.resets, story.resets[:1]])
        out, state = in_pieces(memory.run, inputs, resets, story.cuts)
        for row in range(story.b):
            alone_resets = None if resets is None else resets[row : row + 1]
            alone_out, alone = memory.run(rows(inputs, row), None, alone_resets)
            close(out[row], alone_out[0])
            self.same(memory, rows_of(state, row), alone)

    @given(data=st.data())
    def test_what_is_not_finite_stops_at_a_reset(self, build: Any, data: Any) -> None:
        """NaN or infinity in one segment of each row, the one carried in included, changes nothing in the others."""
        story = data.draw(stories(self.longest, shortest=2))
        memory, b, t = build(story.window), story.b, story.t
        resets = torch.zeros(b, t, dtype=torch.bool) if story.resets is None else story.resets
        resets[:, data.draw(st.integers(0, t - 1))] = True
        bad = data.draw(st.sampled_from([torch.nan, torch.inf, -torch.inf]))
        _, state = memory.reference(memory.inputs(b, 5), None, None)
        inputs, sick = memory.inputs(b, t), torch.zeros(b, t, dtype=torch.bool)
        bad_inputs, bad_floats = [x.clone() for x in inputs], [x.clone() for x in floats(state)]
        last_is_sick = []
        for row in range(b):
            marked = resets[row].nonzero().flatten().tolist()
            begin, end = data.draw(st.sampled_from(list(pairwise([-1, *marked, t]))))
            last_is_sick.append(end == t)
            for x in bad_floats if begin < 0 else []:
                x[row] = bad
            begin = max(begin, 0)
            sick[row, begin:end] = True
            for x in bad_inputs if begin < end else []:
                x[row, data.draw(st.integers(begin, end - 1))] = bad

        results = []
        for given_inputs, given_state in ((inputs, state), (bad_inputs, with_floats(state, bad_floats))):
            leaves = [x.clone().requires_grad_() for x in given_inputs]
            out, after = memory.run(tuple(leaves), given_state, resets)
            number = (out * normal(*out.shape))[~sick].sum()
            results.append((out, after, torch.autograd.grad(number, leaves, materialize_grads=True)))
        (out, after, gradients), (bad_out, bad_after, bad_gradients) = results
        for mine, theirs in zip((bad_out, *bad_gradients), (out, *gradients), strict=True):
            close(mine[~sick], theirs[~sick])
        for row in range(b):
            if not last_is_sick[row]:
                self.same(memory, rows_of(bad_after, row), rows_of(after, row))

    def test_the_given_state_and_inputs_are_left_as_they_were(self, build: Any) -> None:
        memory = build(3)
        inputs = memory.inputs(2, 7)
        _, state = memory.run(inputs, None, None)
        before = [x.clone() for x in (*inputs, *state)]
        memory.run(inputs, state, torch.ones(2, 7, dtype=torch.bool))
        assert all(map(torch.equal, (*inputs, *state), before))

    def test_gradients_are_finite_differences(self, build: Any) -> None:
        """To inputs and initial state, from outputs and final state, with a reset on the way in one row of two."""
        memory = build(2)
        inputs = memory.inputs(2, 5)
        resets = torch.zeros(2, 5, dtype=torch.bool)
        resets[0, 3] = True
        _, state = memory.run(memory.inputs(2, 3), None, None)
        leaves = [x.detach().clone().requires_grad_() for x in (*inputs, *floats(state))]

        def run(*leaves: Tensor) -> tuple[Tensor, ...]:
            carried = with_floats(state, leaves[len(inputs) :])
            out, after = memory.run(leaves[: len(inputs)], carried, resets)
            return tuple(x for x in (out, *floats(after)) if x.requires_grad)

        assert torch.autograd.gradcheck(run, leaves, fast_mode=True)

    @given(data=st.data())
    def test_outputs_and_gradients_are_the_references(self, build: Any, data: Any) -> None:
        story = data.draw(stories(self.longest))
        memory = build(story.window)
        inputs = memory.inputs(story.b, story.t)
        _, state = memory.reference(memory.inputs(story.b, 5), None, None)
        out, after = memory.run(inputs, state, story.resets)
        expected_out, expected_after = memory.reference(inputs, state, story.resets)
        close(out, expected_out)
        for mine, theirs in zip(after, expected_after, strict=True):
            close(mine, theirs)
        got = gradients(memory, memory.run, inputs, state, story.resets)
        for mine, theirs in zip(got, gradients(memory, memory.reference, inputs, state, story.resets), strict=True):
            close(mine, theirs)


def rows_of(state: State, row: int) -> State:
    parts = rows(state, row)
    return state._make(parts) if hasattr(state, "_make") else parts
