"""Reading GGUF files of llama.cpp: their fields as a config of transformers, their tensors with transformers' names.

Every tensor, and every field that a model depends on, is either understood or refused; nothing is skipped silently.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PreTrainedConfig

from hqlt.memory.rotary import Rotary, llama3
from hqlt.model.pretrained.weights import shapes_of
from hqlt.registry import check_choice

FAMILIES = {"llama": True, "qwen2": False, "qwen3": False}
"""`general.architecture`, which equals transformers' model_type → whether llama.cpp applies the rotary embedding to
adjacent dimensions instead of halves, and so stores the rows of q and k in another order. Mistral, SmolLM and SmolLM2
are stored as "llama"."""

FIELDS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
"""Fields after the prefix of the architecture's name → fields of transformers' configs."""
ROPE = {
    "rope.freq_base": "rope_theta",
    "rope.scaling.type": "rope_type",
    "rope.scaling.factor": "factor",
    "rope.scaling.original_context_length": "original_max_position_embeddings",
}
"""Fields → entries of transformers' `rope_parameters`."""
WITHOUT_EFFECT = ("vocab_size", "rope.scaling.finetuned")
SPECIAL = {"bos": "bos_token_id", "eos": "eos_token_id", "padding": "pad_token_id"}

TENSORS = {
    "token_embd": "embed_tokens", "output_norm": "norm", "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm", "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
"""Names of a model's parts → transformers' names. `output` is the head, outside the model."""
ROPE_FREQUENCIES = "rope_freqs.weight"
LLAMA3: dict[str, Any] = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""The scaling of all Llamas since 3.1. A file does not hold these numbers but the frequencies computed from them."""


class Gguf(NamedTuple):
    """The content of a GGUF file."""

    file: Path
    fields: dict[str, Any]
    """Metadata by name: numbers, strings and lists."""
    stored: dict[str, Any]
    """Tensors by name, still quantized, as objects of the package gguf."""

    def quantizations(self) -> str:
        """Count the tensors by type, such as "210 of Q4_1, 61 of F32"."""
        kinds = Counter(tensor.tensor_type.name for tensor in self.stored.values())
        return ", ".join(f"{n} of {kind}" for kind, n in kinds.most_common())


def is_gguf(file: Path) -> bool:
    """Whether the file has the signature of a GGUF file."""
    if not file.is_file():
        return False
    with file.open("rb") as opened:
        return opened.read(4) == b"GGUF"


def read_gguf(file: Path) -> Gguf:
    """Read a GGUF file.

    Raises:
        ValueError: when the file is damaged or holds only a part of a model.
        ModuleNotFoundError: when the package gguf is not installed.
    """
    import gguf

    try:
        reader = gguf.GGUFReader(file)
        fields = {name: _plain(field.contents()) for name, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise ValueError(f"{file}: expected a complete GGUF file, got {type(error).__name__}: {error}") from error
    if fields.get("general.type", "model") != "model" or fields.get("split.count", 1) > 1:
        part = f"1 of {fields['split.count']}" if "split.count" in fields else f"type {fields['general.type']!r}"
        raise ValueError(
            f"{file}: expected a complete model in one file, got {part}; merge parts with llama-gguf-split --merge"
        )
    return Gguf(file, fields, {tensor.name: tensor for tensor in reader.tensors})


def _plain(value: Any) -> Any:
    """Convert float32 to the float with the shortest decimal form: 1e-05 instead of 9.999999747378752e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def config_in(gguf: Gguf) -> PreTrainedConfig:
    """The config of transformers that a file's fields describe.

    Raises:
        ValueError: when the architecture is unknown, or a field has no equivalent in transformers.
    """
    architecture = str(gguf.fields.get("general.architecture"))
    check_choice("general.architecture", architecture, FAMILIES)
    fields = {
        name.removeprefix(f"{architecture}."): value
        for name, value in gguf.fields.items()
        if name.startswith(f"{architecture}.")
    }
    values = {theirs: fields.pop(name) for name, theirs in FIELDS.items() if name in fields}
    try:
        values.setdefault("head_dim", values["hidden_size"] // values["num_attention_heads"])
        values["vocab_size"] = int(gguf.stored["token_embd.weight"].shape[1])
    except (KeyError, IndexError, TypeError, ZeroDivisionError) as error:
        raise ValueError(f"{gguf.file}: expected a model's sizes and embeddings, got {error!r}") from error
    values["rope_parameters"] = _pop_rope(gguf, fields, values["head_dim"])
    values["tie_word_embeddings"] = "output.weight" not in gguf.stored
    values["attention_bias"] = "blk.0.attn_q.bias" in gguf.stored
    values["mlp_bias"] = "blk.0.ffn_up.bias" in gguf.stored
    for name, theirs in SPECIAL.items():
        values[theirs] = gguf.fields.get(f"tokenizer.ggml.{name}_token_id")
    expected = {
        "rope.dimension_count": values["head_dim"], "attention.value_length": values["head_dim"],
        "attention.causal": True, "expert_count": 0, "expert_used_count": 0,
    }  # fmt: skip
    for name, value in fields.items():
        if name not in WITHOUT_EFFECT and (name not in expected or value != expected[name]):
            only = expected.get(name, "no such field")
            raise ValueError(f"{architecture}.{name}: expected {only}, which is what our layers have, got {value!r}")
    try:
        config: PreTrainedConfig = AutoConfig.for_model(architecture, **values)
    except (StrictDataclassError, KeyError, TypeError) as error:
        what = " ".join(str(error).split())
        raise ValueError(f"{gguf.file}: expected the fields of a {architecture}, got {what}") from error
    return config


def _pop_rope(gguf: Gguf, fields: dict[str, Any], head_dim: int) -> dict[str, Any]:
    """The `rope_parameters` of the config; removes their fields from `fields`.

    Raises:
        ValueError: when the file holds frequency divisors other than those of a Llama 3.
    """
    rope = {theirs: fields.pop(name) for name, theirs in ROPE.items() if name in fields}
    rope.setdefault("rope_theta", 10_000.0)
    if rope.get("rope_type", "none") == "none":
        rope = {"rope_theta": rope["rope_theta"], "rope_type": "default"}
    elif rope["rope_type"] == "linear":
        rope.pop("original_max_position_embeddings", None)
    if ROPE_FREQUENCIES in gguf.stored:
        divisors = _dequantized(gguf, ROPE_FREQUENCIES).double()
        options = {"factor": float(divisors.max()), **LLAMA3}
        f, _ = Rotary(rope["rope_theta"]).frequencies(head_dim)
        expected = f / llama3(f, rope["rope_theta"], **options)[0]
        if divisors.shape != expected.shape or not torch.allclose(divisors, expected, rtol=1e-5):
            raise ValueError(
                f"{ROPE_FREQUENCIES}: expected the divisors of a Llama 3, computed from {options}, got "
                f"{divisors.tolist()}"
            )
        rope |= {"rope_type": "llama3", **options}
    return rope


def tensors_in(gguf: Gguf, config: PreTrainedConfig) -> dict[str, Tensor]:
    """All tensors of a file, dequantized to float32, with transformers' names and order of rows.

    Raises:
        ValueError: when tensors do not match the config, or `gguf` cannot dequantize them.
    """
    names = {name: their_name(name) for name in gguf.stored if name != ROPE_FREQUENCIES}
    shapes = shapes_of(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], config)
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    tensors = {theirs: _dequantized(gguf, name) for name, theirs in names.items() if theirs in shapes}
    wrong = {
        "unknown": [name for name, theirs in names.items() if theirs not in shapes],
        "missing": [theirs for theirs in shapes if theirs not in tensors],
        "with another shape": [name for name, tensor in tensors.items() if tensor.shape != shapes[name]],
    }
    if errors := [f"{len(some)} {what}, such as {min(some)}" for what, some in wrong.items() if some]:
        raise ValueError(f"{gguf.file}: expected the tensors of a {config.model_type}, got {'; '.join(errors)}")
    if FAMILIES[config.model_type]:
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        for name, tensor in tensors.items():
            if h := heads.get(name.split(".")[-2]):
                tensors[name] = tensor.unflatten(0, (h, -1, 2)).transpose(1, 2).flatten(0, 2)
    return tensors


def their_name(name: str) -> str | None:
    """transformers' name of a tensor, or None if it is unknown."""
    found = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    if not found:
        return None
    layer, part, leaf = found.groups()
    if part == "output":
        return f"lm_head.{leaf}"
    return f"model.{f'layers.{layer}.' if layer else ''}{TENSORS.get(part, part)}.{leaf}"


def _dequantized(gguf: Gguf, name: str) -> Tensor:
    from gguf import dequantize

    stored = gguf.stored[name]
    try:
        values = dequantize(stored.data, stored.tensor_type)
    except NotImplementedError as error:
        raise ValueError(
            f"{name}: expected a quantization that the package gguf can dequantize, got {stored.tensor_type.name}"
        ) from error
    return torch.from_numpy(np.array(values, dtype=np.float32))
