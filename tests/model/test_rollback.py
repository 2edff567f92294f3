"""Rollback: after a crop, everything is as if the removed tokens had never been read."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hqlt import registry
from hqlt.model import HQLTCache, HQLTConfig, HQLTForCausalLM
from hqlt.model.cache import CACHE
from tests.model.conftest import KINDS, SMALL


def same(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def built(**fields) -> HQLTForCausalLM:
    torch.manual_seed(0)
    return HQLTForCausalLM(HQLTConfig(**{**SMALL, **fields})).double().eval()


OTHERS = {
    **{f"rule {name}": {"fast_weights": name} for name in registry.names("rule")},
    "surprise": {"retention": "surprise", "kept": 3, "sinks": 1},
    "value norm": {"retention": "value-norm", "kept": 3, "kept_positions": "clamped"},
}
MODELS: dict[str, HQLTForCausalLM] = {}


def model_of(name: str) -> HQLTForCausalLM:
    if name not in MODELS:
        MODELS[name] = built(**{**KINDS, **OTHERS}[name])
    return MODELS[name]


@pytest.mark.parametrize("name", [*KINDS, *OTHERS])
@settings(max_examples=8)
@given(
    rollback=st.integers(1, 9),
    calls=st.lists(st.tuples(st.integers(1, 12), st.integers(0, 9)), min_size=1, max_size=6),
    padded=st.booleans(),
)
@torch.no_grad()
def test_cropped_tokens_leave_no_trace(name, rollback, calls, padded):
    """Some tokens are removed after each call: the logits of every call are those of the remaining text."""
    model = model_of(name)
    generator = torch.Generator().manual_seed(0)
    cache, text = HQLTCache(rollback=rollback), torch.zeros(2, 0, dtype=torch.long)
    pad = 3 if padded else 0  # columns of the first row
    furthest = 0
    for length, taken_back in calls:
        text = torch.cat([text, torch.randint(1, 23, (2, length), generator=generator)], dim=1)
        mask = torch.ones_like(text)
        mask[0, :pad] = 0
        given_mask = mask if padded else None
        logits = model(text[:, -length:], attention_mask=given_mask, past_key_values=cache).logits
        whole = model(text, attention_mask=given_mask).logits[:, -length:]
        same(logits[mask[:, -length:].bool()], whole[mask[:, -length:].bool()])
        furthest = max(furthest, text.shape[1])
        taken_back = min(taken_back, text.shape[1] - max(furthest - rollback, 0))
        cache.crop(-taken_back)
        text = text[:, : text.shape[1] - taken_back]
        assert cache.seen_tokens == cache.get_seq_length() == text.shape[1]


@torch.no_grad()
def test_segments_that_begin_in_the_removed_part(one_model, tokens):
    resets = torch.zeros(3, 11, dtype=torch.bool)
    resets[0, 7] = resets[2, 4] = True
    for marks in ({"resets": resets}, {"position_ids": torch.where(resets, 0, 1 + torch.arange(11))}):
        cache = HQLTCache(rollback=8)
        one_model(tokens, past_key_values=cache, **marks)
        cache.crop(-2)
        same(one_model(tokens[:, 9:], past_key_values=cache).logits, one_model(tokens, **marks).logits[:, 9:])


@torch.no_grad()
def test_rows_forks_and_copies(one_model, tokens):
    cache = HQLTCache(rollback=8)
    one_model(tokens[:, :9], past_key_values=cache)
    for change, rows in (
        (lambda c: c.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
        (lambda c: c.batch_select_indices(torch.tensor([True, False, True])), [0, 2]),
        (lambda c: c.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        (lambda c: c.detach(), [0, 1, 2]),
    ):
        for other in (cache.fork(), copy.deepcopy(cache)):
            change(other)
            other.crop(-5)
            same(one_model(tokens[rows, 4:], past_key_values=other).logits, one_model(tokens[rows]).logits[:, 4:])
    assert cache.seen_tokens == 9
    cache.crop(-20)
    assert (cache.seen_tokens, cache.rollback) == (0, 8)


@torch.no_grad()
def test_from_saved_states(one_model, tokens):
    first = one_model(tokens[:, :5], use_cache=True).past_key_values
    cache = HQLTCache.from_states(first.states, rollback=4)
    one_model(tokens[:, 5:8], past_key_values=cache)
    cache.crop(-3)
    same(one_model(tokens[:, 5:], past_key_values=cache).logits, one_model(tokens).logits[:, 5:])
    cache.crop(-4)
    with pytest.raises(ValueError, match="crop: expected 0, or -7"):
        cache.crop(-3)


@torch.no_grad()
def test_its_size_does_not_depend_on_the_context(one_model):
    rollback, sizes = 16, {}
    for calls in ([1] * 300, [300] + [1] * 40, [7] * 60):
        cache = HQLTCache(rollback=rollback)
        for length in calls:
            one_model(torch.ones(1, length, dtype=torch.long), past_key_values=cache)
        history = cache._history
        assert len(history.snapshots) <= 2 * math.log2(rollback) + 2
        assert sum(part.x.shape[1] for part in history.columns) <= 2 * rollback + max(calls[-20:])
        ages = [history.seen - snapshot.seen for snapshot in history.snapshots]
        again = [history.rolled_back(m)[1] for m in range(1, rollback + 1)]
        assert all(part is None or part.x.shape[1] <= max(m, calls[-1]) for m, part in enumerate(again, 1)), ages
        sizes[len(calls)] = len(history.snapshots)


def test_refused(one_model, tokens):
    with pytest.raises(ValueError, match="rollback: expected a number of tokens, at least 0, got -1"):
        HQLTCache(rollback=-1)
    cache = HQLTCache(rollback=2)
    one_model(tokens, past_key_values=cache)
    assert cache.is_croppable
    for columns in (-3, 1):
        with pytest.raises(ValueError, match=rf"crop: expected 0 to -2, or -11 \(everything\), got {columns}"):
            cache.crop(columns)
    assert not HQLTCache().is_croppable
    other = HQLTCache(rollback=2)
    model = built()
    for token in tokens.T[:3]:
        model(token[:, None], past_key_values=other)
    other.crop(-1)  # a snapshot of this state exists
    model(tokens[:, 2:5], past_key_values=other)
    del model
    with pytest.raises(ValueError, match="crop: expected the model that read these tokens to still exist"):
        other.crop(-1)


@pytest.mark.parametrize("name", [*KINDS, "surprise", "rule kda"])
def test_assisted_generation_gives_the_greedy_text(name, tokens):
    """With a draft model (another one, or the model itself) and prompt lookup, the text is that of greedy decoding."""
    model = model_of(name)
    drafts = [{"assistant_model": model}, {"assistant_model": built(hidden_size=8)}, {"prompt_lookup_num_tokens": 3}]
    for prompt in (tokens[:1, :5], tokens[:1].repeat(1, 2)):
        plain = model.generate(prompt, max_new_tokens=20, do_sample=False, pad_token_id=0)
        for draft in drafts:
            text = model.generate(prompt, max_new_tokens=20, do_sample=False, pad_token_id=0, **draft)
            assert text.tolist() == plain.tolist(), draft


def test_assisted_generation_continues_from_a_cache(one_model, tokens):
    prompt = tokens[:1].repeat(1, 3)
    plain = one_model.generate(prompt, max_new_tokens=20, do_sample=False, pad_token_id=0)
    for rollback in (0, 4, 999):
        cache = HQLTCache(rollback=rollback)
        with torch.no_grad():
            one_model(prompt[:, :-5], past_key_values=cache)
        text = one_model.generate(
            prompt, max_new_tokens=20, do_sample=False, pad_token_id=0, prompt_lookup_num_tokens=4, **{CACHE: cache}
        )
        assert text.tolist() == plain.tolist()
        assert cache.seen_tokens == text.shape[1] - 1
