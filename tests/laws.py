"""The laws of a memory, written once and inherited by the tests of every operation, backend, blend, mixer and rule.

A test class inherits `Laws` and provides the fixture `build`, a function from a window to a `Memory` in float64.
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
    """A memory, as used by the laws."""

    run: Run
    """(inputs, state, resets) → (outputs [b, t, …], state)"""
    reference: Run
    """The same memory, computed token by token from its equation"""
    inputs: Callable[[int, int], Inputs]
    """(b, t) → random inputs of b rows and t tokens"""
    parameters: tuple[Tensor, ...] = ()
    """Further tensors with gradients"""
    canonical: bool = True
    """Whether equivalent memories have equal states (not if a state holds entries that are out of reach)"""


class Scenario(NamedTuple):
    """A random test case: the window, b rows of t tokens, boundaries between calls, and resets."""

    window: int
    b: int
    t: int
    cuts: list[int]
    resets: Tensor | None


@st.composite
def scenarios(draw: Any, longest: int, shortest: int = 0) -> Scenario:
    t, b = draw(st.integers(shortest, longest)), draw(st.integers(1, 3))
    cuts = sorted(draw(st.lists(st.integers(0, t), max_size=4)))  # a repeated cut makes an empty chunk
    marks = st.lists(st.tuples(st.integers(0, b - 1), st.integers(0, max(t - 1, 0))), max_size=6)
    marked = draw(st.none() | marks)
    resets = None if marked is None else torch.zeros(b, t, dtype=torch.bool)
    for row, token in marked or [] if t else []:
        resets[row, token] = True
    return Scenario(draw(st.sampled_from([3, 1, 2, 4, 7, 40])), b, t, cuts, resets)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Random numbers that depend only on shape and seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance, check_dtype=False)


def cut(inputs: Inputs, begin: int, end: int | None = None) -> Inputs:
    return tuple(x[:, begin:end] for x in inputs)


def rows(parts: Iterable[Tensor], *which: int) -> tuple[Tensor, ...]:
    return tuple(x[list(which)] for x in parts)


def in_chunks(run: Run, inputs: Inputs, resets: Tensor | None, cuts: Iterable[int]) -> tuple[Tensor, State]:
    """Process a sequence in several calls, carrying the state."""
    outputs, state = [], None
    for begin, end in pairwise([0, *cuts, inputs[0].shape[1]]):
        marked = None if resets is None else resets[:, begin:end]
        if marked is not None and not marked.any():
            marked = None  # None is equivalent to no resets
        out, state = run(cut(inputs, begin, end), state, marked)
        outputs.append(out)
    return torch.cat(outputs, dim=1), state


def segments(resets: Tensor | None, row: int, t: int) -> Iterator[tuple[int, int]]:
    """Yield (begin, end) of each segment of a row."""
    marked = [] if resets is None else resets[row].nonzero().flatten().tolist()
    yield from ((begin, end) for begin, end in pairwise([0, *marked, t]) if begin < end)


def floats(parts: Iterable[Tensor]) -> list[Tensor]:
    return [x for x in parts if x.is_floating_point()]


def with_floats(state: State, changed: Iterable[Tensor]) -> State:
    """Replace the floating-point parts of a state, which can have gradients."""
    changed = iter(changed)
    parts = [next(changed) if x.is_floating_point() else x for x in state]
    return state._make(parts) if hasattr(state, "_make") else tuple(parts)


def gradients(memory: Memory, run: Run, inputs: Inputs, state: State, resets: Tensor | None) -> list[Tensor]:
    """Gradients of a scalar function of outputs and final state, for inputs, initial state and parameters."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    given_state = [x.detach().requires_grad_() for x in floats(state)]
    out, after = run(tuple(inputs), with_floats(state, given_state), resets)
    number = sum((x * normal(*x.shape, seed=i)).sum() for i, x in enumerate([out, *floats(after)]))
    return torch.autograd.grad(number, [*inputs, *given_state, *memory.parameters], materialize_grads=True)


class Laws:
    longest = 18
    """Maximum length of a drawn sequence; longer than a chunk of the implementation under test."""

    def same(self, memory: Memory, got: State, expected: State) -> None:
        """Check that two states are equivalent: equal outputs from here on, and equal contents if `canonical`."""
        b = len(expected[0])
        probe = memory.inputs(b, 3)
        close(memory.run(probe, got, None)[0], memory.run(probe, expected, None)[0])
        if memory.canonical:
            for mine, theirs in zip(got, expected, strict=True):
                close(mine, theirs)

    @given(data=st.data())
    def test_one_call_equals_several_calls(self, build: Any, data: Any) -> None:
        scenario = data.draw(scenarios(self.longest))
        memory = build(scenario.window)
        inputs = memory.inputs(scenario.b, scenario.t)
        out, state = memory.run(inputs, None, scenario.resets)
        for cuts in (scenario.cuts, range(1, scenario.t)):
            chunked_out, chunked_state = in_chunks(memory.run, inputs, scenario.resets, cuts)
            close(chunked_out, out)
            self.same(memory, chunked_state, state)

    @given(data=st.data())
    def test_resets_separate_sequences(self, build: Any, data: Any) -> None:
        scenario = data.draw(scenarios(self.longest))
        memory = build(scenario.window)
        inputs = memory.inputs(scenario.b, scenario.t)
        out, state = in_chunks(memory.run, inputs, scenario.resets, scenario.cuts)
        for row in range(scenario.b):
            alone = None
            for begin, end in segments(scenario.resets, row, scenario.t):
                alone_out, alone = memory.run(cut(rows(inputs, row), begin, end), None, None)
                close(out[row, begin:end], alone_out[0])
            if alone is not None:
                self.same(memory, rows_of(state, row), alone)

    @given(data=st.data())
    def test_left_padding_has_no_effect(self, build: Any, data: Any) -> None:
        """Row r has r · (window + 1) arbitrary tokens before its first real token, which is a reset."""
        scenario = data.draw(scenarios(self.longest))
        memory = build(scenario.window)
        inputs = memory.inputs(3, scenario.t + 1)
        padding = [min(row * (scenario.window + 1), scenario.t) for row in range(3)]
        resets = torch.zeros(3, scenario.t + 1, dtype=torch.bool)
        for row, begin in enumerate(padding):
            resets[row, begin] = True
        out, state = memory.run(inputs, None, resets)
        for row, begin in enumerate(padding):
            alone_out, alone = memory.run(cut(rows(inputs, row), begin), None, None)
            close(out[row, begin:], alone_out[0])
            self.same(memory, rows_of(state, row), alone)

    @given(data=st.data())
    def test_causality(self, build: Any, data: Any) -> None:
        scenario = data.draw(scenarios(self.longest, shortest=1))
        memory = build(scenario.window)
        now = data.draw(st.integers(0, scenario.t))
        inputs = [x.requires_grad_() for x in memory.inputs(scenario.b, scenario.t)]
        future = [torch.cat([x[:, :now], -3 * x[:, now:].flip(1)], dim=1) for x in inputs]
        out, _ = memory.run(tuple(inputs), None, scenario.resets)
        changed, _ = memory.run(tuple(future), None, scenario.resets)
        close(changed[:, :now], out[:, :now], 1e-12)
        for gradient in torch.autograd.grad(out[:, :now].square().sum(), inputs, materialize_grads=True):
            assert not gradient[:, now:].any()

    @given(data=st.data())
    def test_rows_are_independent(self, build: Any, data: Any) -> None:
        """Each row equals the row processed alone, even beside a row of NaN."""
        scenario = data.draw(scenarios(self.longest))
        memory = build(scenario.window)
        inputs = memory.inputs(scenario.b + 1, scenario.t)
        for x in inputs:
            x[-1] = torch.nan
        resets = scenario.resets if scenario.resets is None else torch.cat([scenario.resets, scenario.resets[:1]])
        out, state = in_chunks(memory.run, inputs, resets, scenario.cuts)
        for row in range(scenario.b):
            alone_resets = None if resets is None else resets[row : row + 1]
            alone_out, alone = memory.run(rows(inputs, row), None, alone_resets)
            close(out[row], alone_out[0])
            self.same(memory, rows_of(state, row), alone)

    @given(data=st.data())
    def test_nonfinite_values_do_not_cross_resets(self, build: Any, data: Any) -> None:
        """NaN or infinity in one segment of each row, including the carried one, does not affect other segments."""
        scenario = data.draw(scenarios(self.longest, shortest=2))
        memory, b, t = build(scenario.window), scenario.b, scenario.t
        resets = torch.zeros(b, t, dtype=torch.bool) if scenario.resets is None else scenario.resets
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
            asked = leaves if number.requires_grad else []
            results.append((out, after, torch.autograd.grad(number, asked, materialize_grads=True) if asked else ()))
        (out, after, gradients), (bad_out, bad_after, bad_gradients) = results
        for mine, theirs in zip((bad_out, *bad_gradients), (out, *gradients), strict=True):
            close(mine[~sick], theirs[~sick])
        for row in range(b):
            if not last_is_sick[row]:
                self.same(memory, rows_of(bad_after, row), rows_of(after, row))

    def test_inputs_and_state_are_not_modified(self, build: Any) -> None:
        memory = build(3)
        inputs = memory.inputs(2, 7)
        _, state = memory.run(inputs, None, None)
        before = [x.clone() for x in (*inputs, *state)]
        memory.run(inputs, state, torch.ones(2, 7, dtype=torch.bool))
        assert all(map(torch.equal, (*inputs, *state), before))

    def test_gradients_equal_finite_differences(self, build: Any) -> None:
        """Of outputs and final state, for inputs and initial state, with a reset in one of two rows."""
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
    def test_outputs_and_gradients_equal_the_reference(self, build: Any, data: Any) -> None:
        scenario = data.draw(scenarios(self.longest))
        memory = build(scenario.window)
        inputs = memory.inputs(scenario.b, scenario.t)
        _, state = memory.reference(memory.inputs(scenario.b, 5), None, None)
        out, after = memory.run(inputs, state, scenario.resets)
        expected_out, expected_after = memory.reference(inputs, state, scenario.resets)
        close(out, expected_out)
        for mine, theirs in zip(after, expected_after, strict=True):
            close(mine, theirs)
        got = gradients(memory, memory.run, inputs, state, scenario.resets)
        for mine, theirs in zip(got, gradients(memory, memory.reference, inputs, state, scenario.resets), strict=True):
            close(mine, theirs)


def rows_of(state: State, row: int) -> State:
    parts = rows(state, row)
    return state._make(parts) if hasattr(state, "_make") else parts
