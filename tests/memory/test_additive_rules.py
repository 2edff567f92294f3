"""Additive rules agree with their authors' equations, token by token, and have their initial gates."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from hqlt import HybridMemory
from hqlt.agent.memory_model import build_memory
from hqlt.memory import Write
from hqlt.memory.fw.mlstm import stabilisers
from hqlt.model import HQLTConfig, HQLTForCausalLM
from tests.laws import close, normal
from tests.memory.test_rules_by_hand import GROUP, PAIRS, K, V, agrees, build, sigmoid, softplus


def silu(x):
    return x * sigmoid(x)


def scan(t, step, reads):
    """Scan t tokens: step maps (S, token) to the next S; reads map (S, token) to the read of each query of a group."""
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


def test_retnet():
    """Sun et al. 2023, eqs. 5 and 6: Σ_m γ^(n−m) (Q_n e^{inθ}) (K_m e^{imθ})† V_m, over complex channels."""
    for theta in (None, 100.0):
        rule, _ = build("retnet", rope_theta=theta)
        angles = torch.zeros(K // 2) if theta is None else theta ** (-torch.arange(0, K, 2, dtype=torch.float64) / K)

        def by_hand(x, keys, values, queries, h, angles=angles):
            n, gamma = torch.arange(len(x)), 1 - 2 ** (-5.0 - h)

            def turned(z):
                return torch.complex(z[:, : K // 2], z[:, K // 2 :]) * torch.polar(
                    torch.ones(len(x), K // 2, dtype=torch.float64), n[:, None] * angles.double()
                )

            weights = torch.tril(gamma ** (n[:, None] - n).clamp(min=0).double())
            scores = [(turned(q) @ turned(keys).conj().T).real * weights / math.sqrt(K) for q in queries]
            return [list(s @ values) for s in scores]

        agrees(rule, by_hand)


def test_lightning():
    """MiniMax-01's code: slope 2^(−8i/h), i from 1, times 1 − l / (L − 1 + 1e-5) + 1e-5; SiLU of q and k, no scale."""
    for layer in (0, 2):
        rule, _ = build("lightning", depth=(layer, 3))

        def by_hand(x, keys, values, queries, h, layer=layer):
            slope = (1 / 2 ** (8 / PAIRS)) ** (h + 1) * (1 - layer / (2 + 1e-5) + 1e-5)

            def step(S, i):
                return math.exp(-slope) * S + torch.outer(silu(keys[i]), values[i])

            return scan(len(x), step, [lambda S, i, q=q: S.T @ silu(q[i]) for q in queries])

        agrees(rule, by_hand)


def test_hgrn2():
    """Qin et al. 2024: S ← Diag(f) S + (1 − f) vᵀ, f = γ + (1 − γ) σ(k), γ = 0 in the first layer."""
    for layer in (0, 2):
        rule, w = build("hgrn2", depth=(layer, 3))

        def by_hand(x, keys, values, queries, h, layer=layer, w=w):
            below, above = (layer * w["lower_bound"][h].exp(), 3 - layer) if layer else (torch.zeros(K), 3)
            gamma = below / (below + above)

            def step(S, i):
                f = gamma + (1 - gamma) * sigmoid(keys[i])
                return torch.diag(f) @ S + torch.outer(1 - f, values[i])

            return scan(len(x), step, [lambda S, i, q=q: S.T @ silu(q[i]) / math.sqrt(K) for q in queries])

        agrees(rule, by_hand)


def test_initial_lower_bound_of_hgrn2():
    """The authors' cumulative softmax over L layers with parameters 0: l / L."""
    for layer in (1, 4):
        rule = HybridMemory(8, 2, blend="fw-only", fast_weights="hgrn2", depth=(layer, 5)).fw
        log_f, keys = rule.forget(torch.tensor([-50.0]).double().expand(1, 1, 2, 4))
        close(log_f.exp(), torch.full((1, 1, 2, 4), layer / 5), 1e-6)
        close(keys, 1 - log_f.exp())


def mlstm_by_hand(w, cap=None, stabilised=False):
    """Beck et al. 2024, eqs. 19–27, with q scaled instead of k; with or without their stabilizer m."""

    def by_hand(x, keys, values, queries, h):
        def gate(name, i):
            logit = w[f"{name}_proj.weight"][h] @ x[i] + w[f"{name}_proj.bias"][h]
            return logit if cap is None else cap * torch.tanh(logit / cap)

        C, n, m = torch.zeros(K, V, dtype=torch.float64), torch.zeros(K, dtype=torch.float64), torch.tensor(-math.inf)
        out = [[] for _ in queries]
        for i in range(len(x)):
            log_i, log_f = gate("input", i), -softplus(-gate("forget", i))
            new = torch.maximum(log_f + m, log_i) if stabilised else torch.tensor(0.0)
            keep, add = (log_f + (m if stabilised else 0) - new).exp(), (log_i - new).exp()
            C, n, m = keep * C + add * torch.outer(keys[i], values[i]), keep * n + add * keys[i], new
            for q, reads in zip(queries, out, strict=True):
                read = q[i] / math.sqrt(K)
                reads.append(C.T @ read / torch.maximum((n @ read).abs(), (-m).exp()))
        return out

    return by_hand


@pytest.mark.parametrize("cap", [None, 2.0])
def test_mlstm(cap):
    rule, w = build("mlstm", gate_cap=cap)
    agrees(rule, mlstm_by_hand(w, cap))
    agrees(rule, mlstm_by_hand(w, cap, stabilised=True))


@pytest.mark.parametrize("large", [300.0, -300.0])
def test_exponents_of_mlstm_do_not_overflow(large):
    """e^1000 overflows in float64 and e^100 in float32; the gates differ by hundreds from token to token."""
    rule, w = build("mlstm", gate_cap=None)
    w["input_proj.weight"].data.mul_(300)
    w["input_proj.bias"].data.fill_(large)
    agrees(rule, mlstm_by_hand(w, stabilised=True))
    x, q, k, v = (torch.randn(2, 40, *shape).requires_grad_() for shape in ((10,), (4, K), (2, K), (2, V)))
    rule.float()
    out, state = rule(q, Write(k, v, rule.gates(rule.logits(x)), None), None, None)
    given = torch.autograd.grad(out.sum() + sum(part.sum() for part in state), [x, q, k, v, *rule.parameters()])
    assert all(part.isfinite().all() for part in (out, *state, *given))


def test_the_stabiliser_by_doubling_equals_the_recurrence():
    b, t, h = 3, 23, 2
    before, gain = normal(b, h).abs(), 20 * normal(b, t, h, seed=1)
    decay, marks = -normal(b, t, h, seed=2).abs(), normal(2, b, t, seed=3) > 1
    m, expected = before, []
    for i in range(t):
        m = torch.where(marks[0, :, i, None], 0, m)
        after = torch.maximum(m + decay[:, i], gain[:, i].clamp(min=0))
        m = torch.where(marks[1, :, i, None], m, after)
        expected.append(m)
    live = ~marks[1]
    given = (x.masked_fill(~live[..., None], 0) for x in (gain, decay))
    close(stabilisers(before, *given, marks[0], live), torch.stack(expected, dim=1))


def test_initial_gates_of_mlstm():
    rule = HybridMemory(8, 4, blend="fw-only", fast_weights="mlstm").fw
    assert not rule.input_proj.weight.any() and not rule.forget_proj.weight.any()
    assert rule.input_proj.bias.tolist() == [-10.0] * 4 and rule.forget_proj.bias.tolist() == [3.0, 4.0, 5.0, 6.0]


@pytest.mark.parametrize("name", ["lightning", "hgrn2"])
def test_models_set_the_depth_of_layers(name):
    config = HQLTConfig(
        hidden_size=8, num_heads=2, num_hidden_layers=3, vocab_size=5, fast_weights=name, layer_kinds=["fw", "kv", "fw"]
    )
    layers = HQLTForCausalLM(config).model.layers
    assert [layers[i].memory.fw.depth for i in (0, 2)] == [(0, 3), (2, 3)]
    agent = build_memory("synchronous", hidden_size=8, num_layers=2, fast_weights=name)
    assert [block.memory.fw.depth for block in agent.blocks] == [(0, 2), (1, 2)]
    for depth in ((2, 2), (-1, 3)):
        with pytest.raises(ValueError, match=r"depth: expected a layer's index \(from 0\) and the number of layers"):
            build(name, depth=depth)


def test_mamba2():
    """Dao, Gu 2024: h ← exp(dt A) h + dt B xᵀ, y = hᵀ C; D x is added by the blend."""
    rule, w = build("mamba2")

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


def test_initial_gates_of_mamba2():
    rule = HybridMemory(64, 16, fast_weights="mamba2", blend="fw-only", num_value_heads=512).fw
    A, dt = rule.A_log.exp(), F.softplus(rule.dt_bias)
    assert 1 <= A.min() < 1.5 and 15 < A.max() <= 16 and abs(A.mean() - 8.5) < 1
    assert 0.99e-3 < dt.min() < 2e-3 and 0.05 < dt.max() < 0.101 and abs(dt.log().mean() + 4.6) < 0.3
    assert (rule.D == 1).all()


@pytest.mark.parametrize("blend", ["synchronous", "delayed-streaming", "delayed-chunk"])
def test_a_skip_uses_the_values_of_the_reading_token(blend):
    """In a delayed blend the first token reads only its own values times D, those of its KV head."""
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
