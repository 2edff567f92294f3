"""Requests do not affect each other: not their texts, nor their errors, nor their states."""

from __future__ import annotations

import random
import threading
import time

import pytest
import torch

from hqlt.language import generation
from hqlt.serve.request import DeadlineExceeded, EngineClosed, QueueFull
from hqlt.state import PrefixStore
from tests.language.conftest import build
from tests.serve.conftest import ask, running


def prompts(n, longest=40):
    draw = random.Random(1)
    return [[draw.randrange(256) for _ in range(draw.randint(1, longest))] for _ in range(n)]


def alone(model, prompt, tokens):
    """The continuation by `hqlt generate`."""
    new, _ = generation.continue_text(model, generation.prefill(model, prompt), max_new_tokens=tokens, greedy=True)
    return new[0].tolist()


def test_greedy_text_does_not_depend_on_31_other_requests(model):
    texts = prompts(32)
    with running(model, prefill_chunk=16) as engine:
        listeners = [ask(engine, text, max_tokens=5 + i % 9) for i, text in enumerate(texts)]
        for i, its in enumerate(listeners):
            its.wait()
            assert (its.error, its.reasons) == (None, ["length"])
            assert its.tokens[0] == alone(model, texts[i], 5 + i % 9)


@pytest.mark.parametrize(
    "fields",
    [
        {"retention": "surprise", "kept": 3, "sinks": 1},
        {"fast_weights": "gated-delta", "conv_size": 3},
        {"fast_weights": "mamba2", "mixer": "scalar"},
        {"num_kv_heads": 1, "retention": "value-norm", "kept": 2},
    ],
)
def test_other_memories_in_a_batch(fields):
    model, texts = build(**fields), prompts(8)
    with running(model, prefill_chunk=16) as engine:
        for text, its in [(text, ask(engine, text)) for text in texts]:
            assert its.wait().tokens[0] == alone(model, text, 12)


def test_greedy_text_in_a_batch_in_float32():
    model = build().float()
    texts = prompts(12)
    with running(model) as engine:
        for text, its in [(text, ask(engine, text)) for text in texts]:
            assert its.wait().tokens[0] == alone(model, text, 12)


def test_a_seed_gives_the_same_text_in_a_batch(small):
    options = {"temperature": 0.9, "top_p": 0.8, "seed": 3, "n": 3}
    with running(small) as engine:
        one = ask(engine, b"once", **options).wait()
        others = [ask(engine, text, temperature=1.3, max_tokens=40) for text in prompts(9)]
        again = ask(engine, b"once", **options).wait()
        other_seed = ask(engine, b"once", **options | {"seed": 4}).wait()
    assert one.tokens == again.tokens != other_seed.tokens
    assert len({tuple(tokens) for tokens in one.tokens}) == 3
    assert all(its.done.is_set() for its in others) or any(its.error for its in others)


def test_turns_resume_from_stored_states(model):
    with running(model, prefill_chunk=8) as engine:
        first = ask(engine, b"a long first question", max_tokens=6).wait()
        history = [*b"a long first question", *first.tokens[0]]
        second = ask(engine, [*history, *b" and more"], max_tokens=6).wait()
        foreign = ask(engine, [*history, *b" and more"], max_tokens=6, salt="another").wait()
    assert first.cached == 0
    assert second.cached == len(history) - 1  # the last token of an answer is not read
    assert foreign.cached == 0
    assert second.tokens == foreign.tokens == [alone(model, [*history, *b" and more"], 6)]


def test_a_shared_prefix_is_read_once(small):
    with running(small) as engine:
        ask(engine, b"system: be kind. user: hello", checkpoints=(16,)).wait()
        other = ask(engine, b"system: be kind. user: good morning", checkpoints=(16,)).wait()
    assert other.cached == 16


def test_a_long_prompt_does_not_stall_other_requests(small):
    with running(small, prefill_chunk=8) as engine:
        long = ask(engine, [7] * 4000, max_tokens=1)
        short = ask(engine, b"short", max_tokens=20).wait()
        assert not long.first.is_set()
        assert len(short.tokens[0]) == 20
        long.request.cancel()


def test_requests_wait_for_rows_until_the_queue_is_full(small):
    gate = threading.Event()
    with running(small, max_batch_size=2, max_queue=3) as engine:
        slow = [ask(engine, b"a", at=lambda count: gate.wait(60) and False) for _ in range(2)]
        while engine.running < 2:
            time.sleep(0.001)
        waiting = [ask(engine, b"b", max_tokens=2) for _ in range(3)]
        with pytest.raises(QueueFull, match="3 requests are waiting already"):
            ask(engine, b"c")
        assert engine.waiting == 3
        gate.set()
        assert {reason for its in slow + waiting for reason in its.wait().reasons} == {"length"}
        with pytest.raises(ValueError, match="1 to 2 continuations, got 1 tokens and 3"):
            ask(engine, b"c", n=3)
        with pytest.raises(ValueError, match="at least one token"):
            ask(engine, b"")


def test_a_failing_request_does_not_affect_others(small, caplog):
    texts = [[token % 100 for token in text] for text in prompts(6)]
    real, poison = small.model.forward, 200

    def fails(count):
        if count == 3:
            raise RuntimeError("error of this listener")

    def forward(tokens, **kwargs):
        if tokens.shape[1] == 1 and (tokens == poison).any():
            raise RuntimeError("error of this row")
        return real(tokens, **kwargs)

    expected = [alone(small, text, 12) for text in texts]
    small.model.forward = forward
    with running(small) as engine:
        failing, poisoned = ask(engine, b"x", at=fails), ask(engine, [5, poison])
        listeners = [ask(engine, text) for text in texts]
        assert "error of this listener" in str(failing.wait().error)
        assert "error of this row" in str(poisoned.wait().error)
        for greedy, its in zip(expected, listeners, strict=True):
            until = greedy.index(poison) + 1 if poison in greedy else len(greedy)
            assert its.wait().tokens[0] == greedy[:until]
        while engine.running:
            time.sleep(0.001)
    assert caplog.text.count("a request failed") >= 2


def test_a_request_with_non_finite_logits_fails(small, caplog):
    small.lm_head.weight.data[3] = float("nan")
    with running(small) as engine:
        assert isinstance(ask(engine, b"a").wait().error, FloatingPointError)
        assert engine.store.statistics.entries == 0
    assert "not finite" in caplog.text


def test_a_cancelled_request_frees_its_row_and_stores_its_state(small):
    with running(small, max_batch_size=1) as engine:
        first = ask(engine, b"to be cancelled", max_tokens=100_000)
        assert first.first.wait(60)
        waiting = ask(engine, b"never started", max_tokens=100_000)
        waiting.request.cancel()
        first.request.cancel()
        assert ask(engine, b"next").wait().reasons == ["length"]
        generated = list(first.tokens[0])
        assert not first.done.is_set()
        assert (
            ask(engine, [*b"to be cancelled", *generated, 1], max_tokens=1).wait().cached >= len(b"to be cancelled") - 1
        )
    assert not waiting.first.is_set()


def test_deadlines(small):
    with running(small, max_batch_size=1) as engine:
        late = ask(engine, b"a", max_tokens=100_000, deadline=time.monotonic() + 0.2)
        waits = ask(engine, b"b", deadline=time.monotonic() + 0.1)
        assert isinstance(late.wait().error, DeadlineExceeded)
        assert isinstance(waits.wait().error, DeadlineExceeded)
        assert late.tokens[0]
        assert not waits.tokens[0]


def test_closing_stores_the_states(small):
    store = PrefixStore(small)
    with running(small, store, max_batch_size=1, prefill_chunk=4) as engine:
        runs, waits = ask(engine, b"running", max_tokens=100_000), ask(engine, b"waiting")
        assert runs.first.wait(60)
    assert isinstance(runs.wait().error, EngineClosed)
    assert isinstance(waits.wait().error, EngineClosed)
    assert store.find([*b"running", *runs.tokens[0]]).length == len(b"running") + len(runs.tokens[0]) - 1
    with pytest.raises(EngineClosed):
        ask(engine, b"too late")


def test_end_tokens_and_log_probabilities(small):
    greedy = alone(small, b"text", 12)
    with running(small) as engine:
        listener = ask(engine, b"text", end_tokens=(greedy[4],), logprobs=2).wait()
        by_listener = ask(engine, b"text", at=lambda count: count == 3).wait()
    first = greedy.index(greedy[4])
    assert (listener.tokens[0], listener.reasons) == (greedy[:first], ["stop"])
    assert (by_listener.tokens[0], by_listener.reasons) == (greedy[:3], ["stop"])
    logp = small(torch.tensor([list(b"text")])).logits[0, -1].detach().log_softmax(-1)
    assert listener.logprobs[0].logprob == pytest.approx(float(logp[greedy[0]]), abs=1e-10)
    assert [id for id, _ in listener.logprobs[0].top] == logp.topk(2).indices.tolist()


def test_growing_buffers_shrink_when_the_longest_row_leaves():
    model = build(layer_kinds=["kv", "kv"])
    with running(model) as engine:
        long = ask(engine, [1] * 300, max_tokens=3)
        short = ask(engine, [2] * 3, max_tokens=40)
        long.wait()
        short.wait()
        assert short.tokens[0] == alone(model, [2] * 3, 40)
        found = engine.store.find([*[2] * 3, *short.tokens[0]])
    assert [state.slots for state in found.states] == [42, 42]
