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
    """All parts of all states are reordered: continuing equals reading the reordered sequences from the start."""
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
def test_forks_are_independent(model, tokens, cache):
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
    with pytest.raises(TypeError, match="expected one MemoryState per layer, got a Tensor"):
        HQLTCache.from_states([torch.zeros(1)])


@torch.no_grad()
def test_attention_mask_is_reordered_with_the_rows(one_model, tokens):
    mask = (torch.arange(11) >= torch.tensor([0, 7, 4])[:, None])[:, :11]
    cache = one_model(tokens, attention_mask=mask, use_cache=True).past_key_values
    for change, rows in (
        (lambda c: c.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
        (lambda c: c.batch_select_indices(torch.tensor([False, True, True])), [1, 2]),
        (lambda c: c.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    ):
        changed = cache.fork()
        change(changed)
        assert torch.equal(changed.attention_mask, mask[rows])
    assert torch.equal(cache.attention_mask, mask)
    cache.reset()
    assert cache.attention_mask is None


@torch.no_grad()
def test_states_without_a_mask_trust_the_first_mask(one_model, tokens):
    mask = torch.arange(11) >= torch.tensor([0, 7, 4])[:, None]
    whole = torch.cat([mask, torch.ones(3, 2, dtype=torch.bool)], dim=1)
    states = one_model(tokens, attention_mask=mask, use_cache=True).past_key_values.states
    with_mask = HQLTCache.from_states(states, attention_mask=mask)
    assert (with_mask.seen_tokens, with_mask.attention_mask is not None) == (11, True)
    with pytest.raises(ValueError, match="Column 0 of row 1 was read as padding"):
        one_model(tokens[:, :2], attention_mask=torch.ones_like(whole), past_key_values=with_mask)
    believing = HQLTCache.from_states(states, seen_tokens=11)
    assert believing.attention_mask is None
    one_model(tokens[:, :2], attention_mask=whole, past_key_values=believing)
    assert torch.equal(believing.attention_mask, whole)
    with pytest.raises(ValueError, match=r"expected \[b, seen_tokens\] = \[3, 9\], got \[3, 11\]"):
        HQLTCache.from_states(states, 9, mask)


@torch.no_grad()
def test_reset_empties_the_memories(one_model, tokens):
    cache = one_model(tokens, use_cache=True).past_key_values
    cache.reset()
    assert (len(cache), cache.get_seq_length(), cache.batch_size, cache.is_initialized) == (0, 0, -1, False)
    same(one_model(tokens, past_key_values=cache).logits, one_model(tokens).logits)


def test_crop_needs_rollback(one_model, tokens):
    cache = one_model(tokens, use_cache=True).past_key_values
    cache.crop(0)
    assert cache.get_seq_length() == 11
    with pytest.raises(ValueError, match=r"crop: .* got -3: rollback is 0, and a matrix .* HQLTCache\(rollback=n\)"):
        cache.crop(-3)
    with pytest.raises(ValueError, match="got 5"):
        cache.crop(5)
    cache.crop(-11)
    assert cache.get_seq_length() == 0


def test_update_by_an_attention_layer_is_refused():
    with pytest.raises(TypeError, match="works with hqlt's models only"):
        HQLTCache().update(torch.zeros(1), torch.zeros(1), 0)


def test_interface_of_transformers(one_model, tokens):
    cache = HQLTCache()
    assert not cache.has_previous_state()
    assert not cache.is_compileable
    assert not cache.is_croppable
    one_model(tokens, past_key_values=cache)
    assert cache.get_mask_sizes(2, 0) == (13, 0)
    assert cache.get_max_length() == -1
    assert repr(cache) == "HQLTCache(layers=2, batch_size=3, seen_tokens=11)"
