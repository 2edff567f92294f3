"""Losses of reinforcement learning, as pure functions of small tensors.

Rows of a batch may have different lengths: `mask`, Bool[b, t], is True at the steps that were played, and means are
taken over those. Values at other steps have no influence, even if they are NaN. A policy π is given by its logits.
"""

from __future__ import annotations

from typing import Annotated, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

PerStep: TypeAlias = Annotated[Tensor, "b t"]
PerAction: TypeAlias = Annotated[Tensor, "b t a"]


def masked_mean(x: PerStep, mask: PerStep) -> Tensor:
    """Σ mask · x / Σ mask; 0 if the mask is empty."""
    return torch.where(mask, x, 0).sum() / mask.sum().clamp(min=1)


def entropy(logits: PerAction) -> PerStep:
    """H_t = −Σ_a π(a | t) log π(a | t)."""
    log_pi = F.log_softmax(logits, dim=-1)
    return -(log_pi.exp() * log_pi).sum(dim=-1)


def gather_actions(x: PerAction, actions: PerStep) -> PerStep:
    """x_t(a_t): the entry of the action taken."""
    return x.gather(-1, actions[..., None])[..., 0]


def soft_value(q: PerAction, logits: PerAction, alpha: Tensor | float) -> PerStep:
    """V_t = Σ_a π(a | t) (Q_t(a) − α log π(a | t)).

    Source:
        Christodoulou 2019, "Soft Actor-Critic for Discrete Action Settings", eq. 10.
    """
    log_pi = F.log_softmax(logits, dim=-1)
    return (log_pi.exp() * (q - alpha * log_pi)).sum(dim=-1)


def soft_target(
    rewards: PerStep,
    terminated: PerStep,
    next_q: PerAction,
    next_logits: PerAction,
    alpha: Tensor | float,
    gamma: float,
) -> PerStep:
    """y_t = r_t + γ (1 − terminated_t) V_{t+1}, without gradient.

    `next_q` and `next_logits` belong to the following step. The last step of a truncated episode is not terminated, so
    its target includes the value of what follows.

    Source:
        Christodoulou 2019, eqs. 3 and 10.
    """
    with torch.no_grad():
        ahead = soft_value(next_q, next_logits, alpha)
        return rewards + gamma * torch.where(terminated, 0, ahead)


def q_loss(q: PerAction, actions: PerStep, target: PerStep, mask: PerStep) -> Tensor:
    """½ mean_t (Q_t(a_t) − y_t)².

    Source:
        Christodoulou 2019, eq. 4.
    """
    return masked_mean(0.5 * (gather_actions(q, actions) - target) ** 2, mask)


def actor_loss(logits: PerAction, q: PerAction, alpha: Tensor | float, mask: PerStep) -> Tensor:
    """mean_t Σ_a π(a | t) (α log π(a | t) − Q_t(a)), with a gradient for π only.

    Source:
        Christodoulou 2019, eq. 12.
    """
    return -masked_mean(soft_value(q.detach(), logits, alpha), mask)


def temperature_loss(log_temperature: Tensor, logits: PerAction, target_entropy: float, mask: PerStep) -> Tensor:
    """α · (mean_t H_t − H̄), with a gradient for log α only: α falls while the entropy is above its target.

    Source:
        Haarnoja et al. 2018, "Soft Actor-Critic Algorithms and Applications", eq. 18.
    """
    return log_temperature.exp() * (masked_mean(entropy(logits.detach()), mask) - target_entropy)


def generalised_advantages(
    rewards: PerStep,
    values: PerStep,
    next_values: PerStep,
    terminated: PerStep,
    ended: PerStep,
    gamma: float,
    gae_lambda: float,
) -> PerStep:
    """A_t = δ_t + γλ (1 − ended_t) A_{t+1}        δ_t = r_t + γ (1 − terminated_t) V'_t − V_t

    `values` is V before each action, `next_values` is V' after it. An episode ends when it is terminated or truncated;
    only a truncated one is bootstrapped beyond its end. λ is `gae_lambda`. No gradient.

    Source:
        Schulman et al. 2016, "High-Dimensional Continuous Control Using Generalized Advantage Estimation", eq. 16.
    """
    with torch.no_grad():
        delta = rewards + gamma * torch.where(terminated, 0, next_values) - values
        advantages, ahead = torch.empty_like(delta), torch.zeros_like(delta[:, 0])
        for t in reversed(range(delta.shape[1])):
            ahead = delta[:, t] + gamma * gae_lambda * torch.where(ended[:, t], 0, ahead)
            advantages[:, t] = ahead
        return advantages


def centred(x: PerStep, mask: PerStep) -> PerStep:
    """x − mean, over the steps of the mask."""
    return x - masked_mean(x, mask)


def standardised(x: PerStep, mask: PerStep) -> PerStep:
    """(x − mean) / (standard deviation + 1e-8), both over the steps of the mask."""
    x = centred(x, mask)
    return x / (masked_mean(x**2, mask).sqrt() + 1e-8)


def clipped_policy_loss(
    log_pi: PerStep, log_pi_before: PerStep, advantages: PerStep, clip_range: float, mask: PerStep
) -> Tensor:
    """−mean_t min(ρ_t A_t, clip(ρ_t, 1 − ε, 1 + ε) A_t)        ρ_t = π(a_t | t) / π_before(a_t | t)

    Source:
        Schulman et al. 2017, "Proximal Policy Optimization Algorithms", eq. 7.
    """
    ratio = (log_pi - log_pi_before).exp()
    return -masked_mean(
        torch.minimum(ratio * advantages, ratio.clamp(1 - clip_range, 1 + clip_range) * advantages), mask
    )


def value_loss(values: PerStep, returns: PerStep, mask: PerStep) -> Tensor:
    """½ mean_t (V_t − R_t)²."""
    return masked_mean(0.5 * (values - returns) ** 2, mask)
