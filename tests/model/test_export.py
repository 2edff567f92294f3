"""torch.export: the program gives the model's results, also for other batch sizes and lengths."""

from __future__ import annotations

import io

import pytest
import torch
from torch.export import Dim
from torch.utils._pytree import tree_map

from hqlt.memory import Entry
from hqlt.model import HQLTCache, HQLTForCausalLM, register_cache_for_export
from tests.model.conftest import SMALL

ANY = Dim.DYNAMIC


@pytest.fixture(autouse=True)
def exportable() -> None:
    register_cache_for_export()


def same_after(a, b) -> None:
    """Check that logits and states are equal."""
    torch.testing.assert_close(a.logits, b.logits, rtol=0, atol=1e-10)
    mine, theirs = a.past_key_values, b.past_key_values
    assert mine.seen_tokens == theirs.seen_tokens
    for x, y in zip(mine.states, theirs.states, strict=True):
        for p, q in zip(x.leaves(), y.leaves(), strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-10)


def any_rows(model: HQLTForCausalLM) -> list:
    """The dynamic shapes of a cache: the number of rows, and of KV entries in layers with full attention."""

    def dynamic(entry: Entry) -> dict:
        return {0: ANY} | {i: ANY for i, size in enumerate(entry.sizes, 1) if size is None}

    return [[tree_map(dynamic, block.memory.entries) for block in model.model.layers], None, None]


def some_tokens(b: int, t: int) -> torch.Tensor:
    return torch.randint(1, SMALL["vocab_size"], (b, t))


@torch.no_grad()
def test_a_text_and_then_step_by_step(model, tokens):
    if len(model.model.layers) == 2:  # both of the same kind
        del model.model.layers[1]
    shapes = {"input_ids": {0: ANY, 1: ANY}, "use_cache": None}
    text = torch.export.export(model, (tokens,), {"use_cache": True}, dynamic_shapes=shapes).module()
    cache = model(tokens, use_cache=True).past_key_values
    shapes = {"input_ids": {0: ANY}, "past_key_values": any_rows(model)}
    step = torch.export.export(model, (tokens[:, :1],), {"past_key_values": cache}, dynamic_shapes=shapes).module()
    assert cache.seen_tokens == 11
    for b, t in ((1, 1), (2, 5), (4, 23)):
        given = some_tokens(b, t)
        mine, theirs = text(given, use_cache=True), model(given, use_cache=True)
        same_after(mine, theirs)
        for _ in range(2):
            given = some_tokens(b, 1)
            mine = step(given, past_key_values=mine.past_key_values)
            theirs = model(given, past_key_values=theirs.past_key_values)
            same_after(mine, theirs)


@torch.no_grad()
def test_with_a_mask_and_from_a_file(one_model, tokens):
    mask = (torch.arange(11) >= torch.tensor([0, 7, 4])[:, None]).long()
    shapes = {"input_ids": {0: ANY, 1: ANY}, "attention_mask": {0: ANY, 1: ANY}, "use_cache": None}
    given = {"attention_mask": mask, "use_cache": True}
    file = io.BytesIO()
    torch.export.save(torch.export.export(one_model, (tokens,), given, dynamic_shapes=shapes), file)
    file.seek(0)
    text = torch.export.load(file).module()
    for b, t in ((1, 4), (4, 9)):
        tokens, mask = some_tokens(b, t), torch.ones(b, t, dtype=torch.long)
        mask[0, : t // 2] = mask[-1, -1:] = 0
        mine = text(tokens, attention_mask=mask, use_cache=True)
        theirs = one_model(tokens, attention_mask=mask, use_cache=True)
        assert torch.equal(mine.past_key_values.attention_mask, mask.bool())
        mine.logits[mask == 0] = theirs.logits[mask == 0]  # the logits of padding are ignored
        same_after(mine, theirs)
    step = {"attention_mask": torch.cat([mask, torch.ones(4, 1).long()], 1), "past_key_values": theirs.past_key_values}
    rows = [any_rows(one_model)[0], None, {0: ANY, 1: ANY}]
    shapes = {"input_ids": {0: ANY}, "attention_mask": {0: ANY, 1: ANY}, "past_key_values": rows}
    program = torch.export.export(one_model, (tokens[:, :1],), step, dynamic_shapes=shapes).module()
    tokens, mask = some_tokens(3, 7), torch.ones(3, 7, dtype=torch.long)
    mask[1, :3] = 0
    cache = one_model(tokens, attention_mask=mask, use_cache=True).past_key_values
    mask = torch.cat([mask, torch.tensor([[1], [1], [0]])], 1)
    mine = program(tokens[:, :1], attention_mask=mask, past_key_values=cache.fork())
    theirs = one_model(tokens[:, :1], attention_mask=mask, past_key_values=cache)
    mine.logits[2] = theirs.logits[2]
    same_after(mine, theirs)
    with pytest.raises(RuntimeError, match="to match what the cache has read, got a different mask"):
        program(tokens[:, :1], attention_mask=torch.ones(3, 9).long(), past_key_values=mine.past_key_values)


def test_a_cache_is_a_pytree_only_after_registration(one_model, tokens):
    cache = one_model(tokens, use_cache=True).past_key_values
    leaves, spec = torch.utils._pytree.tree_flatten(cache)
    again = torch.utils._pytree.tree_unflatten(leaves, spec)
    assert isinstance(again, HQLTCache)
    assert (again.seen_tokens, again.attention_mask) == (11, None)
    assert all(map(torch.equal, again.states[0].leaves(), cache.states[0].leaves()))
