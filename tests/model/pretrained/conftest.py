"""Tiny models of transformers in which all parameters are random, norms and biases too."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 8.0, "original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.0}
WINDOW = {"use_sliding_window": True, "sliding_window": 5}

MIXED: dict[str, Any] = {
    "num_hidden_layers": 3, "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 6, "linear_value_head_dim": 5,
}  # fmt: skip

MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama, all of it": {
        "model_type": "llama", "head_dim": 6, "num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True,
        "rope_parameters": LLAMA3, "rms_norm_eps": 1e-3,
    },
    "llama, tied": {"model_type": "llama", "tie_word_embeddings": True, "rope_parameters": LINEAR},
    "qwen2": {"model_type": "qwen2", "num_key_value_heads": 1, "tie_word_embeddings": True},
    "qwen2, windows above": {"model_type": "qwen2", **WINDOW, "max_window_layers": 1, "rope_parameters": YARN},
    "qwen3": {"model_type": "qwen3", "head_dim": 8, "num_key_value_heads": 2},
    "qwen3, all of it": {
        "model_type": "qwen3", "head_dim": 6, "num_key_value_heads": 1, "attention_bias": True, **WINDOW,
        "layer_types": ["sliding_attention", "full_attention"], "rope_parameters": YARN, "tie_word_embeddings": True,
    },
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "mistral, all of it": {
        "model_type": "mistral", "head_dim": 10, "num_key_value_heads": 1, "sliding_window": 3,
        "rope_parameters": LINEAR,
    },
    "qwen3_next": {"model_type": "qwen3_next", "num_experts": 0, **MIXED, "head_dim": 8, "num_key_value_heads": 2},
    "qwen3_5_text": {"model_type": "qwen3_5_text", **MIXED, "head_dim": 8, "num_key_value_heads": 1},
    "qwen3_5_text, all of it": {
        "model_type": "qwen3_5_text", **MIXED, "linear_conv_kernel_dim": 2, "tie_word_embeddings": True,
        "rope_parameters": {**YARN, "partial_rotary_factor": 0.5}, "head_dim": 16, "rms_norm_eps": 1e-3,
    },
    "olmo_hybrid": {"model_type": "olmo_hybrid", **MIXED, "rope_parameters": {"rope_theta": None}},
    "olmo_hybrid, all of it": {
        "model_type": "olmo_hybrid", **MIXED, "num_key_value_heads": 2, "attention_bias": True,
        "linear_allow_neg_eigval": False, "rope_parameters": {"rope_theta": 500.0}, "tie_word_embeddings": True,
    },
}  # fmt: skip


def config_for(**changes: Any) -> Any:
    sizes = {
        "vocab_size": 37,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 128,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    changes = sizes | copy.deepcopy(changes)  # transformers modifies these dicts
    if changes["model_type"] == "qwen3":
        changes.setdefault("head_dim", 4)  # the default is 128
    return AutoConfig.for_model(changes.pop("model_type"), **changes)


def model_for(**changes: Any) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_config(config_for(**changes)).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, mean=float("norm" in name), std=0.4, generator=generator)
    return model
