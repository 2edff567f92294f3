"""GGUF files, as llama.cpp reads them: their fields as a config of transformers, their tensors under its names.

Every field that a model depends on and every tensor is understood or refused; nothing is skipped in silence.
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
"""`general.architecture`, which is transformers' model_type too, and whether llama.cpp turns neighbours in a head of q
and k, not halves, so that their rows stand in another order. Mistral, SmolLM and SmolLM2 are Llamas there."""

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
"""Fields behind the architecture's name, and what transformers' configs call them."""
ROPE = {
    "rope.freq_base": "rope_theta",
    "rope.scaling.type": "rope_type",
    "rope.scaling.factor": "factor",
    "rope.scaling.original_context_length": "original_max_position_embeddings",
}
"""And what their `rope_parameters` do."""
WITHOUT_EFFECT = ("vocab_size", "rope.scaling.finetuned")
SPECIAL = {"bos": "bos_token_id", "eos": "eos_token_id", "padding": "pad_token_id"}

TENSORS = {
    "token_embd": "embed_tokens", "output_norm": "norm", "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm", "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
"""Parts of a model there and in transformers; `output` is the head, outside the model."""
ROPE_FREQUENCIES = "rope_freqs.weight"
LLAMA3: dict[str, Any] = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""Of all Llamas since 3.1: a file holds the frequencies that follow from it, not these numbers."""


class Gguf(NamedTuple):
    file: Path
    fields: dict[str, Any]
    """Numbers, strings and lists, by name."""
    stored: dict[str, Any]
    """The tensors, quantized, in the package's form."""

    def quantizations(self) -> str:
        """What the tensors are stored as: 210 of Q4_1, 61 of F32."""
        kinds = Counter(tensor.tensor_type.name for tensor in self.stored.values())
        return ", ".join(f"{n} of {kind}" for kind, n in kinds.most_common())


def is_gguf(file: Path) -> bool:
    """Whether the file begins as all GGUF files do."""
    if not file.is_file():
        return False
    with file.open("rb") as opened:
        return opened.read(4) == b"GGUF"


def read_gguf(file: Path) -> Gguf:
    """Raises ValueError for a file that is not whole or a part of a model, ModuleNotFoundError without `gguf`."""
    import gguf

    try:
        reader = gguf.GGUFReader(file)
        fields = {name: _plain(field.contents()) for name, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise ValueError(f"{file}: expected a whole GGUF file, got {type(error).__name__}: {error}") from error
    if fields.get("general.type", "model") != "model" or fields.get("split.count", 1) > 1:
        part = f"1 of {fields['split.count']}" if "split.count" in fields else f"type {fields['general.type']!r}"
        raise ValueError(f"{file}: expected a whole model in one file (llama-gguf-split --merge makes one), got {part}")
    return Gguf(file, fields, {tensor.name: tensor for tensor in reader.tensors})


def _plain(value: Any) -> Any:
    """Numbers in float32 as the shortest decimal that means them: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def config_in(gguf: Gguf) -> PreTrainedConfig:
    """Raises ValueError for another architecture, and for a field that no model of transformers would follow."""
    architecture = str(gguf.fields.get("general.architecture"))
    check_choice("general.architecture", architecture, FAMILIES)
    said = {
        name.removeprefix(f"{architecture}."): value
        for name, value in gguf.fields.items()
        if name.startswith(f"{architecture}.")
    }
    values = {theirs: said.pop(name) for name, theirs in FIELDS.items() if name in said}
    try:
        values.setdefault("head_dim", values["hidden_size"] // values["num_attention_heads"])
        values["vocab_size"] = int(gguf.stored["token_embd.weight"].shape[1])
    except (KeyError, IndexError, TypeError, ZeroDivisionError) as error:
        raise ValueError(f"{gguf.file}: expected a model's sizes and embeddings, got {error!r}") from error
    values["rope_parameters"] = _rope(gguf, said, values["head_dim"])
    values["tie_word_embeddings"] = "output.weight" not in gguf.stored
    values["attention_bias"] = "blk.0.attn_q.bias" in gguf.stored
    values["mlp_bias"] = "blk.0.ffn_up.bias" in gguf.stored
    for name, theirs in SPECIAL.items():
        values[theirs] = gguf.fields.get(f"tokenizer.ggml.{name}_token_id")
    expected = {
        "rope.dimension_count": values["head_dim"], "attention.value_length": values["head_dim"],
        "attention.causal": True, "expert_count": 0, "expert_used_count": 0,
    }  # fmt: skip
    for name, value in said.items():
        if name not in WITHOUT_EFFECT and (name not in expected or value != expected[name]):
            told = expected.get(name, "no such field")
            raise ValueError(f"{architecture}.{name}: expected {told}, which is what our layers have, got {value!r}")
    try:
        config: PreTrainedConfig = AutoConfig.for_model(architecture, **values)
    except (StrictDataclassError, KeyError, TypeError) as error:
        what = " ".join(str(error).split())
        raise ValueError(f"{gguf.file}: expected the fields of a {architecture}, got {what}") from error
    return config


def _rope(gguf: Gguf, said: dict[str, Any], head_dim: int) -> dict[str, Any]:
    """What a config says of positions, taken from what the file says.

    Raises ValueError for divisors of frequencies that are not those of a Llama 3.
    """
    rope = {theirs: said.pop(name) for name, theirs in ROPE.items() if name in said}
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
                f"{ROPE_FREQUENCIES}: expected the divisors that follow from {options}, as a Llama 3 has, got "
                f"{divisors.tolist()}"
            )
        rope |= {"rope_type": "llama3", **options}
    return rope


def tensors_in(gguf: Gguf, config: PreTrainedConfig) -> dict[str, Tensor]:
    """All tensors in float32, by transformers' names, their rows in its order.

    Raises ValueError for tensors that are not those of the config, and for a quantization that `gguf` cannot undo.
    """
    names = {name: their_name(name) for name in gguf.stored if name != ROPE_FREQUENCIES}
    shapes = shapes_of(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], config)
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    tensors = {theirs: _dequantized(gguf, name) for name, theirs in names.items() if theirs in shapes}
    wrong = {
        "unknown": [name for name, theirs in names.items() if theirs not in shapes],
        "missing": [theirs for theirs in shapes if theirs not in tensors],
        "of another shape": [name for name, tensor in tensors.items() if tensor.shape != shapes[name]],
    }
    if told := [f"{len(some)} {what}, such as {min(some)}" for what, some in wrong.items() if some]:
        raise ValueError(f"{gguf.file}: expected the tensors of a {config.model_type}, got {'; '.join(told)}")
    if FAMILIES[config.model_type]:
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        for name, tensor in tensors.items():
            if h := heads.get(name.split(".")[-2]):
                tensors[name] = tensor.unflatten(0, (h, -1, 2)).transpose(1, 2).flatten(0, 2)
    return tensors


def their_name(name: str) -> str | None:
    """transformers' name of a tensor; None for an unknown one."""
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
            f"{name}: expected a quantization that the package gguf can undo, got {stored.tensor_type.name}"
        ) from error
    return torch.from_numpy(np.array(values, dtype=np.float32))
