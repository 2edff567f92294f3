"""Laws of every memory, in float64: stepping equals the sequence pass, a reset equals a separate sequence."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.utils._pytree import tree_map

from hqlt.agent.memory_model import MODELS, build_memory

B, T, D = 3, 13, 8
VARIANTS = {name: {"window": 4} for name in MODELS} | {
    "transformer, everything": {"window": None},
    "synchronous, everything": {"window": None},
    "deltanet, convolution": {"conv_size": 3},
    "synchronous, no positions": {"window": 4, "rope_theta": None},
}


@pytest.fixture(params=VARIANTS)
def model(request):
    name = request.param.partition(",")[0]
    return build_memory(name, hidden_size=D, num_heads=2, num_layers=2, **VARIANTS[request.param]).double()


@pytest.fixture
def x():
    return torch.randn(B, T, D, dtype=torch.float64)


@pytest.fixture
def resets():
    """Rows with resets at different times, one at its first step, one at two consecutive steps."""
    resets = torch.zeros(B, T, dtype=torch.bool)
    resets[0, 0] = resets[0, 6] = resets[1, 5] = resets[1, 6] = resets[2, 12] = True
    return resets


def same(got, expected):
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)


def test_stepping_equals_the_sequence_pass(model, x, resets):
    _, state = model.sequence(torch.randn(B, 5, D, dtype=torch.float64), model.init_state(B), resets[:, :5])
    expected, after = model.sequence(x, state, resets)
    got = []
    for t in range(T):
        y, state = model.step(x[:, t], state, resets[:, t])
        got.append(y)
    same(torch.stack(got, dim=1), expected)
    probe = torch.randn(B, 3, D, dtype=torch.float64)
    none = torch.zeros(B, 3, dtype=torch.bool)
    same(model.sequence(probe, state, none)[0], model.sequence(probe, after, none)[0])


def test_chunks_equal_the_whole_sequence(model, x, resets):
    expected, _ = model.sequence(x, model.init_state(B), resets)
    first, state = model.sequence(x[:, :6], model.init_state(B), resets[:, :6])
    second, _ = model.sequence(x[:, 6:], state, resets[:, 6:])
    same(torch.cat([first, second], dim=1), expected)


def test_a_reset_is_a_separate_sequence(model, x, resets):
    _, before = model.sequence(torch.randn(B, 5, D, dtype=torch.float64), model.init_state(B), resets[:, :5])
    together, _ = model.sequence(x, before, resets)
    for row in range(B):
        borders = [0, *resets[row].nonzero().flatten().tolist(), T]
        for begin, end in itertools.pairwise(borders):
            if begin == end:
                continue
            alone = tree_map(lambda part, row=row: part[row : row + 1], before)
            state = model.init_state(1) if resets[row, begin] else alone
            none = torch.zeros(1, end - begin, dtype=torch.bool)
            same(together[row, begin:end], model.sequence(x[row : row + 1, begin:end], state, none)[0][0])


def test_gradients_of_stepping_equal_those_of_the_sequence_pass(model, x, resets):
    def gradients(run):
        inputs = x.clone().requires_grad_()
        (run(inputs) ** 2).sum().backward()
        found = [inputs.grad, *(p.grad for p in model.parameters())]
        model.zero_grad()
        return [torch.zeros(()) if g is None else g for g in found]

    def stepped(inputs):
        state, out = model.init_state(B), []
        for t in range(T):
            y, state = model.step(inputs[:, t], state, resets[:, t])
            out.append(y)
        return torch.stack(out, dim=1)

    for got, expected in zip(
        gradients(stepped),
        gradients(lambda inputs: model.sequence(inputs, model.init_state(B), resets)[0]),
        strict=True,
    ):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["lstm", "synchronous", "deltanet", "transformer"])
def test_the_first_step_is_remembered(name):
    """By all memories except a Transformer with a shorter window."""
    model = build_memory(name, hidden_size=D, num_layers=1, window=4).double()
    x = torch.randn(1, T, D, dtype=torch.float64)
    other = x.clone()
    other[:, 0] += 1
    none = torch.zeros(1, T, dtype=torch.bool)
    apart = model.sequence(x, model.init_state(1), none)[0] - model.sequence(other, model.init_state(1), none)[0]
    assert (apart[0, -1].abs().max() < 1e-12) == (name == "transformer")


def test_full_attention_drops_entries_of_earlier_episodes():
    model = build_memory("transformer", hidden_size=D, window=None)
    state = model.init_state(2)
    for t in range(20):
        _, state = model.step(torch.randn(2, D), state, torch.tensor([t % 5 == 0, t % 7 == 0]))
    assert state[0].slots == 6  # since step 14


def test_names_are_checked():
    with pytest.raises(ValueError, match="did you mean 'deltanet'"):
        build_memory("delta-net")
    with pytest.raises(ValueError, match="conv_size"):
        build_memory("lstm", conv_size=4)
    with pytest.raises(ValueError, match=r"argument: expected one of .*, got 'windw'; did you mean 'window'"):
        build_memory("synchronous", windw=4)
    with pytest.raises(ValueError, match=r"argument: expected one of .*, got 'blend'"):
        build_memory("synchronous", blend="fw-only")


@pytest.mark.parametrize("name", ["hidden_size", "num_heads", "num_layers", "window"])
@pytest.mark.parametrize("value", [0, -1, 2.5, "8"])
@pytest.mark.parametrize("memory", MODELS)
def test_sizes_are_checked(memory, name, value):
    with pytest.raises(ValueError, match=rf"{name}: expected a whole number of at least 1, got {value!r}"):
        build_memory(memory, **{name: value})
