"""The layer from the paper's equations, in NumPy, one row and one token at a time, independent of hqlt.

The contents of each memory are listed token by token from the definition of the blend; no state is carried.
"""

from __future__ import annotations

import numpy as np


def layer(weights, x, resets=None, *, num_heads, window, blend, mixer, fast_weights, beta_max, rope_theta, norm_eps):
    """Return y [t, hidden] for x [t, hidden] and resets [t]; weights are named as in the layer's state_dict."""
    starts = [0] + ([] if resets is None else [t for t in range(1, len(x)) if resets[t]])
    ends = [*starts[1:], len(x)]
    options = (num_heads, window, blend, mixer, fast_weights, beta_max, rope_theta, norm_eps)
    return np.concatenate([segment(weights, x[i:j], *options) for i, j in zip(starts, ends, strict=True)])


def segment(weights, x, num_heads, window, blend, mixer, fast_weights, beta_max, rope_theta, norm_eps):
    width = x.shape[1] // num_heads
    W_q, W_k, W_v, W_o = (weights[f"{name}_proj.weight"] for name in "qkvo")
    y = np.zeros_like(x)
    for t in range(len(x)):
        heads = []
        for h in range(num_heads):
            part = slice(h * width, (h + 1) * width)
            q, k = x @ W_q[part].T, x @ W_k[part].T
            v = silu(x @ W_v[part].T)
            beta = None if fast_weights == "linear" else beta_max * sigmoid(x @ weights["fw.beta_proj.weight"][h])
            in_kv, writes = holdings(blend, t, window)
            b = read_kv(q[t], [(k[j], v[j], j) for j in in_kv], t, rope_theta)
            if fast_weights == "delta":
                a = read_delta(q[t], [(k[j], v[j], beta[when]) for j, when in writes])
            else:
                a = read_linear(q[t], [(k[j], v[j]) for j, _ in writes])
            heads.append(rms_norm(mix(weights, mixer, x[t], a, b, h, num_heads), norm_eps) * weights["o_norm.weight"])
        y[t] = W_o @ np.concatenate(heads)
    return y


def holdings(blend, t, window):
    """Return the tokens in the KV-memory at t, and (token, step whose β writes it) of the FW-memory read at t."""
    if blend == "synchronous":
        return range(max(t - window + 1, 0), t + 1), [(j, j) for j in range(t + 1)]
    if blend == "delayed-streaming":
        return range(max(t - window + 1, 0), t + 1), [(j, j + window) for j in range(t - window + 1)]
    if blend == "delayed-chunk":
        chunk = t // window * window
        return range(chunk, t + 1), [(j, j) for j in range(chunk)]
    raise ValueError(blend)


def read_kv(q, pairs, t, rope_theta):
    scores = np.array([rotate(q, t, rope_theta) @ rotate(k, j, rope_theta) for k, _, j in pairs]) / np.sqrt(len(q))
    weight = np.exp(scores - scores.max())
    return sum(w * v for w, (_, v, _) in zip(weight / weight.sum(), pairs, strict=True))


def rotate(x, position, theta):
    if theta is None:
        return x
    half = len(x) // 2
    z = x[:half] + 1j * x[half:]
    z = z * np.exp(1j * position * theta ** (-2 * np.arange(half) / len(x)))
    return np.concatenate([z.real, z.imag])


def read_delta(q, writes):
    W = np.zeros((len(q), len(q)))  # rows: values, columns: keys
    for k, v, beta in writes:
        phi = unit(silu(k))
        W = W + beta * np.outer(v - W @ phi, phi)
    return W @ unit(silu(q)) / np.sqrt(len(q))


def read_linear(q, writes):
    if not writes:
        return np.zeros_like(q)
    weight = np.array([elu(k) @ elu(q) for k, _ in writes])
    return sum(w * v for w, (_, v) in zip(weight, writes, strict=True)) / (weight.sum() + 1e-10)


def mix(weights, mixer, x, a, b, h, num_heads):
    if mixer == "sum":
        return a + b
    gate = sigmoid(weights["mixer.gate_proj.weight"] @ x)
    if mixer == "scalar":
        return gate[h] * a + gate[num_heads + h] * b
    gamma = gate[h * len(a) : (h + 1) * len(a)]
    return gamma * a + (1 - gamma) * b


def rms_norm(x, eps):
    return x / np.sqrt((x**2).mean() + eps)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def elu(x):
    return np.where(x > 0, x, np.exp(x) - 1) + 1


def unit(x):
    return x / np.sqrt(x @ x + 1e-6)
