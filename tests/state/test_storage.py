"""States on disk: they are loaded exactly, by the module that saved them; everything else is an error."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from hqlt import fingerprint, load_state, save_state
from hqlt.state import load_unread
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
def test_a_loaded_state_equals_the_saved_one(choice, tmp_path):
    layer = build_layer(choice)
    _, state = layer(tokens(2, 9))
    save_state(tmp_path / "state", state, layer)
    loaded = load_state(tmp_path / "state", layer)
    for mine, theirs in zip(loaded.leaves(), state.leaves(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
    assert [file.name for file in tmp_path.iterdir()] == ["state"]


def test_the_states_of_a_model_are_a_tuple(layer, tmp_path):
    states = [layer(tokens(2, t))[1] for t in (0, 3, 9)]
    save_state(tmp_path / "state", states, layer)
    loaded = load_state(tmp_path / "state", layer)
    assert type(loaded) is tuple
    for mine, theirs in zip(loaded, states, strict=True):
        assert all(map(torch.equal, mine.leaves(), theirs.leaves()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_layer_in_another_dtype_is_accepted(dtype, layer, path):
    assert fingerprint(build_layer(CHOICE, dtype=dtype)) == fingerprint(layer)
    load_state(path, build_layer(CHOICE, dtype=dtype))


def test_weights_halfway_between_two_bfloat16_values():
    """Just above halfway, by less than float32 resolves: what matters is how .bfloat16() rounds."""
    exact = nn.Linear(1, 1, bias=False).double()
    with torch.no_grad():
        exact.weight.fill_(1 + 2**-8 + 2**-40)
    assert fingerprint(deepcopy(exact).bfloat16()) == fingerprint(deepcopy(exact).float()) == fingerprint(exact)


def test_float16_rounds_differently(layer):
    half = deepcopy(layer).half()
    assert fingerprint(half) == fingerprint(deepcopy(half).float()) == fingerprint(deepcopy(half).double())
    assert fingerprint(half) != fingerprint(layer)


class Buffers(nn.Module):
    """Buffers of every kind that a module may have."""

    def __init__(self, **buffers):
        super().__init__()
        kinds = {
            "scalar": torch.tensor(1.5),
            "count": torch.tensor(3),
            "mask": torch.tensor([True, False]),
            "wave": torch.tensor([1 + 2j, 3j]),
            "empty": torch.empty(0, 3),
            "transposed": torch.arange(6.0).view(2, 3).mT,
            "bytes": torch.tensor([1, 2], dtype=torch.uint8),
            "float8": torch.tensor([1.0, 2.0]).to(torch.float8_e4m3fn),
            "conjugate": torch.tensor([1 + 2j]).conj(),
            "quantized": torch.quantize_per_tensor(torch.tensor([1.0, 2.0]), 0.5, 0, torch.qint8),
        }
        for name, buffer in (kinds | buffers).items():
            self.register_buffer(name, buffer)


@pytest.mark.filterwarnings("ignore:.*quantized tensor creation:UserWarning")
def test_every_buffer_changes_the_fingerprint():
    assert fingerprint(Buffers()) == fingerprint(Buffers()) == fingerprint(Buffers().bfloat16())
    for name, other in {
        "scalar": torch.tensor(1.0),
        "count": torch.tensor(4),
        "mask": torch.tensor([True, True]),
        "wave": torch.tensor([1 + 2j, 4j]),
        "empty": torch.empty(3, 0),
        "transposed": torch.arange(6.0).view(3, 2),
        "bytes": torch.tensor([1, 3], dtype=torch.uint8),
        "float8": torch.tensor([1.0, 3.0]).to(torch.float8_e4m3fn),
        "conjugate": torch.tensor([1 + 2j]),
        "quantized": torch.quantize_per_tensor(torch.tensor([1.0, 3.0]), 0.5, 0, torch.qint8),
    }.items():
        assert fingerprint(Buffers(**{name: other})) != fingerprint(Buffers()), name


def test_weights_on_the_meta_device_are_refused(layer, tmp_path):
    state = layer.init_state(1)
    layer.k_proj.to("meta")
    with pytest.raises(ValueError, match=r"k_proj\.weight: expected weights with values, got one on the meta"):
        save_state(tmp_path / "state", state, layer)
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # raised by the compiler
def test_wrapped_modules_have_the_same_fingerprint(layer, path):
    whole, parts = nn.Sequential(layer), nn.Sequential(torch.compile(layer))
    assert fingerprint(torch.compile(layer)) == fingerprint(nn.DataParallel(layer)) == fingerprint(layer)
    assert fingerprint(torch.compile(nn.DataParallel(parts))) == fingerprint(whole)
    load_state(path, torch.compile(layer))


@pytest.mark.filterwarnings("ignore:.*(quantization|quantize|TypedStorage).*")  # deprecated in favor of torchao
def test_states_of_a_quantized_layer(layer, tmp_path):
    quantized = torch.ao.quantization.quantize_dynamic(layer.float(), {nn.Linear}, torch.qint8)
    _, state = quantized(tokens(2, 9).float())
    save_state(tmp_path / "state", state, quantized)
    assert all(map(torch.equal, load_state(tmp_path / "state", quantized).leaves(), state.leaves()))
    with pytest.raises(ValueError, match="structure or weights differ"):
        load_state(tmp_path / "state", layer)


def test_one_state_for_two_layers(layer, tmp_path):
    _, state = layer(tokens(2, 9))
    save_state(tmp_path / "state", [state, state], layer)
    assert all(map(torch.equal, load_state(tmp_path / "state", layer)[1].leaves(), state.leaves()))


class TestPaths:
    def test_a_folder_is_refused_before_anything_is_written(self, layer, tmp_path):
        folder = tmp_path / "folder"
        folder.mkdir()
        with pytest.raises(ValueError, match="folder: expected the name of a file to write, got a folder"):
            save_state(folder, layer.init_state(1), layer)
        assert list(tmp_path.iterdir()) == [folder]
        with pytest.raises(ValueError, match="folder: expected a file written by save_state, got a folder"):
            load_state(folder, layer)

    def test_a_missing_folder_is_reported_and_nothing_is_left(self, layer, tmp_path):
        with pytest.raises(OSError, match=r"nowhere/state could not be written: No such file"):
            save_state(tmp_path / "nowhere" / "state", layer.init_state(1), layer)
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "changes",
    [
        {"window": 5},
        {"blend": "synchronous"},
        {"mixer": "scalar"},
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
    with pytest.raises(ValueError, match=r"got one of a HybridMemory with fingerprint .* structure or weights differ"):
        load_state(path, build_layer(CHOICE, **changes))


def test_another_rule_is_refused(path):
    with pytest.raises(ValueError, match="structure or weights differ"):
        load_state(path, build_layer("delayed-chunk-vector-linear-options"))


def test_other_weights_are_refused(layer, path):
    with torch.no_grad():
        layer.k_proj.weight[0, 0] += 0.1
    with pytest.raises(ValueError, match="structure or weights differ"):
        load_state(path, layer)


class TestBrokenFiles:
    @pytest.mark.parametrize("keep", [0, 4, 100, -1])
    def test_a_truncated_file_is_reported(self, keep, layer, path):
        path.write_bytes(path.read_bytes()[:keep])
        with pytest.raises(ValueError, match=r"state\.safetensors: expected a safetensors file written by save_state"):
            load_state(path, layer)

    def test_a_pickle_is_refused_without_unpickling(self, layer, path):
        class Trap:
            def __reduce__(self):
                return pytest.fail, ("a pickle was run",)

        torch.save(Trap(), path)
        with pytest.raises(ValueError, match="expected a safetensors file"):
            load_state(path, layer)

    def test_a_file_of_weights_is_refused(self, layer, path):
        save_file(layer.state_dict(), path)
        with pytest.raises(ValueError, match="expected format 'hqlt-state-3', got None; is it a state file"):
            load_state(path, layer)

    def test_a_file_of_an_older_version_is_reported(self, layer, path):
        save_file({"0.keys": torch.zeros(1)}, path, {"format": "hqlt-state-1", "fingerprint": "0"})
        for read in (lambda: load_state(path, layer), lambda: load_unread(path)):
            with pytest.raises(
                ValueError, match="expected format 'hqlt-state-3', got 'hqlt-state-1' of an older version of hqlt"
            ):
                read()

    def test_a_missing_file(self, layer, tmp_path):
        with pytest.raises(FileNotFoundError):
            load_state(tmp_path / "nowhere", layer)


def test_unread_tokens_saved_with_a_state(layer, path, tmp_path):
    _, state = layer(tokens(2, 9))
    save_state(tmp_path / "state", state, layer, unread=torch.tensor([3, 5]))
    assert load_unread(tmp_path / "state").tolist() == [3, 5]
    assert all(map(torch.equal, load_state(tmp_path / "state", layer).leaves(), state.leaves()))
    assert load_unread(path) is None
