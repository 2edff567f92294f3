import json
import re
import sys
import sysconfig
from pathlib import Path

import pytest

from hqlt.cli import main
from hqlt.cli.eval import tokens_of
from hqlt.data import load_tokenizer, text
from hqlt.errors import how_to_install
from tests.language.conftest import build

pytest.importorskip("matplotlib")
LIBRARY = Path(sysconfig.get_paths()["stdlib"])


@pytest.fixture
def folder(tmp_path):
    build().float().save_pretrained(tmp_path / "run" / "model")
    return tmp_path / "run"


def test_lengths_and_passkey_write_one_page(folder, tmp_path, capsys):
    place = tmp_path / "results"
    main(
        ["eval", str(folder), f"--lengths={LIBRARY / 'ast.py'}", "--passkey", "--max-tokens=1500", f"--folder={place}"]
    )
    assert {file.name for file in place.iterdir()} == {"results.json", "report.html", "lengths.png", "passkey.png"}
    results = json.loads((place / "results.json").read_text())["results"]
    assert results["lengths"][-1]["end"] == 1499
    assert {(one["length"], one["trials"]) for one in results["passkey"]["needle"]} == {(1000, 2), (1500, 2)}
    page = (place / "report.html").read_text()
    assert page.count("<svg") == 1 + 2 and "http" not in page.split("</style>")[1]
    assert "emptied every 2,048" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_tasks_are_compared_with_the_paper(folder, tmp_path, capsys):
    pytest.importorskip("lm_eval")
    local = tmp_path / "data"
    local.mkdir()
    lines = [line for line in (LIBRARY / "ast.py").read_text().splitlines() if len(line.split()) > 2][:3]
    (local / "lambada_test.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in lines))
    place = tmp_path / "results"
    where = [f"--local={local}", f"--folder={place}", "--device=cpu"]
    main(["eval", str(folder), "--tasks=lambada_local", "--limit=2", *where])
    written = json.loads((place / "results.json").read_text())
    assert written["results"]["tasks"]["lambada_local"]["sample_len"] == 2
    settings = written["settings"]
    assert len(settings["fingerprint"]) == 64
    options = {"tasks": "lambada_local", "local": str(local), "limit": 2, "batch_size": 8, "max_length": None}
    options |= {"lengths": None, "max_tokens": 1_000_000, "reset_every": 2048, "device": "cpu"}
    assert options.items() <= settings.items()
    printed = " ".join(capsys.readouterr().out.split())
    assert "The paper has no such model." in printed
    assert "Texts are read in chunks" in (place / "report.html").read_text()


def test_earlier_evaluations_are_compared(folder, tmp_path, monkeypatch, capsys):
    harness = pytest.importorskip("hqlt.evaluate.harness")
    monkeypatch.setattr(harness, "load_tasks", lambda names, local: names)
    scores = iter([{"acc,none": 0.5, "acc_stderr,none": 0.01}, {"acc,none": 0.25}, {"acc_norm,none": 0.75}])
    monkeypatch.setattr(harness, "run_tasks", lambda *_: {"piqa": next(scores)})
    command = ["eval", str(folder), "--tasks=piqa"]
    main([*command, f"--folder={tmp_path / 'first'}"])
    assert "50 ± 1" in capsys.readouterr().out
    main([*command, f"--folder={tmp_path / 'second'}", f"--compare={tmp_path / 'first'}"])
    page = (tmp_path / "second" / "report.html").read_text()
    assert ">25<" in page and ">50 ± 1<" in page and f"<th>{tmp_path / 'first'}</th>" in page
    main([*command, f"--folder={tmp_path / 'third'}", f"--compare={tmp_path / 'first'}, {tmp_path / 'second'}"])
    assert ">–<" in (tmp_path / "third" / "report.html").read_text(), "another metric"
    with pytest.raises(SystemExit, match=r"compare: expected an evaluation with limit 3, got None in "):
        main([*command, "--limit=3", f"--compare={tmp_path / 'first'}", f"--folder={tmp_path / 'fourth'}"])
    assert not (tmp_path / "fourth").exists()


@pytest.mark.parametrize(("options", "length"), [([], 2048), (["--max-length=7"], 7)])
def test_the_suite_has_the_papers_max_length(folder, tmp_path, monkeypatch, options, length):
    harness = pytest.importorskip("hqlt.evaluate.harness")
    monkeypatch.setattr(harness, "load_tasks", lambda names, local: names)
    monkeypatch.setattr(harness, "run_tasks", lambda model, *_: {"piqa": {"acc,none": model.max_length / 1e4}})
    main(["eval", str(folder), "--suite=paper", f"--folder={tmp_path}", *options])
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["results"]["tasks"]["piqa"]["acc,none"] == length / 1e4
    assert results["settings"]["max_length"] == length
    assert f"Tasks read at most {length:,} tokens to predict the next one" in (tmp_path / "report.html").read_text()


def test_finished_parts_are_written_even_if_a_later_one_fails(folder, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("hqlt.cli.eval.evaluate_retrieval", interrupted)
    place = tmp_path / "results"
    with pytest.raises(SystemExit):
        main(
            [
                "eval",
                str(folder),
                f"--lengths={LIBRARY / 'ast.py'}",
                "--max-tokens=900",
                "--passkey",
                f"--folder={place}",
            ]
        )
    assert list(json.loads((place / "results.json").read_text())["results"]) == ["lengths"]
    assert "Bits by position" in (place / "report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected something to evaluate"),
        (["--passkey", "--lengths=nowhere"], "nowhere"),
        (["--passkey", f"--lengths={sys.executable}"], "expected text in UTF-8"),
        ([f"--lengths={LIBRARY}"], "Is a directory"),
        ([f"--lengths={LIBRARY / 'ast.py'}", "--max-tokens=1"], "ast.py: expected at least two tokens"),
        ([f"--lengths={LIBRARY / 'ast.py'}", "--passkey", "--max-tokens=50"], "length: expected at least"),
        (["--passkey", "--tasks=mine", "--local=nowhere"], "local: expected a folder, got nowhere"),
        (
            ["--passkey", "--tasks=lambda_local", "--local=LOCAL"],
            "expected names of the harness's tasks, got unknown lambda_local",
        ),
        (
            ["--passkey", "--tasks=mine", "--local=LOCAL"],
            "expected tasks whose data can be loaded, got .* see the files",
        ),
        (["--passkey", "--tasks=,"], "expected the name of a task, got ','"),
        (["--passkey", "--compare=runs/x"], "compare: expected tasks to compare, got none"),
        (["--tasks=piqa", "--compare=nowhere"], "nowhere"),
        (["--passkey", "--max-tokens=0"], "max-tokens: expected at least 1, got 0"),
        (["--passkey", "--limit=0"], "limit: expected at least 1, got 0"),
        (["--passkey", "--trials=0"], "trials: expected at least 1, got 0"),
        (["--passkey", "--reset-every=0"], "reset-every: expected at least 1, got 0"),
        (["--passkey", "--batch-size=0"], "batch-size: expected at least 1, got 0"),
        (["--passkey", "--max-length=0"], "max-length: expected at least 1, got 0"),
        (["--passkey", "--device=nothing"], "device: expected one that torch can use here"),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_wrong_options_are_refused_before_any_work(folder, tmp_path, arguments, message, monkeypatch):
    monkeypatch.setattr("hqlt.language.folder.load_model", lambda *_: pytest.fail("the model was loaded"))
    (tmp_path / "local").mkdir()
    data = "dataset_path: json\ndataset_kwargs: {data_files: {test: '{local}/nothing.jsonl'}}\n"
    (tmp_path / "local" / "mine.yaml").write_text(f"task: mine\n{data}output_type: loglikelihood\ntest_split: test\n")
    arguments = [argument.replace("LOCAL", str(tmp_path / "local")) for argument in arguments]
    with pytest.raises(SystemExit, match=message):
        main(["eval", str(folder), *arguments, f"--folder={tmp_path / 'results'}"])
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("place", ["run", "unwritable"])
def test_a_folder_that_cannot_take_results_is_refused(folder, place, monkeypatch):
    monkeypatch.setattr("hqlt.language.folder.load_model", lambda *_: pytest.fail("the model was loaded"))
    (folder / "run.json").write_text('{"kind": "language"}')
    place, message = {
        "run": (folder, r"run: expected a folder for results only, found a run of hqlt train; name another"),
        "unwritable": ("/proc/sys", "/proc/sys could not be written"),
    }[place]
    with pytest.raises(SystemExit, match=message):
        main(["eval", str(folder), f"--lengths={LIBRARY / 'ast.py'}", f"--folder={place}"])


def test_no_more_of_a_long_text_is_read_than_needed(tmp_path, monkeypatch):
    file, tokenizer = tmp_path / "long.txt", load_tokenizer("bytes")
    file.write_text("é" * 50_000)
    assert tokens_of(file, tokenizer, 10**6) == list(file.read_bytes())
    read, lengths = text.beginning_of, []
    monkeypatch.setattr("hqlt.cli.eval.beginning_of", lambda *a: lengths.append(a[1]) or read(*a))
    assert tokens_of(file, tokenizer, 101) == list(file.read_bytes()[:101])
    assert lengths == [404]
    for size in range(9):
        beginning, whole = read(file, size)
        assert beginning == "é" * ((size + 1) // 2) and not whole
    file.write_bytes(b"\xef\xbb\xbfa\r\n")
    assert read(file, 1 << 20) == ("a\r\n", True)


@pytest.mark.parametrize(("package", "extra"), [("lm_eval", "eval"), ("matplotlib", "report")])
def test_a_missing_package_is_named_with_its_extra(folder, monkeypatch, package, extra):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit, match=re.escape(f"expected the package {package}; {how_to_install(extra)}")):
        main(["eval", str(folder), "--suite=paper"])
