"""The native step for one token, compared with the layer's parts one by one, in every state a layer can be in."""

from __future__ import annotations

import contextlib
import random as random_module
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from itertools import pairwise, product
from unittest import mock

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

from hqlt import native, ops
from hqlt.blend import Synchronous
from hqlt.layer import fused
from hqlt.memory.fw.features import LearnedMap
from hqlt.memory.kv.retention import ValueNorm
from hqlt.memory.rotary import Rotary
from hqlt.mixer import VectorMixer
from hqlt.ops.step import NOTHING, EntryBuffer, KeptInputs, Retained, Schedule, TokenInputs, digits, layout_of, plan
from hqlt.shapes import checked
from hqlt.state import load_state, save_state
from tests.laws import Laws, close, normal
from tests.layers import CHOICES, EVERY_STATE, HEADS, HIDDEN, as_memory, build_layer, tokens

pytestmark = pytest.mark.skipif(bool(native.why_not()), reason=native.why_not() or "native")

TOLERANCE = {torch.float64: 1e-10, torch.float32: 3e-5}

KEPT = {
    "surprise": {"blend": "synchronous", "retention": "surprise"},
    "all else": {
        "blend": "synchronous",
        "retention": "surprise",
        "score": "beta-error",
        "fast_weights": "gated-delta",
        "mixer": "scalar",
        "sinks": 1,
        "kept_positions": "clamped",
    },
    "additive": {"blend": "synchronous", "retention": "value-norm", "fast_weights": "linear", "rope_theta": None},
    "kv-only": {"blend": "kv-only", "retention": "random", "kept_positions": "none"},
    "sinks": {"blend": "kv-only", "sinks": 2},
    "delayed-streaming": {"blend": "delayed-streaming", "retention": "value-norm", "sinks": 1, "kept_alike": True},
    "delayed-chunk": {"blend": "delayed-chunk", "retention": "random", "mixer": "sum"},
}
"""Options of layers that keep entries beyond the window: everything that the kernel supports."""


def layer_that_keeps(choice, window, kept, dtype=torch.float64, **more):
    options = KEPT[choice] | ({"kept": kept} if "retention" in KEPT[choice] else {})
    return build_layer("", window, dtype, **options, **more)


@contextlib.contextmanager
def counting_steps():
    """Counts the tokens processed by the native step."""
    with mock.patch.object(fused, "run", wraps=fused.run) as run:
        yield run.call_args_list


def has_native_form(layer):
    return not fused.without_native_form(layer.parts())


def check_close(got, expected, tolerance):
    close(got[0], expected[0], tolerance)
    for mine, theirs in zip(got[1].leaves(), expected[1].leaves(), strict=True):
        assert mine.dtype == theirs.dtype
        close(mine, theirs, tolerance)


class TestLaws(Laws):
    """The laws of memories, where every single token is a native step."""

    @pytest.fixture(params=[*EVERY_STATE, "surprise", "delayed-streaming"])
    def build(self, request):
        options = CHOICES.get(request.param, {})
        full = options.get("window", 0) is None

        def build(window):
            keeps = request.param in KEPT
            layer = (
                layer_that_keeps(request.param, window, 2)
                if keeps
                else build_layer(request.param, options.get("window", window))
            )
            memory = as_memory(layer)
            return memory._replace(run=torch.no_grad()(memory.run), canonical=not full)

        return build

    test_gradients_equal_finite_differences = None  # a step has no gradients
    test_outputs_and_gradients_equal_the_reference = None
    test_causality = None


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("choice", "window"), [*product(EVERY_STATE, [1, 2, 5, 16]), *product(sorted(CHOICES.keys() - EVERY_STATE), [5])]
)
def test_many_steps_equal_the_parts(choice, window, dtype):
    """With rows at different places in their buffers, with resets in some, and several times around each buffer."""
    b, t = 3, 40
    layer = build_layer(choice, CHOICES[choice].get("window", window), dtype)
    x = tokens(b, t, dtype=dtype)
    resets = torch.zeros(b, t, dtype=torch.bool)
    resets[0, 7] = resets[0, 8] = resets[1, 21] = resets[2, 39] = True
    with torch.no_grad():
        start = torch.zeros(b, 4, dtype=torch.bool)
        start[1, 1] = start[2, 3] = True  # the rows have seen four, three and one token
        state = layer(tokens(b, 4, seed=1, dtype=dtype), resets=start)[1]
        with counting_steps() as calls:
            for i in range(t):
                marked = resets[:, i : i + 1]
                arguments = x[:, i : i + 1], state, marked if i % 2 or marked.any() else None
                before = [part.clone() for part in state.leaves()]
                got = layer(*arguments)
                assert all(map(torch.equal, state.leaves(), before))
                with ops.use_backend("reference"):
                    expected = layer(*arguments)
                check_close(got, expected, TOLERANCE[dtype])
                state = got[1]
    assert len(calls) == (t if has_native_form(layer) else 0)


@pytest.mark.parametrize(
    ("window", "kept", "t", "dtype"),
    [(1, 2, 20, torch.float64), (5, 3, 200, torch.float64), (16, 20, 60, torch.float64), (5, 3, 200, torch.float32)],
)
@pytest.mark.parametrize("choice", KEPT)
def test_many_steps_keep_the_same_entries_as_the_parts(choice, window, kept, t, dtype):
    """From empty memories and across resets: the same entries, scores, positions and outputs."""
    layer, x = layer_that_keeps(choice, window, kept, dtype), tokens(2, t, dtype=dtype)
    resets = torch.zeros(2, t, dtype=torch.bool)
    resets[0, 11] = resets[0, 12] = resets[1, t // 2] = True
    state = layer.init_state(2)
    with torch.no_grad(), counting_steps() as calls:
        for i in range(t):
            marked = resets[:, i : i + 1]
            arguments = x[:, i : i + 1], state, marked if i % 2 or marked.any() else None
            before = state.clone()
            got = layer(*arguments)
            assert all(map(torch.equal, state.leaves(), before.leaves()))
            with ops.use_backend("reference"):
                expected = layer(*arguments)
            check_close(got, expected, TOLERANCE[dtype])
            assert torch.equal(got[1].kv.kept.positions, expected[1].kv.kept.positions)
            state = got[1]
    assert len(calls) == t
    assert layer.explain().name == "native"


MAPPED = {"feature_map": "learned"}
GROUPED = {
    "retrofitted": {"blend": "synchronous", "mixer": "add", "kv_gate": True, "fw_activation": None, "sinks": 2}
    | MAPPED,
    "add": {"blend": "synchronous", "mixer": "add"},
    "streaming add": {"blend": "delayed-streaming", "mixer": "add", "head_norm": False},
    "chunk add": {"blend": "delayed-chunk", "mixer": "add", "kv_gate": True},
    "surprise": {"blend": "synchronous", "retention": "surprise", "kept": 3, "sinks": 1, "mixer": "scalar"},
    "gated-delta": {"blend": "delayed-streaming", "fast_weights": "gated-delta", "mixer": "sum"} | MAPPED,
    "linear": {"blend": "delayed-chunk", "fast_weights": "linear", "kv_activation": None, "fw_activation": None}
    | MAPPED,
    "full attention": {
        "blend": "kv-only",
        "window": None,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "full and delta": {"blend": "synchronous", "window": None, "kv_activation": "silu"},
    "fw-only": {"blend": "fw-only", "fw_activation": None} | MAPPED,
}
"""Layers with a native form whose KV heads may have several query heads."""


@pytest.mark.parametrize(
    ("group", "width", "dtype"),
    [*product([1, 2, 3, 5, 8], [4], TOLERANCE), *product([3, 7], [2, 6, 16, 50, 64], [torch.float64])],
)
@pytest.mark.parametrize("choice", GROUPED)
def test_groups_of_query_heads(choice, group, width, dtype):
    """From empty memories, several times around the window, across resets."""
    heads = {"num_heads": 2 * group, "num_kv_heads": 2, "head_dim": width}
    layer, b, t = build_layer("", **GROUPED[choice] | heads, dtype=dtype), 2, 14
    assert layer.explain().name == "native"
    x, resets, state = tokens(b, t, dtype=dtype), torch.zeros(b, t, dtype=torch.bool), layer.init_state(b)
    resets[1, 7] = True
    with torch.no_grad(), counting_steps() as calls:
        for weight in layer.parameters():
            weight.mul_(0.3 if weight.dim() == 2 else 1)
        for i in range(t):
            arguments = x[:, i : i + 1], state, resets[:, i : i + 1] if i > 3 else None
            got = layer(*arguments)
            with ops.use_backend("reference"):
                check_close(got, layer(*arguments), TOLERANCE[dtype])
            state = got[1]
    assert len(calls) == t


@pytest.mark.parametrize("choice", [*GROUPED, *KEPT, *EVERY_STATE])
def test_bfloat16(choice):
    """Inputs, weights, KV entries and outputs in bfloat16, all else in float32: as the parts in float64, up to
    the final rounding. Each step is compared from the same state, because rounding may change what is kept."""

    def double(x):
        return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x

    heads = {"num_heads": 6, "num_kv_heads": 2, "head_dim": 20}
    if choice in GROUPED:
        layer = build_layer("", dtype=torch.bfloat16, **GROUPED[choice] | heads)
    elif choice in KEPT:
        layer = layer_that_keeps(choice, 3, 2, dtype=torch.bfloat16, **heads)
    else:
        layer = build_layer(choice, dtype=torch.bfloat16)
    if not has_native_form(layer):
        pytest.skip("no native form")
    exact, b, t = deepcopy(layer).double(), 2, 9
    x, resets, state = tokens(b, t).bfloat16(), torch.zeros(b, t, dtype=torch.bool), layer.init_state(b)
    resets[1, 4] = True
    with torch.no_grad(), counting_steps() as calls:
        for i in range(t):
            token, marks = x[:, i : i + 1], resets[:, i : i + 1]
            projected, _ = layer.project(token, state, marks)
            read, after = layer.read_memories(projected, state, marks)
            with ops.use_backend("reference"):
                expected = exact.parts().run(pytree.tree_map(double, projected), state.map(double), marks)
            got = [read, *after._replace(convolution=read).leaves()]
            wanted = [expected[0], *expected[1]._replace(convolution=expected[0]).leaves()]
            for mine, theirs in zip(got, wanted, strict=True):
                tolerance = 4e-3 if mine.dtype == torch.bfloat16 else 1e-4
                assert (mine.double() - theirs).norm() <= tolerance * theirs.double().norm()
            assert [x.dtype for x in after.leaves()] == [x.dtype for x in state.leaves()]
            state = layer(token, state, marks)[1]
    assert len(calls) == 2 * t


@pytest.mark.parametrize("width", [2, 6, 50, 64, 128])
@pytest.mark.parametrize("choice", ["surprise", "delayed-streaming"])
def test_widths_of_kept_entries(choice, width):
    layer = layer_that_keeps(choice, 3, 4, hidden_size=3 * width, num_heads=3)
    with torch.no_grad():
        for weight in layer.parameters():
            weight.mul_((HIDDEN / (3 * width)) ** 0.5 if weight.dim() == 2 else 1)
        for seen in (1, 3, 6, 7, 30):
            state, x = layer(normal(2, seen, 3 * width, seed=seen))[1], normal(2, 1, 3 * width, seed=99)
            got = layer(x, state)
            with ops.use_backend("reference"):
                check_close(got, layer(x, state), 1e-10)


@pytest.mark.parametrize("choice", ["surprise", "all else", "delayed-streaming"])
def test_distances_of_any_length(choice):
    """Kept entries may be any number of tokens old; in a state made by hand, they may even be in the future."""
    layer, x = layer_that_keeps(choice, 3, 4), tokens(2, 1)
    with torch.no_grad():
        state = layer(tokens(2, 9))[1]
        expected = layer(x, state)[0]
        for far in (60, 4_090, 10_000_000):
            kept = state.kv.kept._replace(positions=state.kv.kept.positions + far)
            later = state._replace(kv=state.kv._replace(kept=kept), position=state.position + far)
            close(layer(x, later)[0], expected)
        for places in ([0, 64, 4_096, 262_144], [-70, 300_000, 5, -2]):
            positions = torch.tensor(places)[None, :, None] + torch.zeros_like(state.kv.kept.positions[:, :4])
            positions = torch.cat([positions, state.kv.kept.positions[:, 4:]], dim=1)
            kept = state.kv.kept._replace(positions=positions)
            made = state._replace(kv=state.kv._replace(kept=kept), position=state.position + 500)
            got = layer(x, made)
            with ops.use_backend("reference"):
                check_close(got, layer(x, made), 1e-9)


def test_unused_slots_have_no_effect():
    layer, x = layer_that_keeps("surprise", 3, 4), tokens(2, 1)
    with torch.no_grad():
        state = layer(tokens(2, 4))[1]  # the two entries that have left the window are in slots 2 and 3
        kept = state.kv.kept
        dirty = kept._replace(keys=kept.keys.clone(), values=kept.values.clone(), scores=kept.scores.clone())
        for held in (dirty.keys, dirty.values, dirty.scores):
            held[:, :2] = torch.nan
        check_close(layer(x, state._replace(kv=state.kv._replace(kept=dirty))), layer(x, state), 0)


def check_any_number_of_threads(layer, x, state, resets, threads):
    """Check that the result equals the reference's for any number of threads."""
    before = torch.get_num_threads()
    with ops.use_backend("reference"):
        expected = layer(x, state, resets)
    try:
        for number in threads:
            torch.set_num_threads(number)
            check_close(layer(x, state, resets), expected, 1e-10)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("choice", ["surprise", "delayed-streaming"])
def test_kept_entries_larger_than_a_cache(choice):
    layer = layer_that_keeps(choice, 5, 30, hidden_size=3 * 96, num_heads=3)
    with torch.no_grad():
        for weight in layer.parameters():
            weight.mul_(0.2 if weight.dim() == 2 else 1)
        state, x = layer(normal(20, 40, 3 * 96))[1], normal(20, 1, 3 * 96, seed=1)
        resets = torch.arange(20)[:, None] == 1
        check_any_number_of_threads(layer, x, state, resets, (1, 3))


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("choice", KEPT)
def test_every_number_of_kept_entries_is_written(choice):
    layer = layer_that_keeps(choice, 4, 3)
    with torch.no_grad():
        for seen in (1, 4, 5, 9):
            y, after = layer(tokens(2, 1), layer(tokens(2, seen))[1])
            assert all(x.isfinite().all() for x in (y, *after.leaves()))


def test_retentions_that_are_replaced_or_have_hooks_run_part_by_part():
    class Other(ValueNorm):
        def score(self, new):
            return -super().score(new)

    def exchanged(layer):
        layer.kv.retention = Other(layer.heads, kept=2).double()

    def replaced(layer):
        layer.kv.retention.score = lambda new: -new.values.norm(dim=-1)

    def heard(layer):
        layer.kv.retention.register_forward_hook(lambda *call: None)

    for change in (exchanged, replaced, heard):
        layer = build_layer("", 2, blend="kv-only", retention="value-norm", kept=2)
        with torch.no_grad(), counting_steps() as calls:
            state = layer(tokens(2, 5))[1]
            layer(tokens(2, 1), state)
            assert len(calls) == 1
            change(layer)
            got = layer(tokens(2, 1), state)
            assert len(calls) == 1
            with ops.use_backend("reference"):
                check_close(got, layer(tokens(2, 1), state), 1e-10)
        assert ("retention" in layer.explain().why) == (change is exchanged)
    for how in ({"kept_norm": True}, {"kept_gate": 0.0}):
        layer = build_layer("", 2, blend="kv-only", retention="value-norm", kept=2, **how)
        assert layer.explain().why.endswith("no native form of kv")


def test_parts_of_the_fw_memory_that_are_replaced_or_have_hooks_run_part_by_part():
    class Other(LearnedMap):
        def mapped(self, matrices, x):
            return -super().mapped(matrices, x)

    heard = []
    for change in ("none", "class", "hook", "hook of the activation"):
        layer = build_layer("", 2, feature_map="learned", mixer="add")
        if change == "class":
            layer.fw.feature_map = Other(layer.heads).double()
        if change.startswith("hook"):
            part = layer.fw.feature_map if change == "hook" else layer.fw.v_activation
            part.register_forward_hook(lambda *call: heard.append(call))
        with torch.no_grad(), counting_steps() as calls:
            state, x = layer(tokens(2, 5))[1], tokens(2, 1)
            got = layer(x, state)
            assert len(calls) == (change == "none")
            with ops.use_backend("reference"):
                check_close(got, layer(x, state), 1e-10)
        assert ("fw" in layer.explain().why) == (change == "class")
    assert len(heard) == 2 * 3


@pytest.mark.parametrize("rope_theta", [10_000.0, None])
@pytest.mark.parametrize("width", [2, 6, 16, 50, 64, 128])
@pytest.mark.parametrize("fast_weights", ["delta", "linear", "gated-delta"])
@pytest.mark.parametrize("blend", ["synchronous", "delayed-streaming", "delayed-chunk"])
def test_widths(blend, fast_weights, width, rope_theta):
    """Heads narrower than a SIMD vector, not a multiple of it, and many heads; a buffer just full, and a full one."""
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
                check_close(got, layer(x, state), 1e-10)


@pytest.mark.parametrize("blend", ["synchronous", "delayed-streaming", "delayed-chunk"])
@pytest.mark.parametrize("b", [2, 20])
def test_states_larger_than_a_cache(blend, b):
    """Large states are written past the cache, and even larger ones by several threads."""
    layer = build_layer(f"{blend}-vector-delta-plain", 9, hidden_size=3 * 96, num_heads=3)
    with torch.no_grad():
        for weight in layer.parameters():
            weight.mul_(0.2 if weight.dim() == 2 else 1)
        state = layer(normal(b, 20, 3 * 96))[1]
        x, resets = normal(b, 1, 3 * 96, seed=1), torch.arange(b)[:, None] == 1
        check_any_number_of_threads(layer, x, state, resets, (1, 2, 3, 16))


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("choice", CHOICES)
def test_every_number_is_written(choice, dtype):
    layer = build_layer(choice, dtype=dtype)
    with torch.no_grad():
        for seen in (1, 3, 9):
            state = layer(tokens(2, seen, dtype=dtype))[1]
            y, after = layer(tokens(2, 1, dtype=dtype), state)
            assert all(x.isfinite().all() for x in (y, *after.leaves()))


@pytest.mark.parametrize("choice", EVERY_STATE)
def test_states_share_no_memory(choice):
    """The new state shares no memory with the old one, so that an in-place change does not affect the other. (With full
    attention, states made by steps do share entries; see `TestEntryBuffer`.)"""
    layer = build_layer(choice)
    with torch.no_grad():
        state = layer(tokens(2, 9))[1]
        after = layer(tokens(2, 1), state)[1]
    if not has_native_form(layer):
        return
    before = {part.data_ptr() for part in state.leaves() if part.numel()}
    assert not before & {part.data_ptr() for part in after.leaves() if part.numel()}


class TestEntryBuffer:
    """With full attention, entries are appended in place, which no state shows."""

    @pytest.fixture(autouse=True)
    def few_spare_slots(self, monkeypatch):
        monkeypatch.setattr(EntryBuffer, "SPARE", 3)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    @pytest.mark.parametrize("b", [1, 3])
    def test_any_state_can_be_continued_in_several_ways(self, b, dtype):
        layer, x = build_layer("synchronous-full", dtype=dtype), tokens(b, 30, dtype=dtype)
        random, states = random_module.Random(0), [layer.init_state(b)]
        with torch.no_grad():
            for i in range(30):
                marks = torch.rand(b, 1) < 0.2 if i % 7 == 6 else None
                before = random.choice(states[-4:])
                copies = [state.clone() for state in states]
                y, after = layer(x[:, i : i + 1], before, marks)
                same, then = layer(x[:, i : i + 1], before.clone(), marks)
                assert torch.equal(y, same) and all(map(torch.equal, after.leaves(), then.leaves()))
                for state, copy in zip(states, copies, strict=True):
                    assert all(map(torch.equal, state.leaves(), copy.leaves()))
                states.append(after)

    def test_entries_are_copied_only_when_there_is_no_room(self):
        layer, x = build_layer("kv-only-full-options"), tokens(1, 1)
        with torch.no_grad():
            state, places = layer(tokens(1, 2))[1], []
            for _ in range(8):
                state = layer(x, state)[1]
                places.append(state.kv.keys.data_ptr())
        assert [a == b for a, b in pairwise(places)] == [True, True, False, True, True, False, True]

    def test_keys_and_values_of_different_states(self):
        """A state made by hand is continued like any other, and nothing is appended in place."""
        layer, x = build_layer("synchronous-full"), tokens(3, 1)
        with torch.no_grad():
            one, other = (layer(x, layer(tokens(3, 5, seed=i))[1])[1] for i in range(2))
            longer = layer(x, other)[1].kv.values[:, :6]
            for kv in (
                one.kv._replace(values=other.kv.values),
                one.kv._replace(values=other.kv.values.clone()),
                one.kv._replace(values=longer),
                one.kv._replace(keys=one.kv.values, values=one.kv.keys),
            ):
                made = one._replace(kv=kv)
                check_close(layer(x, made), layer(x, made.clone()), 0)

    def test_threads_continue_the_same_state(self):
        layer = build_layer("synchronous-full", dtype=torch.float32)
        with torch.no_grad():
            state = layer(tokens(1, 1, dtype=torch.float32), layer(tokens(1, 5, dtype=torch.float32))[1])[1]
            inputs = [tokens(1, 1, seed=i, dtype=torch.float32) for i in range(16)]
            expected = [layer(x, state.clone()) for x in inputs]
            with ThreadPoolExecutor(8) as pool:
                got = list(pool.map(torch.no_grad()(lambda x: layer(x, state)), inputs))
        for mine, theirs in zip(got, expected, strict=True):
            check_close(mine, theirs, 1e-6)

    def test_states_can_be_copied_stored_and_read_in_one_call(self, tmp_path):
        layer, x = build_layer("synchronous-full"), tokens(2, 5)
        with torch.no_grad():
            state = layer(tokens(2, 1), layer(tokens(2, 5))[1])[1]
            expected = layer(x, state.clone())
            save_state(tmp_path / "state.safetensors", state, layer)
            torch.save(state.leaves(), tmp_path / "state.pt")
            stored = layer.state_of(torch.load(tmp_path / "state.pt"))
            for other in (state, deepcopy(state), stored, load_state(tmp_path / "state.safetensors", layer)):
                check_close(layer(x, other), expected, 0)


def test_when_the_parts_run_instead():
    """With gradients, other dtypes, several tokens, no state, a forced backend, checks, a tracer, unknown parts."""
    layer, x = build_layer("synchronous-vector-delta-plain"), tokens(2, 1)
    with torch.no_grad():
        state = layer(tokens(2, 3))[1]
    with counting_steps() as calls:
        layer(x, state)  # weights require gradients
        with torch.no_grad():
            layer(x, None)
            layer(tokens(2, 2), state)
            layer(x, state.to(dtype=torch.float32))
            build_layer("synchronous-vector-delta-plain", dtype=torch.float16)(x.half(), state.to(dtype=torch.float16))
            with ops.use_backend("native"):
                layer(x, state)
            with pytest.raises(ValueError, match="finite"), checked():
                layer(x * torch.nan, state)
            torch.export.export(layer, (x, state))

        assert not calls
        with torch.no_grad():
            layer(x, state)
        with torch.inference_mode():
            layer(x, state)
        assert len(calls) == 2


def test_parts_that_are_replaced_or_have_hooks_run_one_by_one():
    class Other(Synchronous):
        pass

    class Halved(VectorMixer):
        def forward(self, logits, reads):
            return 0.5 * super().forward(logits, reads)

    x = tokens(2, 1)
    for name, part in [
        ("blend", Other(4)),
        ("mixer", Halved(build_layer("kv-only").heads).double()),
        ("o_norm", nn.LayerNorm(HIDDEN // HEADS).double()),
        ("v_activation", nn.Tanh()),
    ]:
        layer = build_layer("synchronous-vector-delta-plain")
        setattr(layer, name, part)
        with torch.no_grad(), counting_steps() as calls:
            state = layer(tokens(2, 3))[1]
            got = layer(x, state)
            with ops.use_backend("reference"):
                check_close(got, layer(x, state), 1e-10)
        assert not calls

    layer, heard = build_layer("synchronous-vector-delta-plain"), []
    layer.mixer.register_forward_hook(lambda *call: heard.append(call))
    with torch.no_grad(), counting_steps() as calls:
        layer(x, layer(tokens(2, 3))[1])
    assert len(heard) == 2 and not calls


def test_constants_of_the_layer_may_change():
    layer, x = build_layer("synchronous-vector-delta-plain"), tokens(2, 1)
    with torch.no_grad():
        state = layer(tokens(2, 3))[1]
        layer.fw.beta_max, layer.o_norm.eps, layer.kv.positions = 0.5, 0.1, Rotary(3.0)
        with counting_steps() as calls:
            got = layer(x, state)
        with ops.use_backend("reference"):
            check_close(got, layer(x, state), 1e-10)
    assert len(calls) == 1


def test_a_layer_can_be_copied_and_stored_after_a_step(tmp_path):
    layer, x = build_layer("synchronous-vector-delta-plain"), tokens(2, 1)
    with torch.no_grad():
        state = layer(tokens(2, 3))[1]
        expected = layer(x, state)
        torch.save(layer, tmp_path / "layer.pt")
        for copy in (deepcopy(layer), torch.load(tmp_path / "layer.pt", weights_only=False)):
            copy.o_norm.weight.mul_(2)
            copy.o_proj.weight.mul_(0.5)
            check_close(copy(x, state), expected, 1e-10)
        check_close(layer(x, state), expected, 1e-10)


def test_unsupported_inputs_are_left_to_the_parts():
    width, double = HIDDEN // HEADS, {"dtype": torch.float64}
    with torch.no_grad():
        state = build_layer("synchronous-vector-delta-plain")(tokens(2, 3))[1]
    x, beta, gate = normal(2, 1, HEADS, width), torch.ones(2, 1, HEADS, **double), normal(2, 1, HIDDEN)
    norm, table = torch.ones(width, **double), torch.ones(4, 1, width // 2, **double)
    inputs, usual = (
        TokenInputs(
            x,
            x,
            x,
            beta,
            *[NOTHING] * 5,
            gate,
            norm,
            NOTHING,
            *state.kv[:2],
            NOTHING,
            state.fw.matrix,
            NOTHING,
            state.position,
        ),
        Schedule("own", True, 4, "delta", "vector", "all"),
    )

    def serves(schedule=usual, rotary=(table, table), **parts):
        return plan(schedule, tuple(map(layout_of, inputs._replace(**parts))), rotary=rotary) is not None

    assert serves()
    assert serves(norm=NOTHING, rotary=(NOTHING, NOTHING), resets=torch.ones(2, 1) > 0)
    for changes in [
        {"window": 9},
        {"writes": "leaving"},
        {"writes": "leaving", "window": None},
        {"writes": "chunk", "window": 3},
        {"rule": "linear"},
        {"mixer": "scalar"},
        {"mixer": "add-and-gate"},
        {"mixer": "alone"},
        {"writes": "nothing"},
        {"attends": False},
    ]:
        assert not serves(usual._replace(**changes)), changes
    fewer = {name: getattr(inputs, name)[:, :, :1] for name in ("k", "v", "beta", "keys", "values")}
    fewer["matrix"] = inputs.matrix[:, :1]
    maps = {"q_map": torch.ones(HEADS, width, width, **double), "k_map": torch.ones(HEADS, width, width, **double)}
    assert serves(**fewer)  # two query heads for one KV head
    assert serves(**maps)
    assert serves(usual._replace(activated="none"))
    assert serves(usual._replace(mixer="add"))
    assert serves(usual._replace(mixer="add-and-gate"), gate=normal(2, 1, HIDDEN + HEADS))
    more = {"k": 3, "v": 3, "beta": 3, "keys": 3, "values": 3}  # KV heads for two query heads
    for wrong in [
        {name: torch.cat([getattr(inputs, name)[:, :, :1]] * n, dim=2) for name, n in more.items()}
        | {"matrix": torch.cat([inputs.matrix[:, :1]] * 3, dim=1)},
        {"q_map": maps["q_map"]},
        {"k_map": maps["k_map"]},
        maps | {"q_map": maps["q_map"][:1]},
        maps | {"k_map": maps["k_map"][..., :1]},
        maps | {"k_map": maps["k_map"].float()},
        {"gate": normal(2, 1, HIDDEN + HEADS)},
        fewer | {"gate": gate[..., :width]},
        {"matrix": inputs.matrix[:, :, :1]},
        {"values": inputs.values[:, :2]},
        {"position": inputs.position[:1]},
        {"position": inputs.position.int()},
        {"keys": inputs.keys.float()},
        {"keys": inputs.keys.to("meta")},
        {"keys": nn.Parameter(inputs.keys)},
        {"q": x[:1]},
        {"q": x.expand(2, 2, -1, -1)},
        {"v": x[0]},
        {"beta": beta[..., :1]},
        {"beta": NOTHING},
        {"gate": gate[..., :-1]},
        {"gate": NOTHING},
        {"norm": norm[:-1]},
        {"norm": norm.float()},
        {"resets": torch.ones(2, 2) > 0},
        {"resets": torch.ones(2, 1)},
        {"rotary": (table[:3], table[:3])},
        {"rotary": (table, table[..., :1])},
        {"rotary": (table.float(), table.float())},
    ]:
        assert not serves(**wrong), wrong


def test_unsupported_kept_entries_are_left_to_the_parts():
    layer = layer_that_keeps("surprise", 4, 3)
    with torch.no_grad():
        state = layer(tokens(2, 9))[1]
    width, x, ones = HIDDEN // HEADS, normal(2, 1, HEADS, HIDDEN // HEADS), torch.ones(4, 1, 2, dtype=torch.float64)
    own = x, x, x, normal(2, 1, HEADS), *[NOTHING] * 5, normal(2, 1, HIDDEN), NOTHING, NOTHING
    inputs = TokenInputs(*own, *state.kv[:2], NOTHING, state.fw.matrix, NOTHING, state.position)
    usual = Schedule("own", True, 4, "delta", "vector", "all", Retained("error", 0, False, "true"))
    assert width == 4
    digit_tables = Rotary(3.0).cos_sin(digits(), width, torch.float64)

    def serves(schedule=usual, rotary=(ones, ones, *digit_tables), **parts):
        kept = KeptInputs(*state.kv.kept)._replace(**parts)
        return plan(schedule, tuple(map(layout_of, (*inputs, *kept))), rotary=rotary) is not None

    assert serves()
    assert serves(rotary=(NOTHING,) * 4)
    scores = state.kv.kept.scores
    for wrong in [
        {"schedule": usual._replace(retained=None)},
        {"schedule": usual._replace(rule="linear")},
        {"rotary": (ones, ones)},
        {"rotary": (ones, ones, *(x[:-1] for x in digit_tables))},
        {"kept_keys": state.kv.kept.keys[:, 1:]},
        {"kept_keys": NOTHING},
        {"kept_values": state.kv.kept.values.float()},
        {"kept_positions": state.kv.kept.positions.int()},
        {"kept_scores": scores[:, 1:]},
        {"kept_scores": scores[:1]},
    ]:
        assert not serves(**wrong), wrong
    assert plan(usual, tuple(map(layout_of, inputs)), rotary=(ones, ones, *digit_tables)) is None
