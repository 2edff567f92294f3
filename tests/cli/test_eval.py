import json
import sysconfig
from pathlib import Path

import pytest

from hqlt.cli import main
from tests.language.conftest import build

pytest.importorskip("matplotlib")
LIBRARY = Path(sysconfig.get_paths()["stdlib"])


@pytest.fixture
def folder(tmp_path):
    build().float().save_pretrained(tmp_path / "run" / "model")
    return tmp_path / "run"


def test_lengths_and_keys_leave_one_page(folder, tmp_path, capsys):
    place = tmp_path / "results"
    main(["eval", str(folder), f"--lengths={LIBRARY / 'ast.py'}", "--passkey", "--longest=1500", f"--folder={place}"])
    assert {file.name for file in place.iterdir()} == {"results.json", "report.html", "lengths.png", "passkey.png"}
    results = json.loads((place / "results.json").read_text())["results"]
    assert results["lengths"][-1]["end"] == 1499
    assert {(one["length"], one["trials"]) for one in results["passkey"]["needle"]} == {(1000, 2), (1500, 2)}
    page = (place / "report.html").read_text()
    assert page.count("data:image/png") == 2 and "http" not in page.split("</style>")[1]
    assert "emptied every 2,048" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_tasks_stand_beside_the_paper(folder, tmp_path, capsys):
    pytest.importorskip("lm_eval")
    local = tmp_path / "data"
    local.mkdir()
    lines = [line for line in (LIBRARY / "ast.py").read_text().splitlines() if len(line.split()) > 2][:3]
    (local / "lambada_test.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in lines))
    place = tmp_path / "results"
    main(["eval", str(folder), "--tasks=lambada_local", f"--local={local}", "--limit=2", f"--folder={place}"])
    written = json.loads((place / "results.json").read_text())
    assert written["results"]["tasks"]["lambada_local"]["sample_len"] == 2
    assert len(written["settings"]["fingerprint"]) == 64
    said = capsys.readouterr().out
    assert "29.4" in said and "its Synchronous, 340M" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected something to evaluate"),
        (["--lengths=nowhere"], "nowhere"),
        (["--passkey", "--longest=50"], "length: expected at least"),
    ],
)
def test_what_cannot_be_done_is_said(folder, tmp_path, arguments, message):
    with pytest.raises(SystemExit, match=message):
        main(["eval", str(folder), *arguments, f"--folder={tmp_path / 'results'}"])
