"""Conversion of weights between transformers' architectures and ours: tensors are renamed, and packed ones split."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel
from transformers.utils import logging

from hqlt.model.config import HQLTConfig
from hqlt.model.language_model import HQLTForCausalLM
from hqlt.model.pretrained.architectures import config_as, config_of


class Packed(NamedTuple):
    """Several of our tensors that are concatenated in one of theirs."""

    names: tuple[str, ...]
    by_head: bool = False
    """Whether they are concatenated within each head (`num_heads`) instead of as a whole."""


Parts = Mapping[str, str | Packed]
"""Their name of a part of a layer → ours."""

ATTENTION: Parts = {
    "self_attn": "memory",
    "input_layernorm": "memory_norm",
    "post_attention_layernorm": "mlp_norm",
    "mlp": "mlp",
}
GATED_ATTENTION: Parts = {**ATTENTION, "self_attn.q_proj": Packed(("memory.q_proj", "memory.g_proj"), by_head=True)}
POST_NORMED: Parts = {
    "self_attn": "memory",
    "post_attention_layernorm": "memory_out_norm",
    "post_feedforward_layernorm": "mlp_out_norm",
    "mlp": "mlp",
}
LINEAR: Parts = {
    **ATTENTION,
    "linear_attn": "memory",
    "linear_attn.A_log": "memory.fw.A_log",
    "linear_attn.dt_bias": "memory.fw.dt_bias",
    "linear_attn.conv1d": "memory.conv",
}
QWEN_LINEAR: Parts = {**LINEAR, "linear_attn.norm": "memory.o_norm", "linear_attn.out_proj": "memory.o_proj"}
QKV = "memory.q_proj", "memory.k_proj", "memory.v_proj"

LAYERS: dict[str, dict[str, Parts]] = {
    "qwen3_next": {
        "kv": GATED_ATTENTION,
        "fw": {
            **QWEN_LINEAR,
            "linear_attn.in_proj_qkvz": Packed((*QKV, "memory.g_proj"), by_head=True),
            "linear_attn.in_proj_ba": Packed(("memory.fw.beta_proj", "memory.fw.decay_proj"), by_head=True),
        },
    },
    "qwen3_5_text": {
        "kv": GATED_ATTENTION,
        "fw": {
            **QWEN_LINEAR,
            "linear_attn.in_proj_qkv": Packed(QKV),
            "linear_attn.in_proj_z": "memory.g_proj",
            "linear_attn.in_proj_b": "memory.fw.beta_proj",
            "linear_attn.in_proj_a": "memory.fw.decay_proj",
        },
    },
    "olmo_hybrid": {
        "kv": POST_NORMED,
        "fw": {
            **LINEAR,
            "linear_attn.b_proj": "memory.fw.beta_proj",
            "linear_attn.a_proj": "memory.fw.decay_proj",
        },
    },
}
"""By architecture and kind of layer; `ATTENTION` for all others."""


def from_transformers(theirs: PreTrainedModel) -> HQLTForCausalLM:
    """Convert a model of transformers to kv and fw layers.

    Args:
        theirs: a model of one of `hqlt.model.pretrained.ARCHITECTURES`.

    Returns:
        A model with the same logits. It shares all tensors that are not packed.

    Raises:
        ValueError: when the architecture is unknown, or our layers cannot express the value of a config field.
    """
    config = config_of(theirs.config)
    shapes = shapes_of(HQLTForCausalLM, config)
    tensors: dict[str, Tensor] = {}
    for name, tensor in theirs.state_dict().items():
        ours, groups = our_names(name, config, theirs.config.model_type)
        rows = [shapes[part][0] // groups for part in ours]
        parts = [tensor] if len(ours) == 1 else tensor.unflatten(0, (groups, -1)).split(rows, dim=1)
        tensors |= {name: part.reshape(shapes[name]) for name, part in zip(ours, parts, strict=True)}
    return _with_weights(HQLTForCausalLM, config, tensors, theirs)


def to_transformers(ours: HQLTForCausalLM, architecture: str) -> PreTrainedModel:
    """Convert a model of kv and fw layers to one of transformers' architectures.

    Args:
        ours: the model.
        architecture: one of `hqlt.model.pretrained.ARCHITECTURES`.

    Returns:
        A model of transformers with the same logits. It shares all tensors that are not packed.

    Raises:
        ValueError: when the architecture cannot express the model.
    """
    our_config: Any = ours.config
    config = config_as(our_config, architecture)
    kind, given = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], ours.state_dict()
    tensors: dict[str, Tensor] = {}
    for name, shape in shapes_of(kind, config).items():
        names, groups = our_names(name, our_config, architecture)
        parts = [given[part] for part in names]
        if len(parts) > 1:
            parts = [torch.cat([part.unflatten(0, (groups, -1)) for part in parts], dim=1)]
        tensors[name] = parts[0].reshape(shape)
    return _with_weights(kind, config, tensors, ours)


def our_names(theirs: str, config: HQLTConfig, architecture: str) -> tuple[tuple[str, ...], int]:
    """Our names of the tensors packed in one of theirs, and the number of groups in which they alternate."""
    head, _, rest = theirs.partition("layers.")
    if not rest:
        return (theirs,), 1
    index, _, name = rest.partition(".")
    kind = config.kinds[int(index)]
    parts = LAYERS.get(architecture, {}).get(kind, ATTENTION)
    part = max((part for part in parts if f"{name}.".startswith(f"{part}.")), key=len)
    ours = parts[part]
    packed = ours if isinstance(ours, Packed) else Packed((ours,))
    groups = config.layer_options(int(index))["num_heads"] if packed.by_head else 1
    return tuple(f"{head}layers.{index}.{new}{name.removeprefix(part)}" for new in packed.names), groups


def shapes_of(kind: Any, config: Any) -> dict[str, torch.Size]:
    """The shapes of all tensors of a model, by name. No memory is allocated."""
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in kind(config).state_dict().items()}


def _with_weights(kind: Any, config: Any, tensors: dict[str, Tensor], source: PreTrainedModel) -> Any:
    """Build a model with these tensors, and the generation config, name and mode of its source."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model, report = kind.from_pretrained(
            None, config=config, state_dict=tensors, dtype=source.dtype, output_loading_info=True
        )
    finally:
        if shown:
            logging.enable_progress_bar()
    assert not any(report.values()), report  # equal configs have equal tensors
    model.config.name_or_path = source.config.name_or_path
    model.generation_config = copy.deepcopy(source.generation_config)
    return model.train(source.training)
