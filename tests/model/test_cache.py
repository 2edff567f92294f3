from __future__ import annotations

import copy

import pytest
import torch

from hqlt.model import HQLTCache


def same(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@pytest.fixture
def cache(model, tokens) -> HQLTCache:
    with torch.no_grad():
        return model(tokens[:, :7], use_cache=True).past_key_values


@torch.no_grad()
def test_rows_reordered_selected_and_repeated(model, tokens, cache):
    """Every part of every state follows: what comes after equals what the whole sequences would have given."""
    for change, rows in (
        (lambda c: c.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
        (lambda c: c.batch_select_indices(torch.tensor([1])), [1]),
        (lambda c: c.batch_select_indices(torch.tensor([True, False, True])), [0, 2]),
        (lambda c: c.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    ):
        changed = cache.fork()
        change(changed)
        assert changed.batch_size == len(rows)
        whole = model(tokens[rows]).logits[:, 7:]
        same(model(tokens[rows, 7:], past_key_values=changed).logits, whole)


@torch.no_grad()
def test_forks_do_not_touch_each_other(model, tokens, cache):
    fork, deep = cache.fork(), copy.deepcopy(cache)
    model(tokens[:, :4], past_key_values=cache)
    assert (cache.get_seq_length(), fork.get_seq_length()) == (11, 7)
    for kept in (fork, deep):
        same(model(tokens[:, 7:], past_key_values=kept).logits, model(tokens).logits[:, 7:])


@torch.no_grad()
def test_to_and_from_states(model, tokens, cache):
    again = HQLTCache.from_states(cache.states)
    assert (len(again), again.get_seq_length(), again.batch_size) == (model.config.num_hidden_layers, 7, 3)
    same(model(tokens[:, 7:], past_key_values=again).logits, model(tokens).logits[:, 7:])
    with pytest.raises(TypeError, match="expected one MemoryState for each layer, got a Tensor"):
        HQLTCache.from_states([torch.zeros(1)])


@torch.no_grad()
def test_reset_empties_the_memories(one_model, tokens):
    cache = one_model(tokens, use_cache=True).past_key_values
    cache.reset()
    assert (len(cache), cache.get_seq_length(), cache.batch_size, cache.is_initialized) == (0, 0, -1, False)
    same(one_model(tokens, past_key_values=cache).logits, one_model(tokens).logits)


def test_tokens_cannot_be_taken_back(one_model, tokens):
    cache = one_model(tokens, use_cache=True).past_key_values
    cache.crop(0)
    assert cache.get_seq_length() == 11
    with pytest.raises(
        ValueError, match=r"crop: .* got -3: fast weights cannot take tokens back\. Keep `cache\.fork\(\)`"
    ):
        cache.crop(-3)
    with pytest.raises(ValueError, match="got 5"):
        cache.crop(5)
    cache.crop(-11)
    assert cache.get_seq_length() == 0


def test_not_for_attention_layers_of_transformers():
    with pytest.raises(TypeError, match="serves hqlt's models only"):
        HQLTCache().update(torch.zeros(1), torch.zeros(1), 0)


def test_what_transformers_asks(one_model, tokens):
    cache = HQLTCache()
    assert not cache.has_previous_state()
    assert not cache.is_compileable
    assert not cache.is_croppable
    one_model(tokens, past_key_values=cache)
    assert cache.get_mask_sizes(2, 0) == (13, 0)
    assert cache.get_max_length() == -1
    assert repr(cache) == "HQLTCache(layers=2, batch_size=3, seen_tokens=11)"
