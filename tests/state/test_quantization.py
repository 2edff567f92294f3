"""Quantized states: their size, their error, and what stays exact."""

from __future__ import annotations

import pytest
import torch

from hqlt.state import PrefixStore, pack, quantize_matrix, unpack
from hqlt.state.storage import tensors_of
from tests.layers import EVERY_STATE, build_layer, tokens
from tests.state.test_prefixes import build, put, read

STEPS = {"bfloat16": 2**-8, "int8": 1 / 127}
"""The largest error, relative to each element (bfloat16) or to the largest (int8): half a step plus a rounded scale."""


def state_of(choice, dtype=torch.float32):
    layer = build_layer(choice, dtype=dtype)
    return layer, layer(tokens(2, 9, dtype=dtype))[1]


@pytest.mark.parametrize("choice", EVERY_STATE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip(choice, dtype):
    layer, state = state_of(choice, dtype)
    exact = unpack(pack([state]), layer)[0]
    assert all(map(torch.equal, exact.leaves(), state.leaves()))
    for form, step in STEPS.items():
        packed = pack([state], form)
        (near,) = unpack(packed, layer)
        for (name, mine), theirs in zip(near.named_leaves().items(), state.leaves(), strict=True):
            assert (mine.dtype, mine.shape) == (theirs.dtype, theirs.shape), name
            if packed[f"0.{name}"].dtype == theirs.dtype and form != "bfloat16":
                assert torch.equal(mine, theirs), name
            elif theirs.numel():
                size = theirs.abs().amax() if form == "int8" else theirs.abs()
                error = (mine.double() - theirs.double()).abs()
                assert (error <= step * size.double()).all(), name


def test_only_large_tensors_are_rounded():
    _, state = state_of("delayed-chunk-vector-delta-options")
    packed = {form: pack([state], form) for form in (None, *STEPS)}
    assert {name for name, x in packed["bfloat16"].items() if x.dtype == torch.bfloat16} == {
        "0.kv.keys", "0.kv.values", "0.fw.matrix", "0.convolution",
    }  # fmt: skip
    assert {name for name, x in packed["int8"].items() if x.dtype == torch.int8} == {
        "0.kv.keys", "0.kv.values", "0.fw.matrix",
    }  # fmt: skip
    assert packed[None].keys() == packed["bfloat16"].keys() == tensors_of([state]).keys()


def test_size_in_bytes():
    """With heads of the usual width: a half, and a quarter."""
    layer = build_layer("synchronous-vector-delta-plain", dtype=torch.float32, hidden_size=128, window=16)
    _, state = layer(torch.randn(1, 20, 128))
    exact, half, quarter = (sum(x.nbytes for x in pack([state], form).values()) for form in (None, *STEPS))
    assert half == pytest.approx(exact / 2, rel=0.001)
    assert quarter == pytest.approx(exact / 4, rel=0.12)


def test_a_scale_per_channel_of_entries_and_per_row_and_column_of_matrices():
    """Small channels keep their precision beside large ones."""
    layer, state = state_of("synchronous-vector-delta-plain")
    large = 10.0 ** torch.arange(4)
    kv = state.kv._replace(keys=state.kv.keys * large)
    (matrix,) = state.fw
    state = state._replace(kv=kv, fw=state.fw._make([matrix * large * large[:, None]]))
    (near,) = unpack(pack([state], "int8"), layer)
    for mine, theirs in ((near.kv.keys, state.kv.keys), (near.fw.matrix, state.fw.matrix)):
        assert ((mine - theirs).abs().amax((1, -2)) <= theirs.abs().amax((1, -2)) / 127).all()


def test_an_empty_state_stays_empty():
    layer = build_layer("synchronous-vector-delta-plain")
    for form in STEPS:
        (near,) = unpack(pack([layer.init_state(1)], form), layer)
        assert not any(x.any() for x in near.leaves())


def test_missing_tensors_are_refused():
    layer, state = state_of("synchronous-vector-delta-plain")
    tensors = pack([state], "int8")
    del tensors["0.kv.keys"]
    with pytest.raises(ValueError, match=r"expected the tensors of this module's states, got none named 0\.kv\.keys"):
        unpack(tensors, layer)
    assert unpack({}, layer) == ()


@pytest.mark.parametrize("form", STEPS)
@pytest.mark.parametrize("on_disk", [False, True])
def test_a_store_of_quantized_states(form, on_disk, tmp_path):
    model, text = build("synchronous").float(), [1, 2, 3, 4, 5, 6]
    exact, small = (PrefixStore(model, dtype=one, folder=tmp_path / "f" if on_disk else None) for one in (None, form))
    for store in (exact, small):
        put(store, model, text[:4])
    assert small.statistics.bytes < 0.6 * exact.statistics.bytes
    store = PrefixStore(model, dtype=form, folder=tmp_path / "f") if on_disk else small
    cache = store.cache_for(text)
    assert cache.seen_tokens == 4
    error = (read(model, text, cache)[0] - read(model, text)[0][4:]).abs().max()
    assert 0 < error < 0.2


@pytest.mark.parametrize("width", [8, 9, 1])
def test_value_and_error_add_up(width):
    x = torch.randn(2, 3, 4, width)
    quantized = quantize_matrix(x)
    steps = x.abs().amax(dim=-2, keepdim=True) / 127
    assert quantized.q.dtype == torch.int8
    assert quantized.residual.shape == (2, 3, 4, -(-width // 2))
    assert ((x - quantized.value()).abs() <= 0.501 * steps).all()
    assert ((x - quantized.value() - quantized.error()).abs() <= 0.064 * steps).all(), "r = 8 does not fit in 4 bits"
    assert not quantize_matrix(torch.zeros(1, 1, 2, width)).value().any()
    assert not quantize_matrix(torch.zeros(1, 1, 2, width)).error().any()


def test_small_changes_accumulate_only_with_feedback():
    """A hundred additions of a tenth of a step, next to an element that sets the step size."""
    change, steps = torch.tensor([0.0, 0.1, -0.1, 0.13])[:, None] / 127, 100
    first = torch.tensor([1.0, 0.0, 0.3, 0.0])[:, None]
    with_feedback = without = quantize_matrix(first)
    for _ in range(steps):
        with_feedback = quantize_matrix(with_feedback.value() + change, with_feedback)
        without = quantize_matrix(without.value() + change)
    error = (with_feedback.value() - first - steps * change).abs() * 127
    lost = (without.value() - first - steps * change).abs() * 127
    assert error.max() < 4, "errors below a sixteenth of a step are lost"
    assert lost.max() > 9


def test_quantizing_again_changes_nothing():
    first = quantize_matrix(torch.randn(1, 2, 4, 8))
    again = quantize_matrix(first.value(), first)
    assert torch.equal(again.value() + again.error(), first.value() + first.error())
