"""No part of a conversation is read twice, and answers equal those after reading all of it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import hqlt
from hqlt.data import load_tokenizer
from hqlt.data.tokenizer import model_tokenizer
from hqlt.language.chat import Chat, StopFilter
from hqlt.language.template import chat_tokens
from tests.language.conftest import CHATML, build, save_chat_tokenizer


def test_text_ends_at_the_first_stop_string():
    stream = StopFilter(["\n\nUser:", "stop"])
    assert [stream.add(bit) for bit in ("a\n", "\nUs", "a", "\n\nst")] == ["a", "", "\n\nUsa", "\n\n"]
    assert stream.add("op, stop") == ""
    assert stream.stopped and stream.add("more") == stream.rest() == ""
    stream = StopFilter(["stop"])
    assert [stream.add("st"), stream.rest(), stream.stopped] == ["", "st", False]


@given(st.lists(st.text("ab", max_size=3), max_size=9), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_stop_strings_do_not_depend_on_chunks(chunks, stops):
    stream, text = StopFilter(stops), "".join(chunks)
    passed = "".join(map(stream.add, chunks))
    assert passed + stream.rest() == text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]


QUESTIONS = ["Where is the Louvre?", "Et la Sorbonne?", "Why?"]


def talk(chat: Chat, questions: list[str], messages: list[dict[str, str]] | None = None):
    messages, answers = list(messages or []), []
    for question in questions:
        messages.append({"role": "user", "content": question})
        answers.append(chat.answer(messages, lambda _: None, max_new_tokens=12, greedy=True))
        messages.append({"role": "assistant", "content": answers[-1].text})
    return messages, answers


def ascii_model(**fields):
    """A model whose answers are printable ASCII, so that their text encodes to the generated tokens."""
    model = build(**fields)
    with torch.no_grad():
        model.lm_head.weight[[*range(32), *range(127, 256)]] = 0
    return model


def test_answers_with_stored_states_equal_reading_everything(model):
    tokenizer = load_tokenizer("bytes")
    messages, answers = talk(Chat(model, tokenizer), QUESTIONS)
    for i, answer in enumerate(answers):
        fresh = Chat(model, tokenizer).answer(messages[: 2 * i + 1], lambda _: None, max_new_tokens=12, greedy=True)
        whole = len(chat_tokens(tokenizer, messages[: 2 * i + 1]))
        assert (fresh.text, fresh.read, fresh.reused) == (answer.text, whole, 0)
        assert answer.read + answer.reused == whole


FORGETFUL = CHATML.replace("message.content", "(message.content if loop.last else message.content[:3])")
"""A template that renders earlier messages differently, like those that remove the reasoning from old answers."""


def test_a_template_may_change_earlier_messages(tmp_path):
    size = save_chat_tokenizer(tmp_path, FORGETFUL)
    tokenizer, model = model_tokenizer(tmp_path), build(vocab_size=size)
    messages, answers = talk(Chat(model, tokenizer), QUESTIONS)
    for i, answer in enumerate(answers):
        fresh = Chat(model, tokenizer).answer(messages[: 2 * i + 1], lambda _: None, max_new_tokens=12, greedy=True)
        assert fresh.text == answer.text


@pytest.mark.parametrize("template", ["plain", "chatml", "merging"])
def test_only_new_tokens_are_read(template, tmp_path):
    if template == "plain":
        tokenizer, model = load_tokenizer("bytes"), ascii_model()
    else:
        size = save_chat_tokenizer(tmp_path, CHATML if template == "chatml" else None)
        tokenizer, model = model_tokenizer(tmp_path), build(vocab_size=size)
    chat = Chat(model, tokenizer)
    messages, answers = talk(chat, QUESTIONS)
    for i in (1, 2):
        before = len(chat_tokens(tokenizer, messages[: 2 * i - 1]))
        generated = (
            answers[i - 1].generated - 1 if template == "plain" else 0
        )  # others may encode the answer differently
        assert answers[i].reused >= before - 1 + generated
    again = chat.answer(messages[:-1], lambda _: None, max_new_tokens=12, greedy=True)
    assert (again.text, again.read) == (answers[-1].text, 1)  # a retry
    _, (fork,) = talk(chat, ["And then?"], messages[:2])  # a fork after the first turn
    assert fork.reused >= answers[1].reused
    assert (fork.state_bytes, fork.generated) == (answers[0].state_bytes, answers[0].generated)


MESSAGES = [{"role": "user", "content": QUESTIONS[0]}]


def test_an_answer_ends_at_an_end_token_or_stop_string():
    """End tokens are named by the config or the tokenizer; stop strings are those of the plain template."""
    tokenizer, model = load_tokenizer("bytes"), ascii_model()
    _, (whole,) = talk(Chat(model, tokenizer), QUESTIONS[:1])
    end = whole.text[4:6]
    first = whole.text.index(end)
    chat = Chat(model, tokenizer)
    chat.stops = (end,)
    _, (answer,) = talk(chat, QUESTIONS[:1])
    assert (answer.text, answer.generated) == (whole.text[:first], first + 2)
    first = whole.text.index(end[0])
    for named in ([999, ord(end[0])], ord(end[0]), None):
        model.generation_config.eos_token_id = named
        tokenizer.eos_id = None if named else ord(end[0])
        _, (answer,) = talk(Chat(model, tokenizer), QUESTIONS[:1])
        assert (answer.text, answer.generated) == (whole.text[:first], first + 1)


def test_ctrl_c_ends_an_answer():
    chat = Chat(ascii_model(), load_tokenizer("bytes"))
    _, (whole,) = talk(chat, QUESTIONS[:1])
    received = []

    def listen(text: str) -> None:
        received.append(text)
        if len(received) == 3:
            raise KeyboardInterrupt

    answer = chat.answer(MESSAGES, listen, max_new_tokens=12, greedy=True)
    assert answer.interrupted and answer.text == whole.text[:3] == "".join(received)
    messages = [*MESSAGES, {"role": "assistant", "content": answer.text}]
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
    with pytest.raises(
        ValueError, match="expected a conversation, as `hqlt chat` saves it, got a state without messages"
    ):
        chat.load(tmp_path / "state")


def test_whether_a_template_supports_a_system_message(tmp_path):
    for template, supported in (
        (CHATML, True),
        (None, True),
        ("{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}", False),
        ("{{ raise_exception('no') if messages[0].role == 'system' else 'a' }}", False),
    ):
        size = save_chat_tokenizer(tmp_path, template)
        assert Chat(build(vocab_size=size), model_tokenizer(tmp_path)).supports_system() == supported
