"""Scores equal those of the harness's own `hf` model on the same folder, whatever special tokens are added."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance

from hqlt.evaluate.harness import HarnessModel
from hqlt.language.folder import load_model, tokenizer_of
from tests.language.conftest import build

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

WORDS = ["<s>", "</s>", "<pad>", *(chr(byte) for byte in range(32, 127)), "\n"]
LONGEST = 24
CONTEXTS = [
    "",
    "a",
    "two words",
    " ",
    "ends in a blank ",
    "<s>begun",
    "a</s>b",
    "a context that is longer than it is read",
]
UNTIL = {"until": ["e", "\n"], "max_gen_toks": 6}


def special_tokens(name: str) -> dict:
    """Settings of tokenizer_config.json, and whether the post-processor of tokenizer.json adds <s>."""
    return {
        "bos by the post-processor": ({"bos_token": "<s>", "eos_token": "</s>"}, True),
        "bos by the settings": ({"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}, False),
        "bos named, not added": ({"bos_token": "<s>", "eos_token": "</s>"}, False),
        "eos alone": ({"eos_token": "</s>"}, False),
        "read as text": ({"bos_token": "<s>", "eos_token": "</s>", "split_special_tokens": True}, True),
    }[name]


def write_tokenizer(folder: Path, settings: dict, post_processed: bool) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in WORDS[:3]])
    if post_processed:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.fixture(
    params=["bos by the post-processor", "bos by the settings", "bos named, not added", "eos alone", "read as text"],
    scope="module",
)
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model = build(vocab_size=len(WORDS))
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = 1
    model.save_pretrained(folder)
    write_tokenizer(folder, *special_tokens(request.param))
    return folder


def ours(folder: Path, batch_size: int = 3) -> HarnessModel:
    return HarnessModel(load_model(folder), tokenizer_of(folder, len(WORDS)), batch_size, LONGEST)


def requests(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


class TestTokens:
    """Tokens equal those of the harness's own model, whose tokenizer AutoTokenizer loads."""

    @pytest.mark.parametrize("text", CONTEXTS)
    def test_tokens_of_a_text(self, folder, text):
        from transformers import AutoTokenizer

        theirs = AutoTokenizer.from_pretrained(folder)
        spelled = theirs.decode(ours(folder).prefix_token_id)
        expected = theirs.encode(text, **({"add_special_tokens": False} if text.startswith(spelled) else {}))
        assert ours(folder).tok_encode(text) == expected

    def test_tokens_before_a_text(self, folder):
        from transformers import AutoTokenizer

        theirs = AutoTokenizer.from_pretrained(folder)
        bos = theirs.bos_token_id
        assert ours(folder).prefix_token_id == (theirs.eos_token_id if bos is None else bos)
        assert tokenizer_of(folder, len(WORDS)).prefix_ids == theirs.encode("")


class TestScores:
    @pytest.fixture
    def theirs(self, folder):
        pytest.importorskip("accelerate")
        from lm_eval.models.huggingface import HFLM
        from transformers import AutoTokenizer

        return HFLM(
            load_model(folder), tokenizer=AutoTokenizer.from_pretrained(folder), max_length=LONGEST, device="cpu"
        )

    def test_log_likelihoods(self, folder, theirs):
        adds = bool(tokenizer_of(folder, len(WORDS)).prefix_ids)
        contexts = [text for text in CONTEXTS if text.strip() or not text or adds]  # it asserts that spaces have tokens
        pairs = [(text, " and more") for text in contexts] + [("", "<s>a"), ("", "</s>a"), ("a", "b" * LONGEST)]
        expected = theirs.loglikelihood(requests("loglikelihood", *pairs), True)
        values = ours(folder).loglikelihood(requests("loglikelihood", *pairs), True)
        assert [greedy for _, greedy in values] == [greedy for _, greedy in expected]
        assert [value for value, _ in values] == pytest.approx([value for value, _ in expected], abs=1e-4)

    def test_rolling(self, folder, theirs):
        texts = [(text,) for text in [*CONTEXTS, "many words, " * 9]]
        expected = theirs.loglikelihood_rolling(requests("loglikelihood_rolling", *texts), True)
        assert ours(folder).loglikelihood_rolling(requests("r", *texts), True) == pytest.approx(expected, abs=1e-4)

    @pytest.mark.parametrize("options", [UNTIL, {**UNTIL, "repetition_penalty": 3.0}, {"until": [], "max_gen_toks": 9}])
    def test_generation(self, folder, theirs, options):
        adds = bool(tokenizer_of(folder, len(WORDS)).prefix_ids)
        contexts = [(text, options) for text in CONTEXTS if text or adds]  # it cannot continue an empty text
        expected = theirs.generate_until(requests("generate_until", *contexts), True)
        assert ours(folder).generate_until(requests("generate_until", *contexts), True) == expected
        assert len(set(expected)) > 2

    def test_sampling(self, folder, theirs):
        options = {"until": ["\n"], "max_gen_toks": 20, "do_sample": True, "temperature": 0.7, "top_p": 0.9}
        contexts = requests("generate_until", ("a text", options))
        torch.manual_seed(0)
        expected = theirs.generate_until(contexts, True)
        torch.manual_seed(0)
        assert ours(folder).generate_until(contexts, True) == expected
