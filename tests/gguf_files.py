"""Writing GGUF files of tiny models in the format of llama.cpp's converter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, trainers
from torch import Tensor
from transformers import PreTrainedModel

PARTS = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def fields_of(model: PreTrainedModel) -> dict[str, Any]:
    """The fields of a model's file."""
    config: Any = model.config
    return {f"{config.model_type}.{name}": value for name, value in {
        "context_length": config.max_position_embeddings, "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers, "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads, "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head_dim(config), "attention.value_length": head_dim(config),
        "rope.dimension_count": head_dim(config), "vocab_size": config.vocab_size,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": config.rope_parameters["rope_theta"],
    }.items()}  # fmt: skip


def head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def tensors_of(model: PreTrainedModel) -> dict[str, np.ndarray]:
    """The tensors with llama.cpp's names. In heads of q and k of a Llama, the two halves are interleaved."""
    config: Any = model.config
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        part, _, leaf = name.rpartition(".")
        layer, _, rest = part.removeprefix("model.layers.").partition(".")
        new, prefix = (PARTS[rest], f"blk.{layer}.") if layer.isdigit() else (PARTS[part], "")
        if config.model_type == "llama" and new in heads:
            tensor = tensor.reshape(heads[new], 2, -1, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)
        tensors[f"{prefix}{new}.{leaf}"] = tensor.float().numpy()
    return tensors


def write_gguf(
    file: Path, fields: dict[str, Any], tensors: dict[str, np.ndarray], quantization: str | None = None
) -> dict[str, Tensor]:
    """quantization: of matrices, in the package's words. What their values are thereafter."""
    import gguf

    architecture = next(name.split(".")[0] for name in fields if name.endswith(".block_count"))
    writer = gguf.GGUFWriter(file, architecture)
    for name, value in fields.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add.get(type(value), writer.add_array)(name, value)
    values = {}
    for name, tensor in tensors.items():
        kind = gguf.GGMLQuantizationType[quantization if quantization and tensor.ndim > 1 else "F32"]
        stored = gguf.quantize(tensor, kind)
        writer.add_tensor(name, stored, raw_dtype=kind)
        values[name] = torch.from_numpy(np.array(gguf.dequantize(stored, kind)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


def tokenizer_fields(tokenizer: Any, pre: str, special: list[str]) -> dict[str, Any]:
    """The fields of a byte-level BPE of `tokenizers` whose special tokens come first."""
    import json

    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    return {f"tokenizer.ggml.{name}": value for name, value in {
        "model": "gpt2", "pre": pre, "tokens": tokens, "merges": [" ".join(pair) for pair in model["merges"]],
        "token_type": [3 if token in special else 1 for token in tokens], "bos_token_id": 0, "eos_token_id": 1,
    }.items()}  # fmt: skip


def trained(pre_tokenizer: Any, texts: list[str], size: int, special: list[str], **options: Any) -> Any:
    """Train a byte-level BPE of `tokenizers` with this pre-tokenizer."""
    from tokenizers import pre_tokenizers

    tokenizer: Any = Tokenizer(models.BPE(**options))
    tokenizer.pre_tokenizer = pre_tokenizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    return tokenizer
