"""States on disk: what is read is what was written, by the module that wrote it, or an error says why not."""

from __future__ import annotations

import pytest
import torch

from hqlt import fingerprint, load_state, save_state
from hqlt.memory.storage import load_unread
from tests.layers import EVERY_STATE, build_layer, tokens

CHOICE = "delayed-chunk-vector-delta-options"


@pytest.fixture
def layer():
    return build_layer(CHOICE)


@pytest.fixture
def path(layer, tmp_path):
    save_state(tmp_path / "state.safetensors", layer(tokens(2, 9))[1], layer)
    return tmp_path / "state.safetensors"


@pytest.mark.parametrize("choice", EVERY_STATE)
def test_what_is_read_is_what_was_written(choice, tmp_path):
    layer = build_layer(choice)
    _, state = layer(tokens(2, 9))
    save_state(tmp_path / "state", state, layer)
    loaded = load_state(tmp_path / "state", layer)
    for mine, theirs in zip(loaded, state, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
    assert [file.name for file in tmp_path.iterdir()] == ["state"]


def test_a_models_states_come_back_as_a_tuple(layer, tmp_path):
    states = [layer(tokens(2, t))[1] for t in (0, 3, 9)]
    save_state(tmp_path / "state", states, layer)
    loaded = load_state(tmp_path / "state", layer)
    assert type(loaded) is tuple
    for mine, theirs in zip(loaded, states, strict=True):
        assert all(map(torch.equal, mine, theirs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_layer_in_another_dtype_is_no_foreigner(dtype, layer, path):
    assert fingerprint(build_layer(CHOICE, dtype=dtype)) == fingerprint(layer)
    load_state(path, build_layer(CHOICE, dtype=dtype))


@pytest.mark.parametrize(
    "changes",
    [
        {"window": 5},
        {"blend": "synchronous"},
        {"mixer": "scalar"},
        {"fast_weights": "linear"},
        {"beta_max": 2.0},
        {"rope_theta": 10_000.0},
        {"rope_theta": 500.0},
        {"norm_eps": 1e-5},
        {"conv_size": 2},
        {"output_gate": False},
        {"num_heads": 4},
    ],
    ids=str,
)
def test_another_structure_is_refused(changes, path):
    with pytest.raises(ValueError, match=r"made by a HybridMemory with fingerprint .* structure or weights differ"):
        load_state(path, build_layer(CHOICE, **changes))


def test_other_weights_are_refused(layer, path):
    with torch.no_grad():
        layer.k_proj.weight[0, 0] += 0.1
    with pytest.raises(ValueError, match="structure or weights differ"):
        load_state(path, layer)


class TestBrokenFiles:
    @pytest.mark.parametrize("keep", [0, 4, 100, -1])
    def test_a_truncated_file_is_named(self, keep, layer, path):
        path.write_bytes(path.read_bytes()[:keep])
        with pytest.raises(ValueError, match=r"state\.safetensors: expected a safetensors file written by save_state"):
            load_state(path, layer)

    def test_a_pickle_is_refused_unread(self, layer, path):
        class Trap:
            def __reduce__(self):
                return pytest.fail, ("a pickle was run",)

        torch.save(Trap(), path)
        with pytest.raises(ValueError, match="expected a safetensors file"):
            load_state(path, layer)

    def test_weights_are_no_state(self, layer, path):
        from safetensors.torch import save_file

        save_file(layer.state_dict(), path)
        with pytest.raises(ValueError, match="expected format 'hqlt-state-1', got None; is it a state file"):
            load_state(path, layer)

    def test_a_missing_file_is_a_missing_file(self, layer, tmp_path):
        with pytest.raises(FileNotFoundError):
            load_state(tmp_path / "nowhere", layer)


def test_tokens_beside_a_state(layer, path, tmp_path):
    _, state = layer(tokens(2, 9))
    save_state(tmp_path / "state", state, layer, unread=torch.tensor([3, 5]))
    assert load_unread(tmp_path / "state").tolist() == [3, 5]
    assert all(map(torch.equal, load_state(tmp_path / "state", layer), state))
    assert load_unread(path) is None
