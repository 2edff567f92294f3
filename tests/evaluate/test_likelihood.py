"""Results do not depend on batch size, chunk size or padding."""

from __future__ import annotations

import pytest
import torch

from hqlt.evaluate import likelihood
from hqlt.evaluate.likelihood import likelihoods
from tests.language.conftest import build
from tests.language.conftest import model as model

ROWS = [(b"a context", b" and more"), (b"x", b"y"), (b"much longer, longer than windows", b"."), (b"ab", b"")]


def as_tokens(rows=ROWS):
    return [(list(context), list(continuation)) for context, continuation in rows]


def directly(model, context, continuation) -> tuple[float, bool]:
    tokens = torch.tensor([[*context, *continuation]])
    logits = model(tokens).logits[0, :-1].log_softmax(-1)[len(context) - 1 :]
    targets = tokens[0, len(context) :]
    return logits.gather(1, targets[:, None]).sum().item(), bool((logits.argmax(-1) == targets).all())


@pytest.mark.parametrize("chunk", [1, 5, 512])
def test_rows_of_a_batch_score_as_they_do_alone(model, chunk, monkeypatch):
    monkeypatch.setattr(likelihood, "CHUNK", chunk)
    together = likelihoods(model, as_tokens())
    for row, got in zip(as_tokens(), together, strict=True):
        expected, greedy = directly(model, *row)
        assert got.log_probability == pytest.approx(expected, abs=1e-10)
        assert got.greedy == greedy
        assert likelihoods(model, [row])[0].log_probability == pytest.approx(got.log_probability, abs=1e-10)


def test_greedy_continuations_are_recognized(monkeypatch):
    monkeypatch.setattr(likelihood, "LOGITS", 2)
    model = build()
    prompt = list(b"a prompt")
    best = model.generate(torch.tensor([prompt]), max_new_tokens=5, do_sample=False, pad_token_id=0)[0, 8:].tolist()
    other = [*best[:4], (best[4] + 1) % 256]
    assert [one.greedy for one in likelihoods(model, [(prompt, best), (prompt, other), (prompt, best[:1])])] == [
        True,
        False,
        True,
    ]


def test_an_empty_context_is_refused():
    with pytest.raises(ValueError, match="context: expected at least one token"):
        likelihoods(build(), [([], [1])])
