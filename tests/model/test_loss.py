"""The chunked loss equals the plain one, in value and gradients, for every kind of head."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hqlt.model import HQLTForCausalLM, loss, preset
from hqlt.model.loss import summed_cross_entropy
from tests.laws import close, normal

B, T, D, VOCABULARY = 2, 7, 5, 11


@pytest.fixture
def case() -> tuple[Tensor, nn.Linear, Tensor]:
    """x, a head, and targets, some of which are not scored."""
    x, head = normal(B, T, D, seed=1).requires_grad_(), nn.Linear(D, VOCABULARY, bias=False, dtype=torch.float64)
    targets = torch.arange(B * T).view(B, T) % VOCABULARY
    targets[0, 2:5] = targets[1, 0] = -100
    return x, head, targets


def plain(x: Tensor, head: nn.Module, targets: Tensor) -> Tensor:
    return F.cross_entropy(head(x).flatten(0, 1), targets.flatten(), reduction="sum")


@pytest.mark.parametrize("rows", [1, 3, 4, 13])
def test_value_and_gradients(case, rows):
    x, head, targets = case
    got = summed_cross_entropy(x, head, targets, max_logits=rows * VOCABULARY)
    expected = plain(x, head, targets)
    close(got, expected, 1e-10)
    given = [x, head.weight]
    grads = [torch.autograd.grad(3 * y, given) for y in (got, expected)]
    for mine, theirs in zip(*grads, strict=True):
        close(mine, theirs, 1e-10)


@pytest.mark.parametrize("frozen", ["x", "weight", "both"])
def test_frozen_inputs_get_no_gradient(case, frozen):
    x, head, targets = case
    x.requires_grad_(frozen == "weight")
    head.requires_grad_(frozen == "x")
    got = summed_cross_entropy(x, head, targets, max_logits=VOCABULARY)
    close(got, plain(x, head, targets), 1e-10)
    if frozen == "both":
        assert not got.requires_grad
        return
    given = head.weight if frozen == "x" else x
    close(torch.autograd.grad(got, given)[0], torch.autograd.grad(plain(x, head, targets), given)[0], 1e-10)


def test_logits_are_never_materialized(case, monkeypatch):
    """No tensor that the loss creates is larger than max_logits allows."""
    x, head, targets = case

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            self.largest = max([self.largest, *(y.numel() for y in [out] if isinstance(y, Tensor))])
            return out

    with Watch() as watch:
        summed_cross_entropy(x, head, targets, max_logits=6 * VOCABULARY).backward()
    assert watch.largest == max(6 * VOCABULARY, B * T * D)


def test_few_logits_are_computed_in_one_chunk(case):
    x, head, targets = case
    assert torch.equal(summed_cross_entropy(x, head, targets), plain(x, head, targets))


@pytest.mark.parametrize("change", ["hook", "bias", "subclass"])
def test_a_head_other_than_a_plain_matrix_is_called(case, change):
    x, head, targets = case

    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    if change == "hook":
        head.register_forward_hook(lambda module, args, out: 2 * out)
    else:
        head = (nn.Linear if change == "bias" else Doubled)(D, VOCABULARY, bias=change == "bias", dtype=torch.float64)
    close(summed_cross_entropy(x, head, targets, max_logits=VOCABULARY), plain(x, head, targets), 1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_is_summed_in_float32(case, dtype):
    x, head, targets = case
    narrow = x.detach().to(dtype).requires_grad_()
    got = summed_cross_entropy(narrow, head.to(dtype), targets, max_logits=3 * VOCABULARY)
    assert got.dtype == torch.float32
    got.backward()
    assert (narrow.grad.dtype, head.weight.grad.dtype) == (dtype, dtype)
    expected = torch.autograd.grad(plain(x, head.double(), targets), x)[0]
    close(narrow.grad.double(), expected, 2e-2 if dtype == torch.bfloat16 else 1e-5)


def test_autocast(case):
    x, head, targets = case
    x, head = x.detach().float().requires_grad_(), head.float()
    with torch.autocast("cpu", torch.bfloat16):
        got = summed_cross_entropy(x, head, targets, max_logits=3 * VOCABULARY)
        expected = summed_cross_entropy(x, head, targets)
    close(got, expected, 1e-2)
    grads = [torch.autograd.grad(y, [x, head.weight]) for y in (got, expected)]
    for mine, theirs in zip(*grads, strict=True):
        assert mine.dtype == torch.float32
        close(mine, theirs, 2e-2)


class TestModel:
    @pytest.fixture
    def model(self):
        small = {"hidden_size": 16, "num_heads": 2, "num_hidden_layers": 1, "window": 3, "vocab_size": VOCABULARY}
        return HQLTForCausalLM(preset("tiny", **small)).double()

    @pytest.fixture
    def tokens(self):
        return torch.arange(2 * 9).view(2, 9) % VOCABULARY

    @pytest.mark.parametrize("given", ["labels", "shift_labels", "num_items_in_batch"])
    def test_the_same_loss(self, model, tokens, given, monkeypatch):
        monkeypatch.setattr(loss.summed_cross_entropy, "__defaults__", (4 * VOCABULARY,))
        labels = tokens.clone()
        labels[0, 3] = -100
        options = {"labels": labels} if given != "shift_labels" else {"shift_labels": labels}
        options |= {"num_items_in_batch": 5} if given == "num_items_in_batch" else {}
        got, expected = model(tokens, **options, skip_logits=True), model(tokens, **options)
        assert got.logits is None
        assert expected.logits is not None
        close(got.loss, expected.loss.double(), 1e-6)  # transformers computes it in float32
        grads = [torch.autograd.grad(out.loss, list(model.parameters())) for out in (got, expected)]
        for mine, theirs in zip(*grads, strict=True):
            close(mine, theirs, 1e-6)

    def test_a_loss_needs_labels(self, model, tokens):
        with pytest.raises(ValueError, match="skip_logits: expected labels"):
            model(tokens, skip_logits=True)
