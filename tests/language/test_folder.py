"""Which folders hold a model: what `hqlt train` leaves, a study's cell, an exported folder."""

from __future__ import annotations

import json

import pytest

from hqlt.cli import main
from hqlt.language.folder import find_model, tokenizer_of
from tests.language.conftest import build, prepending
from tests.train.language.conftest import text as text
from tests.train.language.conftest import train


@pytest.fixture(scope="module")
def run(text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "trained"
    train(text, folder)
    return folder


def test_a_trained_run_is_generated_from_evaluated_and_exported(run, text, tmp_path, capsys):
    """Its own config.json holds settings; the model is in model/."""
    main(["generate", str(run), "--prompt=1 2 3", "--tokens=3"])
    assert capsys.readouterr().out
    main(["eval", str(run), f"--lengths={text.parent / 'in' / '1.txt'}", f"--folder={tmp_path / 'eval'}"])
    assert json.loads((tmp_path / "eval" / "results.json").read_text())["settings"]["model"] == str(run / "model")
    main(["export", str(run), str(tmp_path / "exported")])
    assert find_model(tmp_path / "exported") == tmp_path / "exported"


def test_a_folder_that_holds_none_says_what_it_holds(tmp_path):
    (tmp_path / "config.json").write_text('{"settings": {}}')
    with pytest.raises(FileNotFoundError, match=r"without model_type, as a run's is; a run has its model/ once"):
        find_model(tmp_path)
    for name in ("b", "a"):
        build().save_pretrained(tmp_path / "models" / name)
    with pytest.raises(FileNotFoundError, match=r"found a study; name one of its models: .*models/a, .*models/b$"):
        find_model(tmp_path)
    assert find_model(tmp_path / "models" / "a").name == "a"


def test_the_token_that_begins_a_text(tmp_path):
    build().save_pretrained(tmp_path)
    assert tokenizer_of(tmp_path, 256).bos_id is None
    prepending().save(tmp_path)
    assert tokenizer_of(tmp_path, 256).bos_id is None
    told = tmp_path / "tokenizer_config.json"
    for named in ("<s>", {"content": "<s>"}):
        told.write_text(json.dumps(json.loads(told.read_text()) | {"bos_token": named}))
        assert tokenizer_of(tmp_path, 256).bos_id == 0
