"""Each row samples from its own distribution, independently of the other rows."""

from __future__ import annotations

import pytest
import torch

from hqlt.serve import sampling
from hqlt.serve.sampling import Sampling, sample, token_logprobs


def drawn(logits, temperature=1.0, top_p=1.0, n=2000):
    """Frequency of each token over evenly spaced draws."""
    samplings = [Sampling(temperature, top_p, (i + 0.5) / n) for i in range(n)]
    return torch.tensor(sample(logits.expand(n, -1), samplings)).bincount(minlength=len(logits)) / n


def test_tokens_are_sampled_by_their_probabilities():
    logits = torch.randn(7, dtype=torch.float64)
    for temperature in (0.5, 1.0, 2.0):
        torch.testing.assert_close(
            drawn(logits, temperature), (logits / temperature).softmax(-1).float(), atol=1e-3, rtol=0
        )


@pytest.mark.parametrize("top_tokens", [2, 1024])
def test_top_p_keeps_the_most_likely_tokens(top_tokens, monkeypatch):
    monkeypatch.setattr(sampling, "TOP_TOKENS", top_tokens)
    p = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15], dtype=torch.float64)
    for top_p, kept in ((0.3, [1]), (0.41, [1, 3]), (0.69, [1, 3]), (0.71, [1, 3, 4]), (0.99, [0, 1, 2, 3, 4])):
        expected = torch.zeros(5, dtype=torch.float64)
        expected[kept] = p[kept] / p[kept].sum()
        torch.testing.assert_close(drawn(p.log(), top_p=top_p), expected.float(), atol=1e-3, rtol=0)


def test_rows_are_independent():
    logits = torch.randn(40, 50, dtype=torch.float64) * 3
    samplings = [Sampling((0.0, 1e-30, 0.7, 1.0, 30.0)[i % 5], (1.0, 0.9, 1e-9)[i % 3], i / 40) for i in range(40)]
    together = sample(logits, samplings)
    assert together == [sample(row[None], [own])[0] for row, own in zip(logits, samplings, strict=True)]
    assert together[:40:5] == logits.argmax(-1)[::5].tolist()
    assert together[1:40:5] == logits.argmax(-1)[1::5].tolist()
    logits[3, 1], logits[7, 2] = float("nan"), float("inf")
    assert sample(logits, samplings) == [None if i in (3, 7) else token for i, token in enumerate(together)]


def test_tokens_with_logit_minus_infinity_are_never_sampled():
    logits = torch.tensor([0.0, float("-inf"), 0.0, float("-inf")])
    assert drawn(logits).tolist() == [0.5, 0, 0.5, 0]
    assert sample(logits[None], [Sampling(1.0, 1.0, 1 - 2**-53)]) == [2]


def test_log_probabilities():
    logits = torch.randn(2, 5, dtype=torch.float64)
    one, other = token_logprobs(logits, [1, 4], 9)
    assert one.logprob == pytest.approx(float(logits[0].log_softmax(-1)[1]), abs=1e-12)
    assert [id for id, _ in other.top] == logits[1].argsort(descending=True).tolist()
