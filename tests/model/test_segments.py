from __future__ import annotations

import pytest
import torch

from hqlt.model.segments import read_segments


def test_worked_example():
    """Row 0 is padded on the left, row 1 on the right; its padding is read first and then forgotten."""
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]])
    resets, order, tokens, counts = read_segments(2, 4, None, attention_mask=mask)
    assert torch.equal(tokens, mask.bool())
    assert counts is None  # the memories are empty
    assert order.tolist() == [[0, 1, 2, 3], [3, 0, 1, 2]]
    assert resets.int().tolist() == [[0, 0, 1, 0], [0, 1, 0, 0]]


def test_sort_and_restore_are_inverse():
    segments = read_segments(2, 4, None, attention_mask=torch.tensor([[1, 0, 1, 1], [1, 1, 0, 0]]))
    x = torch.randn(2, 4, 3)
    assert torch.equal(segments.restore(segments.sort(x)), x)
    assert segments.sort(x)[1, :2].equal(x[1, 2:])


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"attention_mask": torch.ones(2, 4)},
        {"position_ids": torch.arange(4)[None]},
        {"resets": torch.tensor([[True, False, False, False]] * 2)},
    ],
)
def test_one_segment_per_row_needs_no_resets(given):
    """So that causal attention can use its fastest implementation."""
    assert read_segments(2, 4, None, **given)[:2] == (None, None)


def test_position_0_begins_a_segment_with_a_non_empty_memory():
    assert read_segments(2, 2, 5, position_ids=torch.arange(2)[None]).resets.tolist() == [[True, False]] * 2
    assert read_segments(2, 2, 5, position_ids=torch.arange(5, 7)[None]).resets is None
    assert read_segments(2, 2, 5, attention_mask=torch.ones(2, 7)).resets is None


def test_while_tracing(model, tokens, monkeypatch):
    """The code path that reads no tensor values gives the same results."""
    mask = torch.ones_like(tokens)
    mask[0, :4] = mask[1, 8:] = 0
    plain = model(tokens, attention_mask=mask, use_cache=True)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    traced = model(tokens, attention_mask=mask, use_cache=True)
    torch.testing.assert_close(traced.logits[mask.bool()], plain.logits[mask.bool()], rtol=0, atol=1e-10)
    for mine, theirs in zip(traced.past_key_values.states, plain.past_key_values.states, strict=True):
        for x, y in zip(mine.leaves(), theirs.leaves(), strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=1e-10)
