"""The API, used by OpenAI's own client."""

from __future__ import annotations

import time

import httpx
import openai
import pytest
import torch

from hqlt.data import load_tokenizer
from hqlt.data.tokenizer import model_tokenizer
from hqlt.language import generation
from hqlt.language.template import chat_tokens
from hqlt.serve.service import Limits
from tests.language.conftest import CHATML, build, save_chat_tokenizer
from tests.serve.conftest import served

MODEL = build()
MODEL.lm_head.weight.data[[*range(32), *range(127, 256)]] = 0  # greedy text is printable
QUESTION = {"role": "user", "content": "Where is the Louvre?"}


@pytest.fixture(scope="module")
def url():
    with served(MODEL, limits=Limits(max_body=100_000, max_prompt=10_000, max_tokens=1000, timeout=60)) as url:
        yield url


@pytest.fixture(scope="module")
def client(url):
    with client_of(url) as client:
        yield client


def client_of(url, key="none"):
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=60)


def alone(prompt: bytes, tokens: int) -> str:
    new, _ = generation.continue_text(MODEL, generation.prefill(MODEL, prompt), max_new_tokens=tokens, greedy=True)
    return bytes(new[0].tolist()).decode(errors="replace")


def test_completions(client):
    answer = client.completions.create(model="small", prompt="once upon", max_tokens=9, temperature=0)
    assert answer.choices[0].text == alone(b"once upon", 9)
    assert answer.choices[0].finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (9, 9, 18)
    by_tokens = client.completions.create(model="small", prompt=list(b"once upon"), max_tokens=9, temperature=0)
    assert by_tokens.choices[0].text == answer.choices[0].text
    chunks = list(
        client.completions.create(model="small", prompt=["once upon"], max_tokens=9, temperature=0, stream=True)
    )
    assert "".join(chunk.choices[0].text for chunk in chunks) == answer.choices[0].text
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "length"


def test_chat_turns_read_only_new_tokens(client):
    messages = [{"role": "system", "content": "You know Paris."}, QUESTION]
    cached = []
    for _ in range(3):
        answer = client.chat.completions.create(model="small", messages=messages, max_tokens=7, temperature=0)
        cached.append(answer.usage.prompt_tokens_details.cached_tokens)
        read = answer.usage.total_tokens - 1  # all except the last token of the answer
        messages += [answer.choices[0].message.to_dict(), QUESTION]
    assert cached[0] == 0
    assert cached[1] > len("You know Paris.") + len(QUESTION["content"]) + 7
    assert cached[2] > cached[1] + len(QUESTION["content"]) + 7
    assert read > cached[2]
    other = [messages[0], {"role": "user", "content": "Another question"}]
    answer = client.chat.completions.create(model="small", messages=other, max_tokens=1)
    assert answer.usage.prompt_tokens_details.cached_tokens == len("You know Paris.\n\n")


def test_chat_as_a_stream(client):
    options = {"model": "small", "messages": [QUESTION], "max_completion_tokens": 12, "n": 2, "seed": 5}
    whole = client.chat.completions.create(**options)
    assert [choice.index for choice in whole.choices] == [0, 1]
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    texts, roles, reasons = ["", ""], [None, None], [None, None]
    for chunk in chunks[:-1]:
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        roles[choice.index] = roles[choice.index] or choice.delta.role
        reasons[choice.index] = choice.finish_reason
    assert texts == [choice.message.content for choice in whole.choices]
    assert (roles, reasons) == (["assistant"] * 2, [choice.finish_reason for choice in whole.choices])
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_stop_strings_end_a_text_and_are_not_part_of_it(client):
    text = alone(b"text", 200)
    stop = text[50:54]
    for options in ({}, {"stream": True}):
        answer = client.completions.create(
            model="small", prompt="text", max_tokens=200, temperature=0, stop=["never", stop], **options
        )
        choices = [chunk.choices[0] for chunk in answer] if options else answer.choices
        assert "".join(choice.text for choice in choices) == text[: text.index(stop)]
        assert choices[-1].finish_reason == "stop"


def test_log_probabilities(client):
    logp = MODEL(torch.tensor([list(b"abc")])).logits[0, -1].detach().log_softmax(-1)
    answer = client.completions.create(model="small", prompt="abc", max_tokens=1, temperature=0, logprobs=2)
    assert answer.choices[0].logprobs.token_logprobs == [pytest.approx(float(logp.max()), abs=1e-9)]
    prompt = chat_tokens(load_tokenizer("bytes"), [QUESTION])
    logp = MODEL(torch.tensor([prompt])).logits[0, -1].detach().log_softmax(-1)
    answer = client.chat.completions.create(
        model="small", messages=[QUESTION], max_tokens=1, temperature=0, logprobs=True, top_logprobs=3
    )
    (entry,) = answer.choices[0].logprobs.content
    assert [top.logprob for top in entry.top_logprobs] == pytest.approx(logp.topk(3).values.tolist(), abs=1e-9)
    assert entry.logprob == entry.top_logprobs[0].logprob
    none = client.chat.completions.create(model="small", messages=[QUESTION], max_tokens=1)
    assert none.choices[0].logprobs is None


def test_models(client):
    assert [model.id for model in client.models.list()] == ["small"]
    assert client.models.retrieve("small").owned_by == "hqlt"
    with pytest.raises(openai.NotFoundError, match="expected 'small', the model of this server, got 'other'"):
        client.models.retrieve("other")


CHAT = {"model": "small", "messages": [QUESTION]}
INVALID = [
    ({"tools": [{"type": "function"}]}, 400, "tools: not supported by this server; supported: model, n, max_tokens"),
    ({"frequency_penalty": 1}, 400, "frequency_penalty: not supported"),
    ({"response_format": {"type": "json_object"}}, 400, "response_format: not supported"),
    ({"nonsense": 1}, 400, "nonsense: not supported"),
    ({"temperature": 3}, 400, "temperature: Input should be less than or equal to 2"),
    ({"top_p": 0}, 400, "top_p: Input should be greater than 0"),
    ({"n": 33}, 400, "n: expected 1 to 32 continuations, got 33"),
    ({"max_tokens": 1001}, 400, "max_tokens: expected 1 to 1,000 tokens, got 1,001"),
    ({"messages": []}, 400, "messages: List should have at least 1 item"),
    ({"messages": [{"role": "tool", "content": "x"}]}, 400, "messages.0.role: Input should be 'system'"),
    (
        {"messages": [{"role": "user", "content": "x" * 10_000}]},
        400,
        "messages: expected 1 to 10,000 tokens of a prompt",
    ),
    ({"messages": [{"role": "user", "content": "x" * 100_000}]}, 413, "at most 100,000 bytes"),
    ({"model": "gpt"}, 404, "model: expected 'small', the model of this server, got 'gpt'"),
    ({"stop": [""]}, 400, "stop"),
]


@pytest.mark.parametrize(("wrong", "status", "message"), INVALID)
def test_unsupported_and_invalid_fields_are_refused_by_name(client, wrong, status, message):
    with pytest.raises(openai.APIStatusError) as error:
        client.post("/chat/completions", body=CHAT | wrong, cast_to=object)
    assert error.value.status_code == status
    assert message in error.value.body["message"]
    assert error.value.body.keys() == {"message", "type", "param", "code"}
    assert status == 413 or error.value.body["param"].partition(".")[0] == next(iter(wrong))


def test_unsupported_fields_without_effect_are_accepted(client):
    neutral = {"frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "tools": None, "user": "someone"}
    client.chat.completions.create(**CHAT, max_tokens=1, **neutral, response_format={"type": "text"})
    parts = [{"role": "developer", "content": "Be kind."}, {"role": "user", "content": [{"type": "text", "text": "a"}]}]
    client.chat.completions.create(model="small", messages=parts, max_tokens=1)
    with pytest.raises(openai.BadRequestError, match="prompt: expected tokens from 0 to 255"):
        client.completions.create(model="small", prompt=[256])
    with pytest.raises(openai.BadRequestError, match="prompt: expected 1 to 10,000 tokens of a prompt, got 0"):
        client.completions.create(model="small", prompt="")


def test_the_chat_template_and_end_token_of_the_tokenizer(tmp_path):
    size = save_chat_tokenizer(tmp_path, CHATML)
    tokenizer = model_tokenizer(tmp_path)
    model = build(vocab_size=size)
    prompt = chat_tokens(tokenizer, [QUESTION])
    new, _ = generation.continue_text(model, generation.prefill(model, prompt), max_new_tokens=30, greedy=True)
    model.lm_head.weight.data[tokenizer.eos_id] = model.lm_head.weight.data[new[0, 5]] * 1.01
    with served(model, tokenizer) as url, client_of(url) as client:
        answer = client.chat.completions.create(**CHAT, max_tokens=30, temperature=0)
    assert answer.usage.prompt_tokens == len(prompt)
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens < 30


def test_keys_separate_stored_states():
    def ask(url, key):
        body = {"model": "small", "prompt": "a prompt of someone", "max_tokens": 1}
        return httpx.post(f"{url}/v1/completions", json=body, headers={"Authorization": f"Bearer {key}".encode()})

    for shared, found in ((False, 0), (True, 18)):
        with served(MODEL, keys=["one", "öther"], shared_prefixes=shared) as url:
            for key, cached in (("one", 0), ("one", 18), ("öther", found)):
                assert ask(url, key).json()["usage"]["prompt_tokens_details"]["cached_tokens"] == cached
            for wrong in ("tow", "on", "onee"):
                response = ask(url, wrong)
                assert response.status_code == 401
                assert "expected a valid API key" in response.json()["error"]["message"]
            assert httpx.get(f"{url}/metrics").status_code == 401
            assert httpx.get(f"{url}/health").json()["status"] == "ok"


def test_too_many_and_too_slow_requests():
    limits = Limits(max_tokens=1_000_000, timeout=1.0)
    with served(MODEL, max_batch_size=1, max_queue=1, limits=limits) as url, client_of(url) as client:
        endless = {"model": "small", "prompt": "a", "max_tokens": 1_000_000, "temperature": 0}
        stream = client.completions.create(**endless, stream=True)
        next(stream)
        waiting = client.completions.create(**endless, stream=True)
        with pytest.raises(openai.RateLimitError, match="1 requests are waiting already"):
            client.completions.create(**endless)
        with pytest.raises(openai.APIError, match="longer than allowed"):
            list(stream)
        with pytest.raises(openai.APIError, match="longer than allowed"):
            list(waiting)
        begun = time.monotonic()
        with pytest.raises(openai.APIStatusError, match="longer than allowed") as error:
            client.completions.create(**endless)
        assert error.value.status_code == 408
        assert 0.9 < time.monotonic() - begun < 10
