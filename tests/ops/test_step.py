"""One native token: every blend is its own readable twin, in every state that a layer can be in."""

from __future__ import annotations

import contextlib
from unittest import mock

import pytest
import torch

from hqlt import native, ops
from hqlt.blend import Synchronous
from hqlt.blend import blend as blend_module
from hqlt.memory import DeltaMemory, KVMemory
from hqlt.ops.step import Held, Schedule, step
from hqlt.shapes import checked
from tests.laws import Laws, close, normal
from tests.layers import CHOICES, EVERY_STATE, HEADS, HIDDEN, as_memory, build_layer, tokens

pytestmark = pytest.mark.skipif(bool(native.why_not()), reason=native.why_not() or "native")

TOLERANCE = {torch.float64: 1e-10, torch.float32: 3e-5}


@contextlib.contextmanager
def counted():
    """How many tokens the native step takes."""
    calls = []

    def count(*arguments, **options):
        stepped = step(*arguments, **options)
        calls.extend([1] if stepped else [])
        return stepped

    with mock.patch.object(blend_module, "step", count):
        yield calls


def alike(got, expected, tolerance):
    close(got[0], expected[0], tolerance)
    for mine, theirs in zip(got[1], expected[1], strict=True):
        assert mine.dtype == theirs.dtype
        close(mine, theirs, tolerance)


class TestLaws(Laws):
    """One pass ≡ step by step, resets ≡ separate sequences and the rest, where every single token is a native step."""

    @pytest.fixture(params=EVERY_STATE)
    def build(self, request):
        full = CHOICES[request.param].get("window", 0) is None

        def build(window):
            memory = as_memory(build_layer(request.param, CHOICES[request.param].get("window", window)))
            return memory._replace(run=torch.no_grad()(memory.run), canonical=not full)

        return build

    test_gradients_are_finite_differences = None  # a step has none
    test_outputs_and_gradients_are_the_references = None
    test_the_future_changes_nothing = None


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("window", [1, 2, 5, 16])
@pytest.mark.parametrize("choice", EVERY_STATE)
def test_many_steps_are_the_twins(choice, window, dtype):
    """Rows in different places of their buffers, resets in some of them, several times around each buffer."""
    b, t = 3, 40
    layer = build_layer(choice, CHOICES[choice].get("window", window), dtype)
    x = tokens(b, t, dtype=dtype)
    resets = torch.zeros(b, t, dtype=torch.bool)
    resets[0, 7] = resets[0, 8] = resets[1, 21] = resets[2, 39] = True
    with torch.no_grad():
        start = torch.zeros(b, 4, dtype=torch.bool)
        start[1, 1] = start[2, 3] = True  # rows that have seen four, three and one token
        state = layer(tokens(b, 4, seed=1, dtype=dtype), resets=start)[1]
        with counted() as calls:
            for i in range(t):
                marked = resets[:, i : i + 1]
                arguments = x[:, i : i + 1], state, marked if i % 2 or marked.any() else None
                before = [part.clone() for part in state]
                got = layer(*arguments)
                assert all(map(torch.equal, state, before))
                with ops.use_backend("reference"):
                    expected = layer(*arguments)
                alike(got, expected, TOLERANCE[dtype])
                state = got[1]
    assert len(calls) == t


@pytest.mark.parametrize("rope_theta", [10_000.0, None])
@pytest.mark.parametrize("width", [2, 6, 16, 50, 64, 128])
@pytest.mark.parametrize("fast_weights", ["delta", "linear"])
@pytest.mark.parametrize("blend", ["synchronous", "delayed-streaming", "delayed-chunk"])
def test_widths(blend, fast_weights, width, rope_theta):
    """Heads narrower than a vector, no multiple of one, and many; a buffer that just fills up and one that is full."""
    options = {"hidden_size": 3 * width, "num_heads": 3, "fast_weights": fast_weights, "rope_theta": rope_theta}
    layer = build_layer(f"{blend}-vector-delta-plain", 9, **options)
    with torch.no_grad():
        for weight in layer.parameters():
            if weight.dim() == 2:
                weight.mul_((HIDDEN / (3 * width)) ** 0.5)
        for seen in (1, 8, 9, 17, 18, 30):
            state = layer(normal(2, seen, 3 * width, seed=seen))[1]
            x = normal(2, 1, 3 * width, seed=99)
            got = layer(x, state)
            with ops.use_backend("reference"):
                alike(got, layer(x, state), 1e-10)


def test_several_threads_give_the_same():
    layer = build_layer("synchronous-vector-delta-plain", 9, hidden_size=3 * 96, num_heads=3)
    before = torch.get_num_threads()
    with torch.no_grad():
        state = layer(normal(4, 20, 3 * 96))[1]
        results = []
        for threads in (1, 2, 3, 16):
            torch.set_num_threads(threads)
            results.append(layer.blend(*normal(3, 4, 1, 3, 96), torch.ones(4, 1, 3, dtype=torch.float64), state, None))
    torch.set_num_threads(before)
    for reads, after in results[1:]:
        assert all(map(torch.equal, (*reads, *after), (*results[0][0], *results[0][1])))


@pytest.mark.parametrize("choice", EVERY_STATE)
def test_the_states_are_their_own(choice):
    """What comes out shares no numbers with what went in: changing one in place leaves the other."""
    layer = build_layer(choice)
    with torch.no_grad():
        state = layer(tokens(2, 9))[1]
        after = layer(tokens(2, 1), state)[1]
    given = {part.data_ptr() for part in state if part.numel()}
    assert not given & {part.data_ptr() for part in after if part.numel()}


def test_where_the_twin_runs():
    """With gradients, in other dtypes, for more tokens, without a state, forced by name, checked, traced, unknown."""
    layer, x = build_layer("synchronous-vector-delta-plain"), tokens(2, 1)
    with torch.no_grad():
        state = layer(tokens(2, 3))[1]
    with counted() as calls:
        layer(x, state)  # weights ask for gradients
        with torch.no_grad():
            layer(x, None)
            layer(tokens(2, 2), state)
            layer(x, state.to(dtype=torch.float32))
            build_layer("synchronous-vector-delta-plain", dtype=torch.bfloat16)(
                x.bfloat16(), state.to(dtype=torch.bfloat16)
            )
            with ops.use_backend("native"):
                layer(x, state)
            with pytest.raises(ValueError, match="finite"), checked():
                layer(x * torch.nan, state)
            torch.export.export(layer, (x, state))

            class Other(Synchronous):
                pass

            assert Other(KVMemory(4, None), DeltaMemory()).schedule is None
        assert not calls
        with torch.no_grad():
            layer(x, state)
        with torch.inference_mode():
            layer(x, state)
        assert len(calls) == 2


def test_what_does_not_fit_is_left_to_the_twin():
    layer = build_layer("synchronous-vector-delta-plain")
    with torch.no_grad():
        held = Held(*layer(tokens(2, 3))[1][:6])
    x = normal(2, 1, HEADS, HIDDEN // HEADS)
    beta = torch.ones(2, 1, HEADS, dtype=torch.float64)
    table = torch.ones(4, 1, HIDDEN // HEADS // 2, dtype=torch.float64)
    assert step(x, x, x, beta, held, Schedule("own", True, 4), rotary=(table, table))
    for schedule, changed in [
        (Schedule("own", True, 9), {}),
        (Schedule("leaving", True, 4), {}),
        (Schedule("leaving", True, None), {}),
        (Schedule("own", True, 4, "linear"), {}),
        (Schedule("chunk", True, 3), {}),
        (Schedule("own", True, 4), {"matrix": held.matrix[:, :, :1]}),
        (Schedule("own", True, 4), {"values": held.values[:, :2]}),
        (Schedule("own", True, 4), {"position": held.position[:1]}),
        (Schedule("own", True, 4), {"position": held.position.int()}),
        (Schedule("own", True, 4), {"keys": held.keys.float()}),
    ]:
        assert step(x, x, x, beta, held._replace(**changed), schedule) is None
    for tables in [(table[:3], table), (table, table[..., :1, :1]), (table.float(), table)]:
        assert step(x, x, x, beta, held, Schedule("own", True, 4), rotary=tables) is None
    for q, strength, resets in [(x[:1], beta, None), (x, beta[..., :1], None), (x, beta, torch.ones(2, 2) > 0)]:
        assert step(q, x, x, strength, held, Schedule("own", True, 4), resets=resets) is None
