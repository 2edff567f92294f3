"""What was read of a conversation is not read again, and answers are those of a model that reads it anew."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import hqlt
from hqlt.data import load_tokenizer
from hqlt.data.tokenizer import model_tokenizer
from hqlt.language.chat import Chat, TextUntil
from hqlt.language.template import chat_tokens
from tests.language.conftest import CHATML, build, save_chat_tokenizer


def test_a_text_ends_at_the_first_end():
    until = TextUntil(["\n\nUser:", "stop"])
    assert [until.add(bit) for bit in ("a\n", "\nUs", "a", "\n\nst")] == ["a", "", "\n\nUsa", "\n\n"]
    assert until.add("op, stop") == ""
    assert until.ended and until.add("more") == until.rest() == ""
    until = TextUntil(["stop"])
    assert [until.add("st"), until.rest(), until.ended] == ["", "st", False]


@given(st.lists(st.text("ab", max_size=3), max_size=9), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_however_the_bits_come(bits, ends):
    until, text = TextUntil(ends), "".join(bits)
    said = "".join(map(until.add, bits))
    assert said + until.rest() == text[: min((text.find(end) for end in ends if end in text), default=len(text))]


QUESTIONS = ["Where is the Louvre?", "Et la Sorbonne?", "Why?"]


def talk(chat: Chat, questions: list[str], messages: list[dict[str, str]] | None = None):
    messages, answers = list(messages or []), []
    for question in questions:
        messages.append({"role": "user", "content": question})
        answers.append(chat.answer(messages, lambda _: None, max_new_tokens=12, greedy=True))
        messages.append({"role": "assistant", "content": answers[-1].text})
    return messages, answers


def ascii_model(**fields):
    """What it says is printable ASCII, which is the same bytes again when it is read."""
    model = build(**fields)
    with torch.no_grad():
        model.lm_head.weight[[*range(32), *range(127, 256)]] = 0
    return model


def test_answers_are_those_to_all_that_was_said(model):
    """With the states that are there ≡ the whole conversation read anew."""
    tokenizer = load_tokenizer("bytes")
    carried = Chat(model, tokenizer)
    messages, answers = talk(carried, QUESTIONS)
    for i, answer in enumerate(answers):
        anew = Chat(model, tokenizer).answer(messages[: 2 * i + 1], lambda _: None, max_new_tokens=12, greedy=True)
        whole = len(chat_tokens(tokenizer, messages[: 2 * i + 1]))
        assert (anew.text, anew.read, anew.reused) == (answer.text, whole, 0)
        assert answer.read + answer.reused == whole


FORGETFUL = CHATML.replace("message.content", "(message.content if loop.last else message.content[:3])")
"""A template that writes earlier messages in another way, as those do that take the thoughts out of answers."""


def test_a_template_may_change_what_was_said(tmp_path):
    size = save_chat_tokenizer(tmp_path, FORGETFUL)
    tokenizer, model = model_tokenizer(tmp_path), build(vocab_size=size)
    messages, answers = talk(Chat(model, tokenizer), QUESTIONS)
    for i, answer in enumerate(answers):
        anew = Chat(model, tokenizer).answer(messages[: 2 * i + 1], lambda _: None, max_new_tokens=12, greedy=True)
        assert anew.text == answer.text


@pytest.mark.parametrize("template", ["plain", "chatml", "merging"])
def test_only_what_is_new_is_read(template, tmp_path):
    if template == "plain":
        tokenizer, model = load_tokenizer("bytes"), ascii_model()
    else:
        size = save_chat_tokenizer(tmp_path, CHATML if template == "chatml" else None)
        tokenizer, model = model_tokenizer(tmp_path), build(vocab_size=size)
    chat = Chat(model, tokenizer)
    messages, answers = talk(chat, QUESTIONS)
    for i in (1, 2):
        before = len(chat_tokens(tokenizer, messages[: 2 * i - 1]))
        made = answers[i - 1].made - 1 if template == "plain" else 0  # elsewhere the answer may be spelled otherwise
        assert answers[i].reused >= before - 1 + made
    again = chat.answer(messages[:-1], lambda _: None, max_new_tokens=12, greedy=True)
    assert (again.text, again.read) == (answers[-1].text, 1)  # another try at the last question
    _, (fork,) = talk(chat, ["And then?"], messages[:2])  # two turns taken back, and another way taken
    assert fork.reused >= answers[1].reused
    assert (fork.state_bytes, fork.made) == (answers[0].state_bytes, answers[0].made)


ASKED = [{"role": "user", "content": QUESTIONS[0]}]


def test_an_answer_ends_where_the_model_ends_its_turn():
    """At a token, which its config or its tokenizer names, or at a text of the plain template."""
    tokenizer, model = load_tokenizer("bytes"), ascii_model()
    _, (whole,) = talk(Chat(model, tokenizer), QUESTIONS[:1])
    end = whole.text[4:6]
    first = whole.text.index(end)
    chat = Chat(model, tokenizer)
    chat.ends = (end,)
    _, (answer,) = talk(chat, QUESTIONS[:1])
    assert (answer.text, answer.made) == (whole.text[:first], first + 2)
    first = whole.text.index(end[0])
    for named in ([999, ord(end[0])], ord(end[0]), None):
        model.generation_config.eos_token_id = named
        tokenizer.eos_id = None if named else ord(end[0])
        _, (answer,) = talk(Chat(model, tokenizer), QUESTIONS[:1])
        assert (answer.text, answer.made) == (whole.text[:first], first + 1)


def test_ctrl_c_ends_an_answer():
    chat = Chat(ascii_model(), load_tokenizer("bytes"))
    _, (whole,) = talk(chat, QUESTIONS[:1])
    heard = []

    def listen(text: str) -> None:
        heard.append(text)
        if len(heard) == 3:
            raise KeyboardInterrupt

    answer = chat.answer(ASKED, listen, max_new_tokens=12, greedy=True)
    assert answer.interrupted and answer.text == whole.text[:3] == "".join(heard)
    messages = [*ASKED, {"role": "assistant", "content": answer.text}]
    assert talk(chat, QUESTIONS[1:], messages)[0] == talk(Chat(chat.model, chat.tokenizer), QUESTIONS[1:], messages)[0]


def test_saved_and_loaded(tmp_path):
    model, tokenizer = ascii_model(), load_tokenizer("bytes")
    chat = Chat(model, tokenizer)
    messages, answers = talk(chat, QUESTIONS[:2])
    chat.save(tmp_path / "talk", messages)
    other = Chat(model, tokenizer)
    loaded = other.load(tmp_path / "talk")
    assert loaded == messages
    (one,), (two,) = talk(chat, QUESTIONS[2:], messages)[1], talk(other, QUESTIONS[2:], loaded)[1]
    assert one.text == two.text and one.reused == two.reused > answers[-1].reused
    with pytest.raises(ValueError, match="save: expected a conversation, got one without messages"):
        chat.save(tmp_path / "nothing", [])
    with pytest.raises(ValueError, match="structure or weights differ"):
        Chat(build(window=5), tokenizer).load(tmp_path / "talk")
    hqlt.save_state(tmp_path / "state", chat.store.find([0, 0]).states, model)
    with pytest.raises(ValueError, match="expected a conversation, as `hqlt chat` saves it, got a state alone"):
        chat.load(tmp_path / "state")


def test_whether_there_is_a_place_for_a_system_message(tmp_path):
    for template, place in (
        (CHATML, True),
        (None, True),
        ("{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}", False),
        ("{{ raise_exception('no') if messages[0].role == 'system' else 'a' }}", False),
    ):
        size = save_chat_tokenizer(tmp_path, template)
        assert Chat(build(vocab_size=size), model_tokenizer(tmp_path)).takes_system() == place
