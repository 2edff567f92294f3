"""The prefix store: continuing after a hit equals reading the whole text, and no lookup returns a foreign state."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hqlt.model import HQLTCache, HQLTConfig, HQLTForCausalLM
from hqlt.state import PrefixStore, prefixes
from tests.laws import close
from tests.model.conftest import KINDS, SMALL

MORE: dict[str, dict[str, Any]] = {
    "retention": {"retention": "surprise", "kept": 3, "sinks": 1},
    "full attention": {"window": None},
    "kda": {"fast_weights": "kda", "blend": "delayed-chunk", "conv_size": 3},
    "mamba2": {"fast_weights": "mamba2", "layer_kinds": ["fw", "kv"]},
}
BUILT: dict[str, HQLTForCausalLM] = {}


def build(kind: str = "synchronous", seed: int = 0) -> HQLTForCausalLM:
    torch.manual_seed(seed)
    return HQLTForCausalLM(HQLTConfig(**{**SMALL, **(KINDS | MORE)[kind]})).double().eval()


@pytest.fixture(params=KINDS | MORE)
def model(request):
    return BUILT.setdefault(request.param, build(request.param))


@pytest.fixture
def one():
    return BUILT.setdefault("synchronous", build())


def read(model, tokens, cache=None):
    """Logits of the tokens that the cache has not read, and the cache after them."""
    cache = HQLTCache() if cache is None else cache
    with torch.no_grad():
        out = model(torch.tensor([tokens[cache.seen_tokens :]]), past_key_values=cache)
    return out.logits[0], cache


def put(store, model, tokens, salt=""):
    store.put(tokens, read(model, tokens)[1].states, salt)


@st.composite
def trees(draw):
    """Prompts, each of which continues a prefix of an earlier one."""
    texts = [draw(st.lists(st.integers(1, 22), min_size=1, max_size=9))]
    for _ in range(draw(st.integers(1, 4))):
        stem = draw(st.sampled_from(texts))
        more = draw(st.lists(st.integers(1, 2), min_size=1, max_size=6))
        texts.append(stem[: draw(st.integers(0, len(stem)))] + more)
    return texts


@given(texts=trees())
def test_continuing_after_a_hit_equals_reading_the_whole_text(model, texts):
    """As a server does for every prompt of a random tree: continue from the store, then store the new state."""
    store = PrefixStore(model)
    stored: list[list[int]] = []
    for text in texts:
        longest = max((len(stem) for stem in stored if len(stem) < len(text) and text[: len(stem)] == stem), default=0)
        cache = store.cache_for(text)
        assert cache.seen_tokens == longest
        logits, cache = read(model, text, cache)
        close(logits, read(model, text)[0][longest:])
        store.put(text, cache.states)
        stored.append(text)
    assert store.statistics.entries == len(set(map(tuple, stored)))


def test_generate_returns_the_same_text(model):
    store, prompt = PrefixStore(model), torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5]])
    put(store, model, prompt[0, :6].tolist())
    cache = store.cache_for(prompt)
    assert cache.seen_tokens == 6
    options = {"max_new_tokens": 12, "do_sample": False}
    text = model.generate(prompt, past_key_values=cache, **options)
    assert text.tolist() == model.generate(prompt, **options).tolist()
    store.put(text[:, :-1], cache.states)
    turn = torch.cat([text, torch.tensor([[7, 8]])], dim=1)
    again = store.cache_for(turn)
    assert again.seen_tokens == text.shape[1] - 1
    assert model.generate(turn, past_key_values=again, **options).tolist() == model.generate(turn, **options).tolist()


def test_at_least_one_token_is_left_to_read(one):
    store = PrefixStore(one)
    put(store, one, [1, 2, 3])
    put(store, one, [1, 2])
    assert [store.find(text).length for text in ([], [1], [1, 2], [1, 2, 3], [1, 2, 3, 4], [1, 2, 4])] == [
        0, 0, 0, 2, 3, 2,
    ]  # fmt: skip
    assert store.statistics[:3] == (3, 3, 2)
    assert store.find([2, 2, 3, 4]) == (0, ())


def test_states_of_another_salt_are_not_found(one):
    store = PrefixStore(one)
    put(store, one, [1, 2, 3], "mine")
    for salt in ("", "yours", "mine ", "mine\0"):
        assert store.find([1, 2, 3, 4], salt).length == 0
    assert store.find([1, 2, 3, 4], "mine").length == 3


def test_invalid_states_and_tokens_are_refused(one):
    store, states = PrefixStore(one), read(one, [1, 2, 3])[1].states
    with pytest.raises(
        ValueError, match="expected states that have read the 4 tokens given, got states that have read 3"
    ):
        store.put([1, 2, 3, 4], states)
    with pytest.raises(ValueError, match="expected 2, one per layer, got 1"):
        store.put([1, 2, 3], states[:1])
    with pytest.raises(ValueError, match="a batch of 1, got"):
        store.put([1, 2, 3], [state.repeat(2) for state in states])
    with pytest.raises(ValueError, match=r"expected one text, \[t\] or \[1, t\], got shape \[2, 3\]"):
        store.find(torch.ones(2, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="expected a language model of hqlt, got a Linear without"):
        PrefixStore(torch.nn.Linear(1, 1))
    store.put([], one(torch.ones(1, 0, dtype=torch.long), use_cache=True).past_key_values.states)
    assert store.statistics.entries == 0


def test_the_least_recently_used_are_evicted_first(one):
    size = sum(state.bytes_per_row() for state in read(one, [1])[1].states)
    store = PrefixStore(one, max_bytes=3 * size)
    for token in (1, 2, 3):
        put(store, one, [token])
    assert store.statistics.bytes == 3 * size
    assert store.find([1, 0]).length == 1
    put(store, one, [2])  # counts as a use
    put(store, one, [4, 4])
    assert [store.find([token] * 3).length for token in (1, 2, 3, 4)] == [1, 1, 0, 2]
    assert (store.statistics.entries, store.statistics.bytes) == (3, 3 * size)
    small = PrefixStore(one, max_bytes=size - 1)
    put(small, one, [1])
    assert small.statistics == (0, 0, 0, 0)
    assert not small._prefixes


def test_a_row_of_a_batch_does_not_keep_the_batch_in_memory(one):
    cache = one(torch.ones(64, 3, dtype=torch.long), use_cache=True).past_key_values
    store = PrefixStore(one)
    store.put([1, 1, 1], [state.map(lambda x: x[:1]) for state in cache.states])
    (entry,) = store._entries.values()
    whole = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in entry.tensors.values()}
    assert sum(whole.values()) == entry.bytes
    assert len(whole) == len({x.dtype for x in entry.tensors.values()})
    assert not any(x.requires_grad for x in entry.tensors.values())


def test_many_threads(one):
    size = sum(state.bytes_per_row() for state in read(one, [1])[1].states)
    store, start = PrefixStore(one, max_bytes=5 * size), threading.Barrier(4)
    states = {n: read(one, [n % 20] * n)[1].states for n in range(1, 9)}

    def work(seed):
        start.wait()
        for i in range(200):
            n = 1 + (seed + i) % 8
            store.put([n % 20] * n, states[n], str(i % 2))
            found = store.find([n % 20] * (n + 1), str(i % 2))
            assert not found.length or found.states[0].position.item() == found.length == n

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    count = store.statistics
    assert (count.hits + count.misses, count.bytes) == (800, count.entries * size)
    assert count.entries <= 5


def test_texts_with_equal_hashes_are_distinguished(one, monkeypatch):
    """An adversary could construct hash collisions."""
    monkeypatch.setattr(prefixes, "BASE", 0)
    store = PrefixStore(one)
    for text in ([1], [2], [1, 3], [2, 2, 2]):
        put(store, one, text)
    assert [store.find([*text, 4]).length for text in ([1], [3], [1, 3], [1, 4, 3], [2, 2], [2, 2, 2])] == [
        1, 0, 2, 1, 1, 3,
    ]  # fmt: skip


def test_every_prefix_has_a_hash():
    hashes = prefixes.prefix_hashes(prefixes.token_ids([0, 0, 5, 5]))
    assert len(set(hashes)) == 4
    assert prefixes.prefix_hashes(prefixes.token_ids([0, 0, 5, 4]))[:3].tolist() == hashes[:3].tolist()
    assert prefixes.prefix_hashes(prefixes.token_ids([])).tolist() == []
    base = prefixes.BASE
    assert hashes[2] == (base + base**2 + 6 * base**3) % 2**64


def test_keys_depend_on_model_and_dtype():
    owners = [PrefixStore(model)._owner("") for model in (build(), build(seed=1), build().float())]
    assert len(set(owners)) == 3
    assert owners[0] == PrefixStore(build())._owner("")
