"""Each row's token is its own: drawn by its probabilities, whatever rows stand beside it."""

from __future__ import annotations

import pytest
import torch

from hqlt.serve import sampling
from hqlt.serve.sampling import Sampling, choose, likely


def drawn(logits, temperature=1.0, top_p=1.0, n=2000):
    """How often each token comes, over evenly spread draws."""
    hows = [Sampling(temperature, top_p, (i + 0.5) / n) for i in range(n)]
    return torch.tensor(choose(logits.expand(n, -1), hows)).bincount(minlength=len(logits)) / n


def test_tokens_come_by_their_probabilities():
    logits = torch.randn(7, dtype=torch.float64)
    for temperature in (0.5, 1.0, 2.0):
        torch.testing.assert_close(
            drawn(logits, temperature), (logits / temperature).softmax(-1).float(), atol=1e-3, rtol=0
        )


@pytest.mark.parametrize("near", [2, 1024])
def test_top_p_keeps_the_likeliest(near, monkeypatch):
    monkeypatch.setattr(sampling, "NEAR", near)
    p = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15], dtype=torch.float64)
    for top_p, kept in ((0.3, [1]), (0.41, [1, 3]), (0.69, [1, 3]), (0.71, [1, 3, 4]), (0.99, [0, 1, 2, 3, 4])):
        expected = torch.zeros(5, dtype=torch.float64)
        expected[kept] = p[kept] / p[kept].sum()
        torch.testing.assert_close(drawn(p.log(), top_p=top_p), expected.float(), atol=1e-3, rtol=0)


def test_rows_do_not_see_each_other():
    logits = torch.randn(40, 50, dtype=torch.float64) * 3
    hows = [Sampling((0.0, 1e-30, 0.7, 1.0, 30.0)[i % 5], (1.0, 0.9, 1e-9)[i % 3], i / 40) for i in range(40)]
    together = choose(logits, hows)
    assert together == [choose(row[None], [how])[0] for row, how in zip(logits, hows, strict=True)]
    assert together[:40:5] == logits.argmax(-1)[::5].tolist()
    assert together[1:40:5] == logits.argmax(-1)[1::5].tolist()
    logits[3, 1], logits[7, 2] = float("nan"), float("inf")
    assert choose(logits, hows) == [None if i in (3, 7) else token for i, token in enumerate(together)]


def test_minus_infinity_is_never_drawn():
    logits = torch.tensor([0.0, float("-inf"), 0.0, float("-inf")])
    assert drawn(logits).tolist() == [0.5, 0, 0.5, 0]
    assert choose(logits[None], [Sampling(1.0, 1.0, 1 - 2**-53)]) == [2]


def test_log_probabilities():
    logits = torch.randn(2, 5, dtype=torch.float64)
    one, other = likely(logits, [1, 4], 9)
    assert one.logprob == pytest.approx(float(logits[0].log_softmax(-1)[1]), abs=1e-12)
    assert [id for id, _ in other.top] == logits[1].argsort(descending=True).tolist()
