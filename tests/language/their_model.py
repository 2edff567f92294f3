"""The paper's code on a whole text, reimplemented from its equations with its tensor names, for tests."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Tensors = dict[str, Tensor]
HYBRID: dict[str, Any] = {
    "model_type": "hybrid_qlt",
    "attn_mode": "sync_chunk",
    "hidden_size": 16,
    "num_heads": 2,
    "num_hidden_layers": 2,
    "intermediate_size": 24,
    "vocab_size": 37,
    "chunk_size": 4,
    "qk_activation": "identity",
    "use_gate": False,
    "use_short_conv": False,
    "use_local_pos_encoding": True,
    "use_memory_gate": True,
    "head_dim": 256,
    "fuse_norm": True,
    "max_position_embeddings": 2048,
}
DELTA_NET: dict[str, Any] = {**HYBRID, "model_type": "delta_net", "attn_mode": "chunk", "qk_activation": "silu"}
GATED: dict[str, Any] = {
    "model_type": "gated_deltanet", **{name: HYBRID[name] for name in ("hidden_size", "num_heads", "vocab_size")},
    "num_hidden_layers": 2, "intermediate_size": 24, "head_dim": 6, "expand_v": 1.5, "num_v_heads": 4, "conv_size": 3,
    "use_short_conv": True, "use_gate": True,
}  # fmt: skip
TRANSFORMER: dict[str, Any] = {
    "model_type": "transformer",
    **{name: HYBRID[name] for name in ("hidden_size", "num_heads", "num_hidden_layers", "intermediate_size")},
    "vocab_size": 37,
}


def random_checkpoint(settings: dict[str, Any], seed: int = 0) -> Tensors:
    """Random tensors with the names and shapes of its models."""
    d, i, h = settings["hidden_size"], settings["intermediate_size"], settings["num_heads"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.embeddings": (settings["vocab_size"], d),
        "model.norm": (d,),
        "lm_head": (settings["vocab_size"], d),
    }
    for n in range(settings["num_hidden_layers"]):
        layer = f"model.layers.{n}"
        (heads, k), (value_heads, v) = widths(settings, n)
        shapes |= {f"{layer}.attn.{name}_proj": (heads * k, d) for name in "qk"}
        shapes |= {f"{layer}.attn.v_proj": (value_heads * v, d), f"{layer}.attn.o_proj": (d, value_heads * v)}
        shapes |= {f"{layer}.attn_norm": (d,), f"{layer}.mlp_norm": (d,), f"{layer}.mlp.down_proj": (d, i)}
        shapes |= {f"{layer}.mlp.{name}_proj": (i, d) for name in ("gate", "up")}
        if attends(settings, n):
            if (settings.get("attn") or {}).get("qkv_bias"):
                shapes |= {f"{layer}.attn.{name}_proj.bias": (heads * k,) for name in "qkv"}
            continue
        shapes |= {f"{layer}.attn.b_proj": (value_heads, d), f"{layer}.attn.o_norm": (v,)}
        if settings["model_type"] == "gated_deltanet":
            shapes |= {f"{layer}.attn.{name}": (value_heads,) for name in ("A_log", "dt_bias")}
            shapes |= {f"{layer}.attn.a_proj": (value_heads, d)}
        if settings["model_type"] == "hybrid_qlt":
            shapes |= {f"{layer}.attn.memory_gate_proj": (d, d)} if settings["use_memory_gate"] else {}
            shapes |= {f"{layer}.attn.memory_mixer": (2 * h, d)} if settings.get("use_memory_dynamic_scaler") else {}
        shapes |= {f"{layer}.attn.g_proj": (value_heads * v, d)} if settings["use_gate"] else {}
        if settings["use_short_conv"]:
            channels = {"q": heads * k, "k": heads * k, "v": value_heads * v}
            shapes |= {f"{layer}.attn.{name}_conv1d": (channels[name], 1, settings["conv_size"]) for name in "qkv"}
    generator = torch.Generator().manual_seed(seed)
    return {
        name if name.endswith(("A_log", "bias")) else f"{name}.weight": float(len(shape) == 1)
        + 0.4 * torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in shapes.items()
    }


def attends(settings: dict[str, Any], n: int) -> bool:
    """Whether a layer is plain attention."""
    return settings["model_type"] == "transformer" or n in (settings.get("attn") or {}).get("layers", [])


def widths(settings: dict[str, Any], n: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """(number, width) of key heads and of value heads."""
    d, h = settings["hidden_size"], settings["num_heads"]
    if attends(settings, n):
        heads = (settings.get("attn") or settings)["num_heads"]
        return ((heads, d // heads),) * 2
    if settings["model_type"] == "gated_deltanet":
        k = settings["head_dim"]
        return (h, k), (settings["num_v_heads"] or h, int(k * settings["expand_v"]))
    return (h, int(d * settings.get("expand_k", 1)) // h), (h, int(d * settings.get("expand_v", 1)) // h)


def logits_of(tensors: Tensors, settings: dict[str, Any], tokens: Tensor) -> Tensor:
    """tokens: [t] → [t, vocabulary], in one pass and in evaluation mode."""
    x = tensors["model.embeddings.weight"][tokens]
    for n in range(settings["num_hidden_layers"]):
        layer = {k.split(".", 3)[3]: v for k, v in tensors.items() if k.startswith(f"model.layers.{n}.")}
        x = x + attend(layer, settings, n, norm(x, layer["attn_norm.weight"]))
        y = norm(x, layer["mlp_norm.weight"])
        gate, up = y @ layer["mlp.gate_proj.weight"].T, y @ layer["mlp.up_proj.weight"].T
        x = x + (F.silu(gate) * up) @ layer["mlp.down_proj.weight"].T
    return norm(x, tensors["model.norm.weight"]) @ tensors["lm_head.weight"].T


def attend(layer: Tensors, settings: dict[str, Any], n: int, x: Tensor) -> Tensor:
    (h, k_width), (value_heads, _) = widths(settings, n)
    q, k, v = (
        F.linear(x, layer[f"attn.{name}_proj.weight"], layer.get(f"attn.{name}_proj.bias")) for name in "qkv"
    )  # fmt: skip
    between = settings.get("attn") or {}
    if attends(settings, n):
        q, k, v = (part.unflatten(-1, (h, -1)) for part in (q, k, v))
        window, theta = between.get("window_size") or settings.get("window_size"), between.get("rope_theta", 10_000.0)
        read = softmax_read(rotate(q, theta), rotate(k, theta), v, window or len(x))
        return read.flatten(1) @ layer["attn.o_proj.weight"].T
    if settings["use_short_conv"]:
        q, k, v = (convolve(part, layer[f"attn.{n}_conv1d.weight"]) for n, part in zip("qkv", (q, k, v), strict=True))
    q, k = (part.unflatten(-1, (h, k_width)).repeat_interleave(value_heads // h, dim=1) for part in (q, k))
    v = F.silu(v).unflatten(-1, (value_heads, -1))
    beta = (1 + settings.get("allow_neg_eigval", False)) * (x @ layer["attn.b_proj.weight"].T).sigmoid()
    if settings["model_type"] == "delta_net":
        out = delta_read(phi(q), phi(k), v, beta)
    elif settings["model_type"] == "gated_deltanet":
        dt = F.softplus(x @ layer["attn.a_proj.weight"].T + layer["attn.dt_bias"])
        out = delta_read(phi(q), phi(k), v, beta, alpha=(-layer["attn.A_log"].exp() * dt).exp())
    else:
        out = blend(layer, settings, x, q, k, v, 2 * beta)
    out = norm(out, layer["attn.o_norm.weight"])
    if settings["use_gate"]:
        gate = torch.sigmoid if settings.get("output_gate_activation") == "sigmoid" else F.silu
        out = out * gate(x @ layer["attn.g_proj.weight"].T).unflatten(-1, (value_heads, -1))
    return out.flatten(1) @ layer["attn.o_proj.weight"].T


def blend(layer: Tensors, settings: dict[str, Any], x: Tensor, q: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> Tensor:
    s, h, t = settings["chunk_size"], settings["num_heads"], len(x)
    positions = settings["use_local_pos_encoding"]
    q_kv, k_kv = (rotate(q), rotate(k)) if positions else (q, k)
    match settings["attn_mode"]:
        case "sync_chunk":
            kv, fw = softmax_read(q_kv, k_kv, v, s), delta_read(phi(q), phi(k), v, beta)
        case "delayed":
            shift = (0, 0, 0, 0, s, 0)
            kv = softmax_read(q_kv, k_kv, v, s)
            fw = delta_read(phi(q), F.pad(phi(k), shift)[:t], F.pad(v, shift)[:t], beta)
        case "chunk":
            begins = torch.arange(t) // s * s
            kv = softmax_read(q_kv, k_kv, v, s, begins)
            fw = delta_read(phi(q), phi(k), v, beta, begins)
    if settings["use_memory_gate"]:
        gate = (x @ layer["attn.memory_gate_proj.weight"].T).sigmoid().unflatten(-1, (h, -1))
        return gate * fw + (1 - gate) * kv
    if settings.get("use_memory_dynamic_scaler"):
        a, b = (x @ layer["attn.memory_mixer.weight"].T).sigmoid().chunk(2, dim=-1)
        return a[..., None] * fw + b[..., None] * kv
    return fw + kv


def softmax_read(q: Tensor, k: Tensor, v: Tensor, window: int, begins: Tensor | None = None) -> Tensor:
    scores = torch.einsum("thk,lhk->htl", q, k) / k.shape[-1] ** 0.5
    i = torch.arange(len(q))
    seen = (i <= i[:, None]) & (i > i[:, None] - window)
    if begins is not None:
        seen &= i >= begins[:, None]
    return torch.einsum("htl,lhv->thv", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


def delta_read(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, begins: Tensor | None = None, alpha: Tensor | None = None
) -> Tensor:
    """Reads after each write, with decay alpha before it. With `begins`, reads only what was written before the
    chunk's first token.
    """
    state = torch.zeros(k.shape[1], k.shape[2], v.shape[2], dtype=q.dtype)
    states = [state]
    for t in range(len(q)):
        state = state if alpha is None else alpha[t, :, None, None] * state
        error = v[t] - torch.einsum("hk,hkv->hv", k[t], state)
        state = state + beta[t, :, None, None] * k[t, :, :, None] * error[:, None]
        states.append(state)
    read = torch.stack([states[t + 1 if begins is None else int(begins[t])] for t in range(len(q))])
    return torch.einsum("thk,thkv->thv", q, read) / k.shape[-1] ** 0.5


def convolve(x: Tensor, weight: Tensor) -> Tensor:
    before = weight.shape[-1] - 1
    return F.conv1d(F.pad(x.T, (before, 0)), weight, groups=len(weight)).T


def phi(x: Tensor) -> Tensor:
    x = F.silu(x)
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def rotate(x: Tensor, theta: float = 10_000.0) -> Tensor:
    t, k = x.shape[0], x.shape[-1]
    angle = torch.arange(t)[:, None] * theta ** (-torch.arange(0, k, 2, dtype=torch.float64) / k)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
