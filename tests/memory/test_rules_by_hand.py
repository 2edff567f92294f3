"""Each rule agrees with its authors' equation, computed token by token and head by head from the same weights."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from hqlt import registry
from hqlt.memory import Heads, Write
from tests.laws import close, normal

D, PAIRS, GROUP, K, V = 10, 2, 2, 4, 3
HEADS = Heads(hidden_size=D, queries=GROUP * PAIRS, keys=PAIRS, matrices=PAIRS, k=K, v=V)


def build(name, **options):
    rule = registry.find("rule", name)(HEADS, **options).double()
    rule.own_v_activation = torch.nn.SiLU()
    with torch.no_grad():
        for i, weight in enumerate(rule.parameters()):
            weight.copy_(0.7 * normal(*weight.shape, seed=i))
    return rule, dict(rule.named_parameters())


def agrees(rule, by_hand, t=9):
    """Compare a rule with by_hand(x [t, d], keys [t, k], values [t, v], queries [g][t, k], head) → reads [g][t, v]."""
    x, q = normal(2, t, D, seed=50), normal(2, t, GROUP * PAIRS, K, seed=51)
    keys, values = normal(2, t, PAIRS, K, seed=52), normal(2, t, PAIRS, V, seed=53)
    out, _ = rule(q, Write(keys, values, rule.gates(rule.logits(x)), None), None, None)
    for row in range(2):
        for h in range(PAIRS):
            queries = [q[row, :, GROUP * h + g] for g in range(GROUP)]
            for g, reads in enumerate(by_hand(x[row], keys[row, :, h], values[row, :, h], queries, h)):
                close(out[row, :, GROUP * h + g], torch.stack(reads))


def unit(x):
    return x / (x @ x + 1e-6).sqrt()


def phi(x):
    return unit(F.silu(x))


def softplus(x):
    return (1 + x.exp()).log()


def sigmoid(x):
    return 1 / (1 + (-x).exp())


def deltas(S, alpha, writes):
    """S ← Diag(α) S, then S ← (I − β k kᵀ) S + β k vᵀ for each (k, v, β)."""
    S = torch.diag(alpha) @ S
    for k, v, beta in writes:
        S = S - beta * torch.outer(k, k @ S) + beta * torch.outer(k, v)
    return S


def scan(t, step, queries, read=lambda q, i: phi(q) / math.sqrt(K)):
    """Scan t tokens: step maps (S, token) to the next S; read maps (query, token) to the vector that reads S."""
    S, reads = torch.zeros(K, V, dtype=torch.float64), [[] for _ in queries]
    for i in range(t):
        S = step(S, i)
        for q, found in zip(queries, reads, strict=True):
            found.append(S.T @ read(q[i], i))
    return reads


def test_gated_delta():
    rule, w = build("gated-delta", beta_max=2.0)

    def by_hand(x, keys, values, queries, h):
        def step(S, i):
            beta = 2 * sigmoid(w["beta_proj.weight"][h] @ x[i])
            decay = -w["A_log"][h].exp() * softplus(w["decay_proj.weight"][h] @ x[i] + w["dt_bias"][h])
            return deltas(S, decay.exp().expand(K), [(phi(keys[i]), values[i], beta)])

        return scan(len(x), step, queries)

    agrees(rule, by_hand)


def test_kda():
    """Kimi Linear, eq. 1; the bounded decay is lower_bound · σ(exp(A_log) (f + dt_bias))."""
    for floor in (None, -5.0):
        rule, w = build("kda", decay_rank=2, decay_floor=floor)

        def by_hand(x, keys, values, queries, h, w=w, floor=floor):
            def step(S, i):
                f = (w["decay_proj.up.weight"] @ w["decay_proj.down.weight"] @ x[i] + w["dt_bias"])[K * h : K * h + K]
                sharp = w["A_log"][h].exp()
                decay = -sharp * softplus(f) if floor is None else floor * sigmoid(sharp * f)
                return deltas(S, decay.exp(), [(phi(keys[i]), values[i], sigmoid(w["beta_proj.weight"][h] @ x[i]))])

            return scan(len(x), step, queries)

        agrees(rule, by_hand)


def test_delta_product_and_gated_delta_product():
    """The authors stack the keys and values of all writes in order; here the last ones are the layer's own."""
    for name, m in (("delta-product", 2), ("gated-delta-product", 3)):
        rule, w = build(name, num_householder=m)

        def by_hand(x, keys, values, queries, h, w=w, m=m):
            def step(S, i):
                extra_k = (w["k_proj.weight"] @ x[i]).view(m - 1, PAIRS, K)[:, h]
                extra_v = F.silu(w["v_proj.weight"] @ x[i]).view(m - 1, PAIRS, V)[:, h]
                betas = 2 * sigmoid(w["beta_proj.weight"] @ x[i]).view(m, PAIRS)[:, h]
                pairs = [*zip(extra_k, extra_v, strict=True), (keys[i], values[i])]
                alpha = torch.ones(K, dtype=torch.float64)
                if "A_log" in w:
                    a = w["decay_proj.weight"][h] @ x[i] + w["dt_bias"][h]
                    alpha = (-w["A_log"][h].exp() * softplus(a)).exp().expand(K)
                return deltas(S, alpha, [(phi(k), v, beta) for (k, v), beta in zip(pairs, betas, strict=True)])

            return scan(len(x), step, queries)

        agrees(rule, by_hand)


def test_comba():
    """S_t = α S_{t−1} − β k (pᵀ S_{t−1}) + β k vᵀ with p = σ(d) k, read with q − D p."""
    for options in ({"correction": 0.3}, {"correction": None}, {"inner_decay": False}):
        rule, w = build("comba", **options)

        def by_hand(x, keys, values, queries, h, w=w):
            inner = sigmoid(w["d"][h]) if "d" in w else 1.0

            def step(S, i):
                beta = sigmoid(w["beta_proj.weight"][h] @ x[i])
                alpha = (-w["A_log"][h].exp() * softplus(w["decay_proj.weight"][h] @ x[i] + w["dt_bias"][h])).exp()
                k = phi(keys[i])
                return alpha * S - beta * torch.outer(k, (inner * k) @ S) + beta * torch.outer(k, values[i])

            def read(q, i):
                D = w["D"][h] if "D" in w else 0.0
                return unit(F.silu(q) - D * inner * F.silu(keys[i])) / math.sqrt(K)

            return scan(len(x), step, queries, read)

        agrees(rule, by_hand)


def test_rwkv7():
    """The transpose of S_t = S_{t−1} (diag(w) − κ̂ᵀ (a ⊙ κ̂)) + vᵀ k̃."""
    rule, w = build("rwkv7", decay_rank=2)

    def by_hand(x, keys, values, queries, h):
        def own(v):
            return v[K * h : K * h + K]

        def low_rank(name, x, activation):
            return w[f"{name}.up.weight"] @ activation(w[f"{name}.down.weight"] @ x) + w[f"{name}.up.bias"]

        def step(S, i):
            decay = (-math.exp(-0.5) * sigmoid(own(low_rank("decay_proj", x[i], torch.tanh)))).exp()
            a = sigmoid(own(low_rank("a_proj", x[i], lambda z: z)))
            kappa = keys[i] * own(w["k_k"])
            kappa = kappa / kappa.norm()
            k = keys[i] * (1 + (a - 1) * own(w["k_a"]))
            return (S.T @ (torch.diag(decay) - torch.outer(kappa, a * kappa)) + torch.outer(values[i], k)).T

        return scan(len(x), step, queries, lambda q, i: q)

    agrees(rule, by_hand)
