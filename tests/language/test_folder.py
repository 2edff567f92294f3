"""Folders of models: those of `hqlt train`, of a study's cell, and exported ones."""

from __future__ import annotations

import json

import pytest

from hqlt.cli import main
from hqlt.language.folder import find_model, load_model, tokenizer_of
from tests.language.conftest import build, prepending
from tests.language.conftest import folder as folder
from tests.train.language.conftest import text as text
from tests.train.language.conftest import train


@pytest.fixture(scope="module")
def run(text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "trained"
    train(text, folder)
    return folder


def test_a_trained_run_can_be_generated_from_evaluated_and_exported(run, text, tmp_path, capsys):
    """The run's own config.json holds settings; the model is in model/."""
    main(["generate", str(run), "--prompt=1 2 3", "--max-new-tokens=3"])
    assert capsys.readouterr().out
    main(["eval", str(run), f"--lengths={text.parent / 'in' / '1.txt'}", f"--folder={tmp_path / 'eval'}"])
    assert json.loads((tmp_path / "eval" / "results.json").read_text())["settings"]["model"] == str(run / "model")
    main(["export", str(run), str(tmp_path / "exported")])
    assert find_model(tmp_path / "exported") == tmp_path / "exported"


def test_the_error_describes_a_folder_without_a_model(tmp_path):
    (tmp_path / "config.json").write_text('{"settings": {}}')
    with pytest.raises(FileNotFoundError, match=r"without model_type, as in a run; a run has model/ once"):
        find_model(tmp_path)
    for name in ("b", "a"):
        build().save_pretrained(tmp_path / "models" / name)
    with pytest.raises(FileNotFoundError, match=r"found a study; choose one of its models: .*models/a, .*models/b$"):
        find_model(tmp_path)
    assert find_model(tmp_path / "models" / "a").name == "a"


def test_bos_token(tmp_path):
    build().save_pretrained(tmp_path)
    assert tokenizer_of(tmp_path, 256).bos_id is None
    prepending().save(tmp_path)
    assert tokenizer_of(tmp_path, 256).bos_id is None
    file = tmp_path / "tokenizer_config.json"
    for named in ("<s>", {"__type": "AddedToken", "content": "<s>"}):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"bos_token": named}))
        assert tokenizer_of(tmp_path, 256).bos_id == 0


class TestBrokenFolders:
    """Every command raises a readable error instead of running with randomly initialized weights."""

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            (
                {"hidden_size": 32},
                r"expected the weights that its config.json describes, got \d+ with another shape, such",
            ),
            (
                {"num_hidden_layers": 3},
                r"describes, got \d+ missing, such as model\.layers\.2\..*; are both files of the",
            ),
            ({"num_hidden_layers": 1}, r"describes, got \d+ unknown, such as model\.layers\.1\."),
            ({"window": "many"}, r"config\.json: expected a model's settings, got .*'window'"),
            (
                {"model_type": "gpt2"},
                r"config\.json: expected a model of type hqlt, got gpt2; convert it with `hqlt convert`",
            ),
        ],
    )
    @pytest.mark.parametrize("command", [["generate"], ["eval", "--passkey"], ["export"]])
    def test_a_config_of_another_model(self, folder, config, message, command, tmp_path):
        file = folder / "model" / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | config))
        arguments = [str(tmp_path / "out")] if command == ["export"] else []
        with pytest.raises(SystemExit, match=message):
            main([command[0], str(folder), *arguments, *command[1:]])
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("left", [0, 100, 2000])
    def test_truncated_weights(self, folder, left):
        file = folder / "model" / "model.safetensors"
        file.write_bytes(file.read_bytes()[:left])
        with pytest.raises(ValueError, match="model: expected complete weight files, got SafetensorError: Error while"):
            load_model(folder)

    def test_an_invalid_index(self, folder):
        (folder / "model" / "model.safetensors").unlink()
        (folder / "model" / "model.safetensors.index.json").write_text("{}")
        with pytest.raises(ValueError, match="model: expected complete weight files, got KeyError"):
            load_model(folder)
