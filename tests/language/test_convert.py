"""A converted checkpoint of the paper's code gives the logits of that code on a whole text."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from safetensors.torch import save_file

from hqlt.cli import main
from hqlt.language.checkpoint import Checkpoint, read_checkpoint
from hqlt.language.convert import convert
from hqlt.language.folder import load_model
from hqlt.model import preset
from tests.language.their_model import DELTA_NET, GATED, HYBRID, TRANSFORMER, logits_of, random_checkpoint

TOKENS = torch.randint(37, (11,), generator=torch.Generator().manual_seed(1))
BETWEEN = {"layers": [1], "num_heads": 2, "window_size": 3, "rope_theta": 10_000.0}
SETTINGS = {
    "synchronous": HYBRID,
    "delayed-streaming": {**HYBRID, "attn_mode": "delayed"},
    "delayed-chunk": {**HYBRID, "attn_mode": "chunk"},
    "scalar": {**HYBRID, "use_memory_gate": False, "use_memory_dynamic_scaler": True},
    "sum": {**HYBRID, "use_memory_gate": False, "use_local_pos_encoding": False},
    "convolution": {**HYBRID, "use_short_conv": True, "conv_size": 3, "use_gate": True},
    "deltanet": DELTA_NET,
    "deltanet-convolution": {**DELTA_NET, "use_short_conv": True, "conv_size": 4, "use_gate": True},
    "deltanet-between-attention": {**DELTA_NET, "attn": BETWEEN},
    "hybrid-between-attention": {**HYBRID, "attn": BETWEEN},
    "deltanet-widths": {**DELTA_NET, "expand_k": 0.5, "expand_v": 1.5, "allow_neg_eigval": True},
    "deltanet-between-other-heads": {
        **DELTA_NET, "use_short_conv": True, "conv_size": 2, "use_gate": True,
        "attn": {**BETWEEN, "num_heads": 4, "rope_theta": 500.0, "qkv_bias": True},
    },
    "hybrid-between-other-positions": {**HYBRID, "use_local_pos_encoding": False, "attn": BETWEEN},
    "gated-deltanet": GATED,
    "gated-deltanet-plain": {
        **GATED, "use_short_conv": False, "use_gate": False, "num_v_heads": None, "allow_neg_eigval": True,
    },
    "gated-deltanet-between-attention": {**GATED, "output_gate_activation": "sigmoid", "attn": BETWEEN},
    "transformer": TRANSFORMER,
    "transformer-window": {**TRANSFORMER, "window_size": 5},
}  # fmt: skip


def checkpoint(settings, tensors=None) -> Checkpoint:
    return Checkpoint(settings, random_checkpoint(settings) if tensors is None else tensors, folder=None)


@pytest.mark.parametrize("name", SETTINGS)
def test_logits_equal_the_original(name):
    settings = SETTINGS[name]
    theirs = checkpoint(settings)
    converted = convert(theirs)
    logits = converted.model(TOKENS[None]).logits[0]
    torch.testing.assert_close(logits, logits_of(theirs.tensors, settings, TOKENS), rtol=0, atol=1e-10)
    used = [part for parts in converted.names.values() for part in parts]
    assert sorted(used) == sorted(theirs.tensors)
    assert not converted.skipped


def test_a_fused_mlp_and_rotary_frequencies():
    tensors = random_checkpoint(HYBRID)
    logits = convert(checkpoint(HYBRID)).model(TOKENS[None]).logits
    for n in range(2):
        mlp = f"model.layers.{n}.mlp"
        tensors[f"{mlp}.gate_proj.weight"] = torch.cat(
            [tensors[f"{mlp}.gate_proj.weight"], tensors.pop(f"{mlp}.up_proj.weight")]
        )
        tensors[f"model.layers.{n}.attn.rotary.inv_freq"] = 10_000.0 ** (-torch.arange(0, 8, 2) / 8)
    converted = convert(checkpoint(HYBRID, tensors))
    assert torch.equal(converted.model(TOKENS[None]).logits, logits)
    assert set(converted.skipped.values()) == {"computed from rope_theta"}
    tensors["model.layers.0.attn.rotary.inv_freq"] *= 2
    with pytest.raises(ValueError, match=r"unknown: model\.layers\.0\.attn\.rotary\.inv_freq"):
        convert(checkpoint(HYBRID, tensors))


def test_linear_attention_is_converted_with_a_warning():
    converted = convert(checkpoint({**HYBRID, "attn_mode": "sync_chunk_linear"}))
    assert converted.model.config.fast_weights == "linear"
    assert len(converted.skipped) == 2 and all(name.endswith("b_proj.weight") for name in converted.skipped)
    assert any("LOGITS DIFFER" in note and "over heads" in note for note in converted.notes)
    assert converted.model(TOKENS[None]).logits.isfinite().all()


def test_notes_list_differences():
    notes = {name: "\n".join(convert(checkpoint(SETTINGS[name])).notes) for name in SETTINGS}
    assert "off by one" in notes["synchronous"] and "off by one" not in notes["sum"]
    assert "differ by one" in notes["delayed-streaming"]
    assert "in chunks of 64 regardless of the window" in notes["delayed-chunk"]
    assert notes["deltanet"] == ""


def test_sizes_of_the_paper():
    """The paper's 340M config converts to our preset."""
    settings = {
        **HYBRID,
        "hidden_size": 1024,
        "num_heads": 8,
        "num_hidden_layers": 24,
        "intermediate_size": None,
        "hidden_ratio": 4,
        "vocab_size": 32_000,
        "chunk_size": 64,
    }
    from hqlt.language.paper_config import read_settings

    config, ours = read_settings(settings).config, preset("hqlt-340m")
    ignored = {"bos_token_id", "eos_token_id"}
    different = {name for name, value in config.to_dict().items() if value != ours.to_dict()[name]}
    assert different == ignored


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model_type": "gla"},
            "model_type: expected one of 'hybrid_qlt', 'delta_net', 'gated_deltanet', 'transformer', got 'gla'",
        ),
        ({"expand_v": 2}, "expand_v: expected 1, the only value our layers support, got 2"),
        ({"use_memory_scaler": True}, "use_memory_scaler: expected False"),
        ({"attn_mode": "fused_recurrent"}, "attn_mode: expected one of 'sync_chunk'"),
        ({"attn": [BETWEEN]}, "attn: expected one mapping of settings for all attention layers, got"),
        ({"attnres_block_size": 2}, "attnres_block_size: expected None, the only value our layers support, got 2"),
        (
            {"intermediate_size": 32},
            r"mlp.gate_proj.weight: expected shape \[32, 16\] according to the config, got \[24, 16\]",
        ),
        ({"use_gate": True}, "missing: model.layers.0.attn.g_proj.weight"),
        ({"use_memory_gate": False}, "unknown: model.layers.0.attn.memory_gate_proj.weight"),
    ],
)
def test_unsupported_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        convert(checkpoint({**HYBRID, **change}, random_checkpoint(HYBRID)))


class TestCommand:
    def test_from_sharded_safetensors(self, tmp_path, capsys):
        tensors = random_checkpoint(HYBRID)
        theirs = tmp_path / "theirs"
        theirs.mkdir()
        names = sorted(tensors)
        shards = {"a.safetensors": names[:9], "b.safetensors": names[9:]}
        for shard, some in shards.items():
            save_file({name: tensors[name] for name in some}, theirs / shard)
        index = {"weight_map": {name: shard for shard, some in shards.items() for name in some}}
        (theirs / "model.safetensors.index.json").write_text(json.dumps(index))
        (theirs / "config.json").write_text(json.dumps(HYBRID))
        main(["convert", str(theirs), str(tmp_path / "ours")])
        printed = capsys.readouterr().out
        assert f"{len(tensors)} tensors converted to {len(tensors)}" in printed
        assert "off by one" in printed and "no tokenizer was found" in printed
        model = load_model(tmp_path / "ours")
        expected = logits_of(tensors, HYBRID, TOKENS)
        torch.testing.assert_close(model(TOKENS[None]).logits[0], expected, rtol=0, atol=1e-10)

    def test_from_a_wrapped_file_with_other_names(self, tmp_path):
        tensors = {f"_orig_mod.backbone.{name}": value for name, value in random_checkpoint(DELTA_NET).items()}
        torch.save({"model": tensors, "step": 3}, tmp_path / "weights.pt")
        (tmp_path / "settings.json").write_text(json.dumps(DELTA_NET))
        (tmp_path / "map.yaml").write_text(yaml.safe_dump({r"^backbone\.": ""}))
        command = ["convert", str(tmp_path / "weights.pt"), str(tmp_path / "ours")]
        with pytest.raises(SystemExit, match=r"config.json, found none; pass it as --settings"):
            main(command)
        command.append(f"--settings={tmp_path / 'settings.json'}")
        with pytest.raises(SystemExit, match=r"missing: lm_head.weight \(did you mean backbone.lm_head.weight\?\)"):
            main(command)
        main([*command, f"--map={tmp_path / 'map.yaml'}"])
        assert load_model(tmp_path / "ours").config.kinds == ["fw", "fw"]

    @pytest.mark.parametrize(
        ("map", "message"),
        [
            ("- a", r"map.yaml: expected lines such as '\^old_: new_', one per expression, got \['a'\]"),
            ("a: 1", "map.yaml: expected lines such as"),
            ("a: [", "map.yaml: expected YAML"),
            ("(a: b", r"map: expected a regular expression and its replacement, got '\(a': 'b': .*unterminated"),
            (r"model: \2", r"map: expected a regular expression .* got 'model': .*invalid group reference"),
        ],
    )
    def test_an_invalid_map_is_refused(self, tmp_path, map, message):
        save_file(random_checkpoint(HYBRID), tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text(json.dumps(HYBRID))
        (tmp_path / "map.yaml").write_text(map)
        with pytest.raises(SystemExit, match=message):
            main(["convert", str(tmp_path), str(tmp_path / "ours"), f"--map={tmp_path / 'map.yaml'}"])

    def test_a_pickle_is_not_executed(self, tmp_path):
        class Trap:
            def __reduce__(self):
                return pytest.fail, ("a pickle was executed",)

        torch.save({"model": Trap()}, tmp_path / "weights.pt")
        (tmp_path / "config.json").write_text(json.dumps(HYBRID))
        with pytest.raises(ValueError, match="expected safetensors, or a PyTorch file of tensors only"):
            read_checkpoint(tmp_path / "weights.pt")

    def test_a_distributed_checkpoint_is_refused(self, tmp_path):
        (tmp_path / ".metadata").touch()
        (tmp_path / "config.json").write_text(json.dumps(HYBRID))
        with pytest.raises(ValueError, match="distributed checkpoint, whose index is a pickle"):
            read_checkpoint(tmp_path)

    @pytest.mark.parametrize(
        ("files", "options", "message"),
        [
            ({}, ["nope"], "nope: expected a checkpoint's folder or a file of weights, found neither"),
            ({"config.json": "{"}, ["."], r"config\.json: expected the checkpoint's settings as JSON, got"),
            ({"config.json": "[]"}, ["."], r"config\.json: expected a JSON object, got list"),
            ({"config.json": {"num_heads": "two"}}, ["."], "expected the settings of a model, got "),
            ({"config.json": {"expand_v": 2}}, ["."], "expand_v: expected 1"),
            ({"config.json": {}}, ["."], r"expected one of model\.safetensors, .*, found none"),
            (
                {"config.json": {}},
                [".", "--settings=nowhere.json"],
                r"nowhere\.json: expected the checkpoint's config\.json",
            ),
            ({"config.json": {}}, [".", "--map=nowhere.yaml"], r"nowhere\.yaml: No such file"),
            ({"config.json": {}}, [".", "--tokenizer=nowhere"], "got 'nowhere', which could not be loaded"),
            (
                {"config.json": {"vocab_size": 9}},
                [".", "--tokenizer=bytes"],
                "tokenizer: expected at most 9 tokens, the",
            ),
            ({"config.json": {}, "model.safetensors": "cut"}, ["."], r"model\.safetensors: expected safetensors, or a"),
            ({"config.json": {}, "pytorch_model.bin": "cut"}, ["."], r"pytorch_model\.bin: expected safetensors, or a"),
            (
                {"config.json": {}, "model.safetensors.index.json": "{}"},
                ["."],
                r"index\.json: expected a weight_map from",
            ),
            (
                {"config.json": {}, "model.safetensors.index.json": {"weight_map": {"a": "a.safetensors"}}},
                ["."],
                r"index\.json: expected all files that it names, a\.safetensors is missing",
            ),
        ],
    )
    def test_nothing_is_written_if_conversion_fails(self, tmp_path, files, options, message, monkeypatch):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        monkeypatch.chdir(tmp_path)
        for name, content in files.items():
            if isinstance(content, dict):
                content = json.dumps({**HYBRID, "vocab_size": 256, **content} if name == "config.json" else content)
            (tmp_path / name).write_text(content)
        with pytest.raises(SystemExit, match=message):
            main(["convert", options[0], "ours", *options[1:]])
        assert not (tmp_path / "ours").exists()
