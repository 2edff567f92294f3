"""The additive rules of the family as their authors' equations, token by token, and where their gates begin."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from hqlt import HybridMemory
from hqlt.memory import Write
from tests.laws import close, normal
from tests.memory.test_rules_by_hand import GROUP, PAIRS, K, V, agrees, build, sigmoid, softplus


def scan(t, step, reads):
    """step: (S, token) → S after it. reads: of each group, (S, token) → what its query reads."""
    S, out = torch.zeros(K, V, dtype=torch.float64), [[] for _ in reads]
    for i in range(t):
        S = step(S, i)
        for read, found in zip(reads, out, strict=True):
            found.append(read(S, i))
    return out


def test_gla():
    """Yang et al. 2024, eq. 3: S ← Diag(α) S + k vᵀ, α = σ(W₂ W₁ x + b)^(1/16)."""
    rule, w = build("gla", decay_rank=2)

    def by_hand(x, keys, values, queries, h):
        logits = x @ w["decay_proj.down.weight"].T @ w["decay_proj.up.weight"].T + w["decay_proj.up.bias"]
        alpha = sigmoid(logits[:, K * h : K * h + K]) ** (1 / 16)

        def step(S, i):
            return torch.diag(alpha[i]) @ S + torch.outer(keys[i], values[i])

        return scan(len(x), step, [lambda S, i, q=q: S.T @ q[i] / math.sqrt(K) for q in queries])

    agrees(rule, by_hand)


def test_mamba2():
    """Dao, Gu 2024: h ← exp(dt A) h + dt B xᵀ, y = hᵀ C; D x is added by the blend."""
    rule, w = build("mamba2")

    def silu(x):
        return x * sigmoid(x)

    def by_hand(x, keys, values, queries, h):
        dt = softplus(x @ w["dt_proj.weight"][h] + w["dt_bias"][h])
        A = -w["A_log"][h].exp()

        def step(S, i):
            return (dt[i] * A).exp() * S + dt[i] * torch.outer(silu(keys[i]), values[i])

        return scan(len(x), step, [lambda S, i, q=q: S.T @ silu(q[i]) for q in queries])

    agrees(rule, by_hand)
    v = normal(2, 3, PAIRS, V)
    close(rule.skip(v), torch.stack([w["D"][h] * v[:, :, h] for h in range(PAIRS)], dim=2))
    assert build("mamba2", skip=False)[0].skip(v) is None


def test_mamba2_begins_as_its_authors_do():
    rule = HybridMemory(64, 16, fast_weights="mamba2", blend="fw-only", num_value_heads=512).fw
    A, dt = rule.A_log.exp(), F.softplus(rule.dt_bias)
    assert 1 <= A.min() < 1.5 and 15 < A.max() <= 16 and abs(A.mean() - 8.5) < 1
    assert 0.99e-3 < dt.min() < 2e-3 and 0.05 < dt.max() < 0.101 and abs(dt.log().mean() + 4.6) < 0.3
    assert (rule.D == 1).all()


@pytest.mark.parametrize("blend", ["synchronous", "delayed-streaming", "delayed-chunk"])
def test_a_skip_is_of_the_token_that_reads(blend):
    """One token has nothing to read in a delayed blend, but its own values, weighed by D: those of its KV head."""
    h, v = PAIRS, 4
    layer = HybridMemory(h * GROUP * v, h * GROUP, 3, blend, fast_weights="mamba2", num_kv_heads=h).double()
    layer.fw.D.data.copy_(torch.tensor([2.0, 3.0]))
    x = normal(1, 1, layer.hidden_size)
    reads = []
    layer.mixer.register_forward_hook(lambda _, given, __: reads.append(given[1].fw))
    layer(x)
    projected = layer.parts().tokens(layer.project(x, None, None)[0])
    expected = layer.fw.skip(projected.values).repeat_interleave(GROUP, dim=2)
    if blend == "synchronous":
        write = Write(projected.keys, projected.values, projected.gates, None)
        expected = expected + layer.fw(projected.q, write, None, None)[0]
    close(reads[0], expected)
