"""Layers agree with those of transformers with the same random weights: in one call, token by token, and left-padded.

(Gated DeltaNet is tested in whole models: `tests/model/pretrained`.)
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, DynamicCache

from hqlt import HybridMemory
from tests.float64 import in_float64
from tests.laws import close, normal

BATCH, LENGTH, HIDDEN, HEADS, WIDTH, GROUPS, STATE = 3, 21, 16, 4, 8, 2, 5
SIZES = {"vocab_size": 8, "hidden_size": HIDDEN, "num_hidden_layers": 2}
Weights = dict[str, Tensor]


class KimiLinear:
    """Kimi delta attention. Its low-rank output gate is the product of two maps in ours."""

    model = "kimi_linear"
    options: dict[str, Any] = {  # noqa: RUF012
        "fast_weights": "kda", "num_heads": HEADS, "head_dim": WIDTH, "conv_size": 4, "output_gate": "sigmoid",
    }  # fmt: skip

    def __init__(self, code: Any) -> None:
        heads = {"num_attention_heads": HEADS, "num_key_value_heads": HEADS, "linear_num_heads": HEADS}
        layers = {"layer_types": ["linear_attention"] * 2, "linear_head_dim": WIDTH}
        self.config = CONFIG_MAPPING["kimi_linear"](**SIZES, **heads, **layers, rms_norm_eps=1e-6)
        self.layer = code.KimiLinearDeltaAttention(self.config, 0)

    def weights(self, w: Weights) -> Weights:
        return {
            **{f"{name}.weight": w[f"{name}.weight"] for name in ("q_proj", "k_proj", "v_proj", "o_norm", "o_proj")},
            "conv.weight": w["conv1d.weight"].squeeze(1),
            "g_proj.weight": w["g_b_proj.weight"] @ w["g_a_proj.weight"],
            "fw.beta_proj.weight": w["b_proj.weight"],
            "fw.decay_proj.down.weight": w["forget_gate.f_a_proj.weight"],
            "fw.decay_proj.up.weight": w["forget_gate.f_b_proj.weight"],
            "fw.A_log": w["forget_gate.A_log"].flatten(),
            "fw.dt_bias": w["forget_gate.dt_bias"],
        }

    def cache(self) -> Any:
        return DynamicCache(config=self.config)

    def run(self, x: Tensor, cache: Any = None, mask: Tensor | None = None) -> Tensor:
        name = "cache" if "cache" in inspect.signature(self.layer.forward).parameters else "cache_params"  # before 5.24
        y: Tensor = self.layer(x, attention_mask=mask, **{name: cache})
        return y


class Mamba2(KimiLinear):
    """Mamba-2. C, B and x are q, k and v here; the heads of a group share C and B."""

    model = "mamba2"
    options: dict[str, Any] = {  # noqa: RUF012
        "fast_weights": "mamba2", "num_heads": GROUPS, "head_dim": STATE, "num_value_heads": HEADS, "value_dim": WIDTH,
        "conv_size": 4, "output_gate": "silu", "head_norm": "group", "norm_after_gate": True, "norm_eps": 1e-5,
    }  # fmt: skip

    def __init__(self, code: Any) -> None:
        heads = {"num_heads": HEADS, "head_dim": WIDTH, "state_size": STATE, "n_groups": GROUPS}
        self.config = CONFIG_MAPPING["mamba2"](**SIZES, **heads, expand=2, chunk_size=8, use_conv_bias=False)
        self.layer = code.Mamba2Mixer(self.config, 0)
        if not hasattr(self.layer.norm, "group_size"):  # older versions normalize all heads together
            self.options = self.options | {"head_norm": "full"}

    def weights(self, w: Weights) -> Weights:
        inner, of_group = HEADS * WIDTH, GROUPS * STATE
        z, v, k, q, dt = w["in_proj.weight"].split([inner, inner, of_group, of_group, HEADS])
        of_v, of_k, of_q = w["conv1d.weight"].squeeze(1).split([inner, of_group, of_group])
        return {
            "q_proj.weight": q, "k_proj.weight": k, "v_proj.weight": v, "g_proj.weight": z, "fw.dt_proj.weight": dt,
            "conv.weight": torch.cat([of_q, of_k, of_v]), "o_proj.weight": w["out_proj.weight"],
            "g_norm.weight": w["norm.weight"], **{f"fw.{name}": w[name] for name in ("A_log", "dt_bias", "D")},
        }  # fmt: skip


class XLSTM(KimiLinear):
    """xLSTM. Its norm subtracts the mean of each head, which v_proj does here."""

    model = "xlstm"
    options: dict[str, Any] = {  # noqa: RUF012
        "fast_weights": "mlstm", "num_heads": HEADS, "head_dim": WIDTH // 2, "value_dim": WIDTH, "gate_cap": 5.0,
        "output_gate": "sigmoid", "head_norm": "group", "fw_activation": None,
    }  # fmt: skip

    def __init__(self, code: Any) -> None:
        factors = {"v_dim_factor": 2.0, "qk_dim_factor": 1.0, "num_heads": HEADS}
        config = CONFIG_MAPPING["xlstm"](**SIZES, **factors, gate_soft_cap=5.0, eps=0.0)
        self.layer = code.xLSTMLayer(config)

    def weights(self, w: Weights) -> Weights:
        v = w["v.weight"].unflatten(0, (HEADS, WIDTH))
        return {
            "q_proj.weight": w["q.weight"], "k_proj.weight": w["k.weight"], "g_proj.weight": w["ogate_preact.weight"],
            "v_proj.weight": (v - v.mean(dim=1, keepdim=True)).flatten(0, 1), "o_proj.weight": w["out_proj.weight"],
            "o_norm.weight": w["multihead_norm.weight"],
            **{f"fw.input_proj.{name}": w[f"igate_preact.{name}"] for name in ("weight", "bias")},
            **{f"fw.forget_proj.{name}": w[f"fgate_preact.{name}"] for name in ("weight", "bias")},
        }  # fmt: skip

    def cache(self) -> Any:
        return {}

    def run(self, x: Tensor, cache: Any = None, mask: Tensor | None = None) -> Tensor:
        if mask is not None:
            pytest.skip("xLSTM's layer takes no mask")
        y: Tensor
        y, state = self.layer(x, (cache or {}).get("state"))
        if cache is not None:
            cache["state"] = state
        return y


class MiniMax(KimiLinear):
    """Lightning attention."""

    model = "minimax"
    options: dict[str, Any] = {  # noqa: RUF012
        "fast_weights": "lightning", "depth": (1, 3), "num_heads": HEADS, "head_dim": WIDTH, "head_norm": "full",
        "output_gate": "sigmoid",
    }  # fmt: skip

    def __init__(self, code: Any) -> None:
        heads = {"num_attention_heads": HEADS, "num_key_value_heads": HEADS, "head_dim": WIDTH}
        config = CONFIG_MAPPING["minimax"](**{**SIZES, "num_hidden_layers": 3}, **heads, block_size=8)
        self.layer, self.new_cache = code.MiniMaxLightningAttention(config, 1).double(), code.MiniMaxCache
        base = torch.exp2(-8 / HEADS * torch.arange(1, HEADS + 1, dtype=torch.float64))
        self.layer.slope_rate = (base * (1 - 1 / (2 + 1e-5) + 1e-5))[:, None, None]  # in float64 instead of float32
        factors = self.layer.decay_factors(self.layer.slope_rate)
        self.layer.query_decay, self.layer.key_decay, self.layer.diagonal_decay = factors

    def weights(self, w: Weights) -> Weights:
        parts = w["qkv_proj.weight"].unflatten(0, (HEADS, 3, WIDTH)).unbind(1)
        return {
            **{f"{name}_proj.weight": part.flatten(0, 1) for name, part in zip("qkv", parts, strict=True)},
            "g_proj.weight": w["output_gate.weight"],
            "o_norm.weight": w["norm.weight"],
            "o_proj.weight": w["out_proj.weight"],
        }

    def cache(self) -> Any:
        return self.new_cache()

    def run(self, x: Tensor, cache: Any = None, mask: Tensor | None = None) -> Tensor:
        y: Tensor = self.layer(x, None, mask, cache)[0]
        return y


class Pair(NamedTuple):
    theirs: Any
    ours: HybridMemory


@pytest.fixture(params=[KimiLinear, Mamba2, XLSTM, MiniMax])
def pair(request, monkeypatch):
    """A layer of transformers and the equivalent one of hqlt, in float64."""
    theirs = request.param(in_float64(request.param.model, monkeypatch))
    for i, weight in enumerate(theirs.layer.parameters()):
        weight.data = 0.6 * normal(*weight.shape, seed=i) + float(weight.dim() == 1)
    theirs.layer.double().eval()
    ours = HybridMemory(HIDDEN, blend="fw-only", **theirs.options).double()
    ours.load_state_dict(theirs.weights({name: weight.detach() for name, weight in theirs.layer.named_parameters()}))
    return Pair(theirs, ours)


def test_one_pass(pair):
    x = normal(BATCH, LENGTH, HIDDEN)
    close(pair.ours(x)[0], pair.theirs.run(x))


def test_left_padding(pair):
    """Resets in hqlt and an attention mask in transformers, for rows with 0, 7 and 14 tokens of padding."""
    x, padding = normal(BATCH, LENGTH, HIDDEN), torch.tensor([0, 7, 14])
    where = torch.arange(LENGTH)[None]
    y, _ = pair.ours(x, resets=where == padding[:, None])
    real = where >= padding[:, None]
    close(y[real], pair.theirs.run(x, mask=real.long())[real])


def test_token_by_token(pair):
    x, cache, state = normal(BATCH, LENGTH, HIDDEN), pair.theirs.cache(), None
    for begin, end in ((0, 5), *((t, t + 1) for t in range(5, LENGTH))):
        y, state = pair.ours(x[:, begin:end], state)
        close(y, pair.theirs.run(x[:, begin:end], cache))
