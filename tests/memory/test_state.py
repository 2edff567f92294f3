"""After any operation on a state, further outputs equal those of the whole sequence."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import hqlt
from hqlt import MemoryState, load_state, save_state
from tests.laws import close
from tests.layers import EVERY_STATE, build_layer, tokens

every_state = pytest.mark.parametrize("choice", EVERY_STATE)


class Batch:
    """A state, with the whole history of each row: (tokens [n, d], resets [n])."""

    def __init__(self, layer, state, histories):
        self.layer, self.state, self.histories = layer, state, histories

    def read(self, x, resets):
        """Read new tokens, and compare with one call on the whole history of every row."""
        y, state = self.layer(x, self.state, resets)
        histories = [
            (torch.cat([old_x, new_x]), torch.cat([old_resets, new_resets]))
            for (old_x, old_resets), new_x, new_resets in zip(self.histories, x, resets, strict=True)
        ]
        for row, (whole_x, whole_resets) in enumerate(histories):
            whole_y, whole_state = self.layer(whole_x[None], None, whole_resets[None])
            close(y[row], whole_y[0, len(whole_x) - x.shape[1] :])
            if self.layer.blend.slots is not None:
                for mine, theirs in zip(state.leaves(), whole_state.leaves(), strict=True):
                    close(mine[row], theirs[0])
        return Batch(self.layer, state, histories)

    def rows(self, state, which):
        return Batch(self.layer, state, [self.histories[row] for row in which])


def stored(state, layer, folder):
    save_state(folder / "state.safetensors", state, layer)
    return load_state(folder / "state.safetensors", layer)


OPERATIONS = ("read", "select", "repeat", "join", "fork", "roll back", "store", "move")


@every_state
@given(data=st.data())
def test_outputs_after_any_operations_equal_those_of_the_whole_sequence(choice, data, tmp_path):
    layer = build_layer(choice, window=3).requires_grad_(False)

    def new_tokens(b, seed):
        t = data.draw(st.integers(0, 5))
        resets = torch.zeros(b, t, dtype=torch.bool)
        for row, token in data.draw(st.lists(st.tuples(st.integers(0, b - 1), st.integers(0, 4)), max_size=2)):
            resets[row, token:][:1] = True
        return tokens(b, t, seed), resets

    nothing = (tokens(1, 0)[0], torch.zeros(0, dtype=torch.bool))
    batch = Batch(layer, layer.init_state(2), [nothing] * 2).read(*new_tokens(2, 0))
    kept = batch
    for seed, action in enumerate(data.draw(st.lists(st.sampled_from(OPERATIONS), min_size=3, max_size=6)), 1):
        b = len(batch.histories)
        match action:
            case "read":
                batch = batch.read(*new_tokens(b, seed))
            case "select":
                which = data.draw(st.lists(st.integers(0, b - 1), min_size=1, max_size=3))
                batch = batch.rows(batch.state.select(which), which)
            case "repeat" if b < 4:
                batch = batch.rows(batch.state.repeat(2), [row for row in range(b) for _ in range(2)])
            case "join" if b < 4:
                state = MemoryState.concatenate([batch.state, kept.state])
                batch = Batch(layer, state, batch.histories + kept.histories)
            case "fork":
                kept = batch
                batch.read(*new_tokens(b, 100 + seed))  # continues separately and is discarded
            case "roll back":
                batch = kept
            case "store":
                batch = batch.rows(stored(batch.state, layer, tmp_path), range(b))
            case "move":
                state = batch.state.clone().detach().to("cpu").to(dtype=torch.float64)
                batch = batch.rows(state, range(b))
    batch.read(*new_tokens(len(batch.histories), 99))


class TestShape:
    @every_state
    def test_size_does_not_depend_on_length(self, choice):
        layer = build_layer(choice)
        _, state = layer(tokens(2, 3))
        _, later = layer(tokens(2, 200), state)
        if layer.blend.slots is None:
            assert later.slots == 203  # full attention holds every entry
        else:
            assert later.bytes_per_row() == state.bytes_per_row() == layer.init_state(2).bytes_per_row()

    @every_state
    def test_every_part_has_a_batch_axis(self, choice):
        _, state = build_layer(choice)(tokens(3, 5))
        assert {len(part) for part in state.leaves()} == {3}

    @every_state
    def test_unused_slots_are_zero(self, choice):
        """After a reset two tokens ago, at most two entries are held."""
        resets = torch.zeros(1, 9, dtype=torch.bool)
        resets[0, 7] = True
        _, state = build_layer(choice)(tokens(1, 9), resets=resets)
        for name, part in state.named_leaves().items():
            assert not name.startswith("kv.") or not part[:, :-2].any(), name
        assert state.position.tolist() == [2]


@every_state
def test_states_without_rows(choice):
    """They are read, joined and repeated like any other."""
    layer = build_layer(choice)
    _, state = layer(tokens(2, 5))
    for empty in (state.select([]), state.repeat(0), layer.init_state(0)):
        assert empty.select([]).position.shape == (0,)
        y, after = layer(tokens(0, 3), empty)
        assert y.shape == (0, 3, 8)
        joined = MemoryState.concatenate([after, state, empty])
        close(layer(tokens(2, 4), joined)[0], layer(tokens(2, 4), state)[0])


class TestMoves:
    def test_to_changes_entries_but_not_fast_weights(self):
        _, state = build_layer("delayed-chunk-vector-delta-options")(tokens(2, 5))
        dtypes = {name: part.dtype for name, part in state.to(dtype=torch.bfloat16).named_leaves().items()}
        narrow = dict.fromkeys(("kv.keys", "kv.values", "convolution"), torch.bfloat16)
        wide = dict.fromkeys(("kv.gates.beta", "fw.matrix"), torch.float32)
        assert dtypes == {**narrow, **wide, "position": torch.int64}

    @every_state
    def test_a_state_works_with_the_layer_in_another_dtype(self, choice):
        _, state = build_layer(choice)(tokens(2, 7))
        expected, _ = build_layer(choice)(tokens(2, 3, seed=1), state)
        y, _ = build_layer(choice, dtype=torch.float32)(tokens(2, 3, seed=1).float(), state.to(dtype=torch.float32))
        close(y, expected, 1e-4)

    def test_a_mask_of_rows_is_rejected(self):
        """It would be used as the indices 0 and 1."""
        with pytest.raises(ValueError, match="rows: expected indices of rows, got a bool mask"):
            build_layer("kv-only").init_state(2).select(torch.tensor([False, True]))

    def test_concatenate_rejects_no_states_and_other_layers(self):
        with pytest.raises(ValueError, match="at least one state"):
            MemoryState.concatenate([])
        states = [build_layer(choice)(tokens(1, 3))[1] for choice in ("kv-only", "fw-only-delta")]
        with pytest.raises(ValueError, match="expected states of one layer"):
            MemoryState.concatenate(states)


@every_state
class TestTruncatedBackpropagation:
    """Gradients flow through a carried state; `detach` stops them and changes no value."""

    def test_gradients_through_a_carried_state(self, choice):
        layer = build_layer(choice, window=3)
        x = tokens(2, 12).requires_grad_()
        whole, _ = layer(x)
        (expected,) = torch.autograd.grad(whole[:, 8:].square().sum(), x)
        _, state = layer(x[:, :5])
        _, state = layer(x[:, 5:8], state)
        later, _ = layer(x[:, 8:], state)
        (got,) = torch.autograd.grad(later.square().sum(), x)
        assert expected[:, 6:8].any()
        close(got, expected)

    def test_detach_stops_gradients(self, choice):
        layer = build_layer(choice, window=3)
        x = tokens(2, 8).requires_grad_()
        _, state = layer(x[:, :5])
        carried, _ = layer(x[:, 5:], state)
        cut, _ = layer(x[:, 5:], state.detach())
        close(cut, carried)
        (got,) = torch.autograd.grad(cut.square().sum(), x)
        assert not got[:, :5].any()
        assert got[:, 5:].any()


def test_repr_is_one_line():
    _, state = hqlt.HybridMemory(8, 2, window=3)(torch.zeros(2, 5, 8))
    assert repr(state) == (
        "MemoryState(kv.keys [2, 2, 2, 4], kv.values [2, 2, 2, 4], fw.matrix [2, 2, 4, 4], convolution [2, 0, 24], "
        "position [2]; 264 bytes per row)"
    )
