"""Losses, compared with values worked out by hand."""

from __future__ import annotations

import math

import torch

from hqlt.agent import losses

LOG2, LOG3 = math.log(2), math.log(3)
YES, NO = True, False


def tensor(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def close(got, expected):
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-12)


# π = (¾, ¼): logits log 3 and 0. Its entropy: ¾ log(4/3) + ¼ log 4 = 2 log 2 − ¾ log 3.
LOGITS = tensor([[LOG3, 0.0]])
ENTROPY = 2 * LOG2 - 0.75 * LOG3


def test_entropy():
    close(losses.entropy(LOGITS), [[ENTROPY]])
    close(losses.entropy(LOGITS + 7), [[ENTROPY]])


def test_soft_value():
    close(losses.soft_value(tensor([[4.0, 8.0]]), LOGITS, 0.5), [[5 + 0.5 * ENTROPY]])


def test_soft_target():
    rewards, terminated = tensor([1.0, 2.0]), torch.tensor([[NO, YES]])
    next_q, next_logits = tensor([[4.0, 8.0], [math.nan, math.nan]]), tensor([[LOG3, 0.0], [0.0, 0.0]])
    got = losses.soft_target(rewards, terminated, next_q, next_logits, 0.5, 0.9)
    close(got, [[1 + 0.9 * (5 + 0.5 * ENTROPY), 2.0]])


def test_q_loss_uses_only_steps_of_the_mask():
    q = tensor([[1.0, 2.0], [3.0, 4.0], [math.nan, math.nan]])
    target, mask = tensor([4.0, 1.0, 0.0]), torch.tensor([[YES, YES, NO]])
    close(losses.q_loss(q, torch.tensor([[1, 0, 0]]), target, mask), ((2 - 4) ** 2 / 2 + (3 - 1) ** 2 / 2) / 2)


def test_actor_loss_has_no_gradient_for_the_critics():
    logits, q = LOGITS.clone().requires_grad_(), tensor([[4.0, 8.0]]).requires_grad_()
    loss = losses.actor_loss(logits, q, 0.0, torch.tensor([[YES]]))
    close(loss.detach(), -5.0)
    loss.backward()
    close(logits.grad, [[[0.75, -0.75]]])  # −π_i (Q_i − V): −¾ (4 − 5), −¼ (8 − 5)
    assert q.grad is None
    close(losses.actor_loss(LOGITS, q, 0.5, torch.tensor([[YES]])), -5 - 0.5 * ENTROPY)


def test_alpha_falls_while_the_entropy_is_above_its_target():
    log_temperature = torch.tensor(math.log(0.2), dtype=torch.float64, requires_grad=True)
    loss = losses.temperature_loss(log_temperature, LOGITS, 0.1, torch.tensor([[YES]]))
    close(loss.detach(), 0.2 * (ENTROPY - 0.1))
    loss.backward()
    assert log_temperature.grad > 0


def test_generalised_advantages():
    """γ = ½, λ = ½. Step 1 truncates an episode, step 2 terminates one, step 3 is the last of the rollout."""
    got = losses.generalised_advantages(
        rewards=tensor([1.0, 2.0, 3.0, 4.0]),
        values=tensor([0.0, 1.0, 1.0, 2.0]),
        next_values=tensor([1.0, 8.0, math.nan, 6.0]),
        terminated=torch.tensor([[NO, NO, YES, NO]]),
        ended=torch.tensor([[NO, YES, YES, NO]]),
        gamma=0.5,
        gae_lambda=0.5,
    )
    second = 2 + 0.5 * 8 - 1
    close(got, [[1 + 0.5 * 1 - 0 + 0.25 * second, second, 3 - 1, 4 + 0.5 * 6 - 2]])


def test_clipped_policy_loss():
    """Ratios 1.5 and 0.5, ε = 0.2: a gain is clipped at 1.2, a loss is not."""
    now, before = tensor([math.log(1.5), math.log(0.5), math.log(1.5), 0.0]), tensor([0.0, 0.0, 0.0, 0.0])
    advantages, mask = tensor([1.0, 1.0, -1.0, 9.0]), torch.tensor([[YES, YES, YES, NO]])
    close(losses.clipped_policy_loss(now, before, advantages, 0.2, mask), -(1.2 + 0.5 - 1.5) / 3)


def test_standardised_and_value_loss():
    mask = torch.tensor([[YES, YES, NO]])
    got = losses.standardised(tensor([1.0, 3.0, math.nan]), mask)
    torch.testing.assert_close(got[:, :2], tensor([-1.0, 1.0]))
    torch.testing.assert_close(losses.centred(tensor([1.0, 3.0, math.nan]), mask)[:, :2], tensor([-1.0, 1.0]))
    close(losses.value_loss(tensor([1.0, 3.0, 5.0]), tensor([2.0, 3.0, 0.0]), mask), 0.25)


def test_an_empty_mask_gives_zero():
    close(losses.masked_mean(tensor([math.inf]), torch.tensor([[NO]])), 0.0)
