"""The harness's own tasks on our models: the same numbers for every batch size, local files by the same path."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance

from hqlt.data import load_tokenizer
from hqlt.evaluate.harness import HarnessModel, run_tasks
from hqlt.evaluate.paper import counterpart, tables
from hqlt.model import HQLTConfig, preset
from tests.language.conftest import build
from tests.language.conftest import model as model

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

REAL = Path(__file__).parents[3] / "shared" / "data"
TEXT = Path(json.__file__).read_text()


def harness(model, batch_size=8) -> HarnessModel:
    return HarnessModel(model, load_tokenizer("bytes"), batch_size)


def instances(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


@pytest.fixture
def local(tmp_path):
    """Data of the three local tasks' form, and a task file of one's own."""
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

    def test_rolling_predicts_each_token_from_all_before(self, model):
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
        asked = instances("generate_until", [(context, options) for context in contexts])
        one, many = (harness(model, n).generate_until(asked, True) for n in (1, 3))
        assert one == many
        for context, text in zip(contexts[:-1], one, strict=False):
            given = torch.tensor([list(context.encode())])
            made = model.generate(given, max_new_tokens=12, do_sample=False, use_cache=False, pad_token_id=0)
            whole = bytes(made[0, given.shape[1] :].tolist()).decode(errors="replace")
            assert text == min((whole.split(stop)[0] for stop in options["until"]), key=len)

    def test_options_are_kept_apart(self):
        asked = [("a", {"until": [], "max_gen_toks": n}) for n in (2, 5, 2)]
        made = harness(build()).generate_until(instances("generate_until", asked), True)
        assert made[0] == made[2] and made[1].startswith(made[0][:1]) and made[0] != made[1]


class TestTasks:
    def test_local_ones(self, local):
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

    def test_unknown_ones(self, local):
        """And the paper's are all known: only the misspelt one is complained of."""
        with pytest.raises(
            ValueError, match="got unknown lambda_local; local ones are lambada_local, mine, piqa_local"
        ):
            run_tasks(harness(build()), [*tables()["suite"], "lambda_local"], local)

    @pytest.mark.skipif(not REAL.is_dir(), reason="the data is not here")
    def test_real_data(self):
        names = ["lambada_local", "piqa_local", "wikitext2_local"]
        results = run_tasks(harness(build()), names, REAL, limit=2)
        assert [results[name]["sample_len"] for name in names] == [2, 2, 2]
        assert results["wikitext2_local"]["bits_per_byte,none"] > 0


class TestPaper:
    def test_the_tables_are_whole(self):
        told = tables()
        for models in told["models"].values():
            assert set(models) == {"Transformer++", "DeltaNet", "Delayed-Streaming", "Delayed-Chunk", "Synchronous"}
            for name, row in models.items():
                assert len(row) == (8 if "Delayed" in name else 11)
        assert {task for task, _ in told["columns"].values()} == set(told["suite"])
        averages = {"Transformer++": 47.6, "DeltaNet": 46.8, "Synchronous": 47.8, "Delayed-Chunk": 47.5}
        for name, average in averages.items():
            assert sum(told["models"]["340M"][name][2:8]) / 6 == pytest.approx(average, abs=0.06)

    def test_the_model_most_like_ours(self):
        assert counterpart(preset("hqlt-340m")).name == "Synchronous, 340M"
        assert counterpart(preset("deltanet-1.3b")).name == "DeltaNet, 1.3B"
        assert counterpart(preset("transformer-340m")).name == "Transformer++, 340M"
        assert counterpart(HQLTConfig(blend="delayed-chunk", hidden_size=1600)).name == "Delayed-Chunk, 1.3B"
        values = counterpart(preset("hqlt-340m")).values
        assert values["lambada_local", "perplexity"] == values["lambada_openai", "perplexity"] == 29.4
        assert values["hellaswag", "acc_norm"] == 42.7
