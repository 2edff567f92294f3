from __future__ import annotations

import pytest
import torch

from hqlt.shapes import at_least_float32, checked, match


def test_match_returns_sizes():
    assert match(q=(torch.zeros(2, 3), "b t"), v=(torch.zeros(3, 5), "t v")) == {"b": 2, "t": 3, "v": 5}


def test_a_letter_has_one_size():
    with pytest.raises(ValueError, match=r"v: expected \[t, v\] with t = 3 .*got shape \[4, 5\]"):
        match(q=(torch.zeros(2, 3), "b t"), v=(torch.zeros(4, 5), "t v"))


def test_checks_end_with_the_context_even_after_an_error():
    bad = (torch.tensor([torch.inf]), "t")
    with pytest.raises(ValueError, match=r"x: expected finite numbers, got inf at index \(0,\) \(1 of 1 "), checked():
        match(x=bad)
    with checked(), checked(enabled=False):
        match(x=bad)
    match(x=bad)


@pytest.mark.parametrize(
    ("narrow", "wide"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_fast_weights_accumulate_wide(narrow, wide):
    assert at_least_float32(narrow) == wide
