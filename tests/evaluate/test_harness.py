"""The harness's tasks on our models: results do not depend on the batch size, and tasks can use local files."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance

from hqlt.data import load_tokenizer
from hqlt.evaluate import harness as module
from hqlt.evaluate.harness import HarnessModel, load_tasks
from hqlt.evaluate.paper import compare, counterpart, tables
from hqlt.model import preset
from tests.language.conftest import build, prepending
from tests.language.conftest import model as model

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

REAL = Path(__file__).parents[3] / "shared" / "data"
TEXT = Path(json.__file__).read_text()


def harness(model, batch_size=8, max_length=None) -> HarnessModel:
    return HarnessModel(model, load_tokenizer("bytes"), batch_size, max_length)


def run_tasks(model, names, local=None, limit=None):
    return module.run_tasks(model, load_tasks(names, local), limit)


def instances(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


@pytest.fixture
def local(tmp_path):
    """A folder with data for the three local tasks, and a custom task file."""
    folder = tmp_path / "data"
    folder.mkdir()
    sentences = [line.strip() for line in TEXT.splitlines() if len(line.split()) > 3][:9]
    (folder / "lambada_test.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in sentences))
    article = "\n = {name} = \n\n {text} \n\n = = A section = = \n\n more \n"
    (folder / "wikitext2_test.txt").write_text("".join(article.format(name=n, text=TEXT[: 99 * n]) for n in (3, 9)))
    choices = [{"goal": text, "sol1": text[:9], "sol2": "the other"} for text in sentences]
    (folder / "piqa_valid.jsonl").write_text("\n".join(map(json.dumps, choices)))
    (folder / "piqa_valid_labels.lst").write_text("0\n1\n0\n" * 3)
    mine = (
        "task: mine\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: '{local}/lambada_test.jsonl'\n"
        "output_type: generate_until\ntest_split: test\ndoc_to_text: '{{text}}'\ndoc_to_target: 'x'\n"
        "generation_kwargs:\n  until: ['e']\n  max_gen_toks: 6\nmetric_list:\n  - metric: exact_match\n"
    )
    (folder / "mine.yaml").write_text(mine)
    return folder


class TestRequests:
    def test_log_likelihoods(self, model):
        pairs = [(TEXT[i : 3 * i], TEXT[3 * i : 3 * i + 7]) for i in (1, 40, 7, 30)] + [("", "begins")]
        one, many = (harness(model, n).loglikelihood(instances("loglikelihood", pairs), True) for n in (1, 3))
        assert [greedy for _, greedy in one] == [greedy for _, greedy in many]
        assert [value for value, _ in many] == pytest.approx([value for value, _ in one], abs=1e-10)

    def test_rolling_predicts_each_token_from_all_before_it(self, model):
        texts = [TEXT[:700], "short", TEXT[5:40]]
        one, many = (
            harness(model, n).loglikelihood_rolling(instances("r", [(t,) for t in texts]), True) for n in (1, 3)
        )
        assert many == pytest.approx(one, abs=1e-10)
        tokens = torch.tensor([list(b"\n" + texts[0].encode())])
        log_p = model(tokens).logits[0, :-1].log_softmax(-1).gather(1, tokens[0, 1:, None]).sum().item()
        assert one[0] == pytest.approx(log_p, abs=1e-9)

    def test_generation(self, model):
        contexts = [TEXT[: 5 * i] for i in (3, 1, 90, 9)] + [""]
        options = {"until": ["q", "\n\n"], "max_gen_toks": 12}
        requests = instances("generate_until", [(context, options) for context in contexts])
        one, many = (harness(model, n).generate_until(requests, True) for n in (1, 3))
        assert one == many
        for context, text in zip(contexts[:-1], one, strict=False):
            given = torch.tensor([list(context.encode())])
            made = model.generate(given, max_new_tokens=12, do_sample=False, use_cache=False, pad_token_id=0)
            whole = bytes(made[0, given.shape[1] :].tolist()).decode(errors="replace")
            assert text == min((whole.split(stop)[0] for stop in options["until"]), key=len)

    def test_contexts_are_truncated_on_the_left(self, model):
        whole = instances("loglikelihood", [(TEXT[:40], TEXT[40:45])])
        cut = instances("loglikelihood", [(TEXT[28:40], TEXT[40:45])])  # the last token is not read
        assert harness(model, max_length=16).loglikelihood(whole, True) == harness(model).loglikelihood(cut, True)
        options = {"until": [], "max_gen_toks": 6}
        whole, cut = (instances("generate_until", [(text, options)]) for text in (TEXT[:40], TEXT[30:40]))
        assert harness(model, max_length=16).generate_until(whole, True) == harness(model).generate_until(cut, True)

    def test_a_long_document_is_read_in_windows(self, model):
        whole = torch.tensor(list(b"\n" + TEXT[:41].encode()))
        expected = 0.0
        for begin, new in (
            (0, 16),
            (16, 16),
            (25, 9),
        ):  # the last window is as long as the others, but scores 9 tokens only
            log_p = model(whole[None, begin : begin + 16]).logits[0].log_softmax(-1)
            log_p = log_p.gather(1, whole[begin + 1 : begin + 17, None])
            expected += log_p[-new:].sum().item()
        requests = instances("r", [(TEXT[:41],), ("short",), ("",)])
        cut, short, empty = harness(model, max_length=16).loglikelihood_rolling(requests, True)
        assert cut == pytest.approx(expected, abs=1e-9)
        assert [short] == pytest.approx(harness(model).loglikelihood_rolling(requests[1:2], True), abs=1e-10)
        assert empty == 0

    def test_a_max_length_without_room_for_a_context_is_refused(self):
        model = harness(build(), max_length=4)
        with pytest.raises(ValueError, match=r"max_length: expected at least 5 for the tokens after a context, got 4"):
            model.loglikelihood(instances("loglikelihood", [("a", "12345")]), True)
        with pytest.raises(ValueError, match="max_length: expected at least 7"):
            model.generate_until(instances("generate_until", [("a", {"until": [], "max_gen_toks": 6})]), True)

    def test_the_prefix_of_a_text(self):
        """It is the token that begins texts, else the one that ends them, else a newline."""
        tokenizer = prepending()
        model = build(vocab_size=tokenizer.vocab_size)
        assert harness(build()).prefix_token_id == 10
        assert HarnessModel(model, tokenizer).prefix_token_id == tokenizer.eos_id == 1
        tokenizer.bos_id = 2
        begun = HarnessModel(model, tokenizer)
        assert begun.prefix_token_id == 2
        tokens = torch.tensor([[2, *tokenizer.encode("text")]])
        log_p = model(tokens).logits[0, :-1].log_softmax(-1).gather(1, tokens[0, 1:, None]).sum().item()
        assert begun.loglikelihood_rolling(instances("r", [("text",)]), True) == [pytest.approx(log_p, abs=1e-9)]

    @pytest.mark.parametrize("context", ["", " ", " \n\t "])
    def test_a_context_of_spaces_is_part_of_the_continuation(self, context):
        """The context is then the prefix of a text."""
        model = build()
        tokens = torch.tensor([list(b"\n" + context.encode() + b"text")])
        log_p = model(tokens).logits[0, :-1].log_softmax(-1).gather(1, tokens[0, 1:, None]).sum().item()
        ((value, greedy),) = harness(model).loglikelihood(instances("loglikelihood", [(context, "text")]), True)
        assert (value, greedy) == (pytest.approx(log_p, abs=1e-9), False)

    def test_what_cannot_be_scored_is_refused(self):
        for pair in (("context", ""), ("", "")):
            with pytest.raises(ValueError, match=r"continuation: expected at least one token, got none for \('"):
                harness(build()).loglikelihood(instances("loglikelihood", [pair]), True)
        with pytest.raises(ValueError, match="max_gen_toks: expected at least 1, got 0"):
            harness(build()).generate_until(instances("generate_until", [("a", {"max_gen_toks": 0})]), True)

    def test_requests_with_different_options(self):
        requests = [("a", {"until": [], "max_gen_toks": n}) for n in (2, 5, 2)]
        made = harness(build()).generate_until(instances("generate_until", requests), True)
        assert made[0] == made[2] and made[1].startswith(made[0][:1]) and made[0] != made[1]


class TestTasks:
    def test_local_tasks(self, local):
        names = ["lambada_local", "piqa_local", "wikitext2_local", "mine"]
        one, many = (run_tasks(harness(build(), n), names, local) for n in (1, 4))
        for name in names:
            assert {k: v for k, v in one[name].items() if "stderr" not in k} == {
                k: pytest.approx(v, rel=1e-9) if isinstance(v, float) else v
                for k, v in many[name].items()
                if "stderr" not in k
            }
        assert many["wikitext2_local"]["sample_len"] == 2  # articles, not lines
        assert math.log2(many["wikitext2_local"]["byte_perplexity,none"]) == pytest.approx(
            many["wikitext2_local"]["bits_per_byte,none"]
        )

    def test_unknown_tasks(self, local):
        """The paper's are all known; the error names the misspelled one only."""
        with pytest.raises(
            ValueError, match="got unknown lambda_local; local tasks are lambada_local, mine, piqa_local"
        ):
            run_tasks(harness(build()), [*tables()["suite"], "lambda_local"], local)

    def test_tags_and_groups_stand_for_all_their_tasks(self, local):
        mine = (local / "mine.yaml").read_text()
        (local / "mine.yaml").write_text(f"{mine}tag: ours\n")
        (local / "both.yaml").write_text("group: both\ntask: [mine, lambada_local]\n")
        tagged, grouped = (run_tasks(harness(build()), [name], local, limit=1) for name in ("ours", "both"))
        assert set(tagged) == {"mine"}
        assert set(grouped) == {"both", "mine", "lambada_local"}
        assert [line.task for line in compare(grouped, build().config)] == ["mine", *["lambada_local"] * 2]

    def test_python_files_of_local_tasks(self, local):
        mine = (local / "mine.yaml").read_text().replace("'{{text}}'", "!function local_data.shout")
        (local / "mine.yaml").write_text(mine)
        (local / "local_data.py").write_text(
            "def shout(doc):\n    return doc['text'].upper()\n"
        )  # hqlt has a file of this name, too
        results = run_tasks(harness(build()), ["mine", "wikitext2_local"], local, limit=1)
        assert set(results) == {"mine", "wikitext2_local"}
        (local / "mine.yaml").write_text(mine.replace("local_data", "elsewhere"))
        with pytest.raises(ValueError, match="tasks: Cannot import module 'elsewhere' for function 'shout'"):
            run_tasks(harness(build()), ["mine"], local)

    def test_without_a_network_the_error_names_what_needs_none(self, monkeypatch):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("hqlt.data.network.hub_answers", lambda: False)
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", "nothing")
        with pytest.raises(
            ValueError, match=r"got https://huggingface\.co does not answer; Conn.* --local FOLDER --tasks"
        ):
            load_tasks(["piqa"])

    def test_missing_local_data(self, local):
        (local / "lambada_test.jsonl").unlink()
        with pytest.raises(
            ValueError, match=r"tasks: expected tasks whose data can be loaded, got .*; see the files in"
        ):
            load_tasks(["mine"], local)
        (local / "mine.yaml").write_text("task: [mine")
        with pytest.raises(ValueError, match="tasks: expected "):
            load_tasks(["mine"], local)

    def test_a_template_that_does_not_fit(self, local):
        """The harness tries a template on the first document when it loads a task."""
        mine, first = (
            (local / "mine.yaml").read_text(),
            json.loads((local / "lambada_test.jsonl").read_text().partition("\n")[0]),
        )
        (local / "mine.yaml").write_text(mine.replace("'{{text}}'", "'{{txt.upper()}}'"))
        with pytest.raises(ValueError, match="can be loaded, got UndefinedError: 'txt' is undefined; see the files in"):
            load_tasks(["mine"], local)
        later = json.dumps(f"{{{{text if text == {first['text']!r} else txt.upper()}}}}")
        (local / "mine.yaml").write_text(mine.replace("'{{text}}'", later))
        with pytest.raises(ValueError, match="tasks: expected templates that fit the data, got 'txt' is undefined"):
            run_tasks(harness(build()), ["mine"], local)

    @pytest.mark.skipif(not REAL.is_dir(), reason="needs the data")
    def test_real_data(self):
        names = ["lambada_local", "piqa_local", "wikitext2_local"]
        results = run_tasks(harness(build()), names, REAL, limit=2)
        assert [results[name]["sample_len"] for name in names] == [2, 2, 2]
        assert results["wikitext2_local"]["bits_per_byte,none"] > 0


class TestPaper:
    def test_the_tables_are_complete(self):
        published = tables()
        for theirs in published["models"].values():
            for table, columns in published["columns"].items():
                row = theirs.get(table, [])
                assert len(row) in (0, len(columns) + 1)
                shares = row[2 if table == "language" else 0 : -1]
                if shares and None not in shares:
                    assert sum(shares) / len(shares) == pytest.approx(row[-1], abs=0.06)
        tasks = {task for columns in published["columns"].values() for task, _ in columns.values()}
        assert tasks == set(published["suite"])

    @pytest.mark.parametrize(
        ("name", "changes", "row"),
        [
            ("hqlt-340m", {}, "Synchronous, 340M"),
            ("hqlt-340m", {"vocab_size": 50_000}, "Synchronous, 340M"),
            ("hqlt-1.3b-delayed-chunk", {}, "Delayed-Chunk, 1.3B"),
            ("deltanet-1.3b", {}, "DeltaNet, 1.3B"),
            ("deltanet-340m", {"beta_max": 2.0}, None),
            ("transformer-340m", {}, "Transformer++, 340M"),
            ("transformer-340m", {"kv_window": 1024}, "Transformer++, 340M, window 1024"),
            ("transformer-340m", {"kv_window": 512}, None),
            ("hqlt-340m", {"mixer": "sum"}, "Synchronous, 340M, sum mixer"),
            ("hqlt-340m", {"window": 1024}, "Synchronous, 340M, window 1024"),
            ("hqlt-340m", {"window": 1024, "mixer": "sum"}, None),
            ("hqlt-1.3b", {"window": 128}, None),
            ("hqlt-340m", {"layer_kinds": ["fw", "kv"] * 12}, None),
            ("hqlt-340m", {"hidden_size": 1600, "num_heads": 10}, None),
            ("tiny", {}, None),
        ],
    )
    def test_a_row_belongs_to_a_model(self, name, changes, row):
        found = counterpart(preset(name, **changes))
        assert (found and found.name) == row

    def test_comparison_with_ours(self):
        """Shares are in percent, other metrics unchanged; there are averages of tables that are complete."""
        results = {
            "lambada_local": {"alias": "l", "perplexity,none": 30.5, "acc,none": 0.5, "acc_stderr,none": 0.01},
            "squadv2": {"f1,none": 47.0, "exact_match,none": 0.25},
            **{task: {"contains,none": share} for task, share in (("swde", 0.1), ("squad_completion", 0.2))},
        }
        lines = [tuple(line) for line in compare(results, preset("hqlt-340m"))]
        assert lines == [
            ("lambada_local", "perplexity", 30.5, None, 29.4),
            ("lambada_local", "acc", 50.0, 1.0, 33.3),
            ("squadv2", "f1", 47.0, None, None),
            ("squadv2", "exact_match", 25.0, None, None),
            ("swde", "contains", 10.0, None, 20.0),
            ("squad_completion", "contains", 20.0, None, 28.4),
        ]
        results |= {"fda": {"contains,none": 0.3}}
        assert compare(results, preset("hqlt-340m"))[-1] == ("recall", "average", pytest.approx(20), None, 19.8)
        assert {line.paper for line in compare(results, preset("tiny"))} == {None}
