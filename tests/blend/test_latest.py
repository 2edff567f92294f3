"""A KV-memory holds the latest entries after a call, with zeros in unused slots."""

from __future__ import annotations

import torch

from hqlt.blend import Blend
from hqlt.memory import Held


def entries(b: int, l: int) -> Held:
    keys, values = torch.arange(1.0, b * l * 4 + 1).view(2, b, l, 1, 2)
    return Held(keys, values, ())


def test_full_attention_copies_nothing_if_every_slot_is_used():
    held = entries(2, 5)
    assert Blend(None).latest_entries(held, torch.tensor([5, 5])) is held


def test_full_attention_after_a_reset():
    held = entries(2, 5)
    latest = Blend(None).latest_entries(held, torch.tensor([5, 2]))
    assert torch.equal(latest.keys[0], held.keys[0])
    assert latest.keys[1, :3].abs().sum() == latest.values[1, :3].abs().sum() == 0
    assert torch.equal(latest.keys[1, 3:], held.keys[1, 3:])


def test_a_window_holds_the_latest_entries():
    held = entries(1, 5)
    latest = Blend(3).latest_entries(held, torch.tensor([5]))
    assert torch.equal(latest.keys, held.keys[:, 3:])
    assert latest.keys.untyped_storage().data_ptr() != held.keys.untyped_storage().data_ptr(), (
        "older entries must be freed"
    )
