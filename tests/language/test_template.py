"""Conversations rendered by the tokenizer's template or the plain one: new messages only append tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hqlt.data import load_tokenizer
from hqlt.data.tokenizer import Tokenizer, model_tokenizer
from hqlt.language.export import export
from hqlt.language.folder import tokenizer_of
from hqlt.language.template import PLAIN_ENDS, chat_tokens, is_plain, plain_template
from tests.language.conftest import CHATML, build, prepending, save_chat_tokenizer

TALK = [
    {"role": "system", "content": "You know Paris well."},
    {"role": "user", "content": "Where is the Louvre?"},
    {"role": "assistant", "content": "On the right bank\n of the Seine."},
    {"role": "user", "content": "Et la Sorbonne, s'il vous plaît?"},
    {"role": "assistant", "content": "<|im_end|> Left. "},
]
PLAINLY = (
    "You know Paris well.\n\n"
    "User:\nWhere is the Louvre?\n\n"
    "Assistant:\nOn the right bank\n of the Seine.\n\n"
    "User:\nEt la Sorbonne, s'il vous plaît?\n\n"
    "Assistant:\n"
)


@pytest.fixture(params=["bytes", "chatml", "merging", "prepending"])
def tokenizer(request, tmp_path: Path) -> Tokenizer:
    if request.param == "bytes":
        return load_tokenizer("bytes")
    if request.param == "prepending":
        return prepending()
    save_chat_tokenizer(tmp_path, CHATML if request.param == "chatml" else None)
    return model_tokenizer(tmp_path)


def test_a_conversation_grows_at_its_end(tokenizer):
    """Rendering the whole conversation ≡ rendering turn by turn, before each answer, and after it without merges."""
    whole = chat_tokens(tokenizer, TALK, add_generation_prompt=False)
    begun = [chat_tokens(tokenizer, TALK[:turns]) for turns in (2, 4)]
    if not is_plain(tokenizer) or len(tokenizer.encode("\n\n")) == 2:
        begun += [chat_tokens(tokenizer, TALK[:turns], add_generation_prompt=False) for turns in range(len(TALK))]
    for tokens in begun:
        assert whole[: len(tokens)] == tokens


def test_the_plain_template():
    tokenizer = load_tokenizer("bytes")
    assert bytes(chat_tokens(tokenizer, TALK[:4])).decode() == PLAINLY
    whole = bytes(chat_tokens(tokenizer, TALK, add_generation_prompt=False)).decode()
    assert whole == f"{PLAINLY}<|im_end|> Left. \n\n"
    assert PLAINLY.partition("Louvre?")[2].startswith(PLAIN_ENDS[1])
    assert PLAINLY.partition("Seine.")[2].startswith(PLAIN_ENDS[0])
    assert is_plain(tokenizer)


def test_it_begins_with_the_tokenizers_special_tokens():
    from tokenizers import processors

    tokenizer = prepending()
    tokenizer.bos_id = 0
    tokenizer.tokenizer.add_special_tokens(["<s>", "</s>"])
    processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.tokenizer.post_processor = processor
    ids = chat_tokens(tokenizer, TALK[1:2])
    assert ids[0] == 0 and 0 not in ids[1:]
    assert plain_template(tokenizer).startswith("<s>{%")


def test_equals_transformers(tmp_path):
    from transformers import AutoTokenizer

    save_chat_tokenizer(tmp_path)
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path), model_tokenizer(tmp_path)
    for asked in (False, True):
        expected = theirs.apply_chat_template(TALK, add_generation_prompt=asked, return_dict=False)
        assert chat_tokens(ours, TALK, asked) == expected
    assert not is_plain(ours)
    ours.save(tmp_path / "again")
    assert chat_tokens(model_tokenizer(tmp_path / "again"), TALK) == chat_tokens(ours, TALK)


@pytest.mark.parametrize("kind", ["bytes", "chatml", "merging"])
def test_an_exported_model_renders_it_in_the_same_way(kind, tmp_path):
    size = 256 if kind == "bytes" else save_chat_tokenizer(tmp_path / "a", CHATML if kind == "chatml" else None)
    build(vocab_size=size).save_pretrained(tmp_path / "a")
    export(tmp_path / "a", tmp_path / "b", torch.float32)
    one, other = (tokenizer_of(tmp_path / name, size) for name in "ab")
    assert chat_tokens(one, TALK) == chat_tokens(other, TALK)
    assert is_plain(one) == is_plain(other) == (kind != "chatml")


def test_errors_of_a_template_are_reported(tmp_path):
    save_chat_tokenizer(tmp_path, "{{ raise_exception('System role not supported') }}")
    with pytest.raises(ValueError, match=r"messages: expected .* template accepts, got: System role not supported"):
        chat_tokens(model_tokenizer(tmp_path), TALK)
    with pytest.raises(ValueError, match="messages: expected messages that the chat template accepts"):
        chat_tokens(load_tokenizer("bytes"), [{"role": "user", "content": None}])
