"""Weights moved between transformers' architectures and ours: names change, numbers do not."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel
from transformers.utils import logging

from hqlt.model.language_model import HQLTForCausalLM
from hqlt.model.pretrained.architectures import config_as, config_of

OURS = {"self_attn": "memory", "input_layernorm": "memory_norm", "post_attention_layernorm": "mlp_norm"}
THEIRS = {ours: theirs for theirs, ours in OURS.items()}
"""What parts of a parameter's name are called here and there; all others are the same."""


def from_transformers(theirs: PreTrainedModel) -> HQLTForCausalLM:
    """A LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM or MistralForCausalLM as a model of kv layers.

    It computes the same logits, from the same tensors: nothing is copied.

    Raises ValueError for another architecture, and for a field of its config whose value our layers do not compute.
    """
    return _with_weights(HQLTForCausalLM, config_of(theirs.config), theirs, OURS)


def to_transformers(ours: HQLTForCausalLM, architecture: str) -> PreTrainedModel:
    """A model of kv layers as transformers' "llama", "qwen2", "qwen3" or "mistral", from the same tensors.

    Raises ValueError where the model has anything that the architecture does not have.
    """
    told: Any = ours.config
    config = config_as(told, architecture)
    return _with_weights(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], config, ours, THEIRS)


def renamed(name: str, parts: Mapping[str, str]) -> str:
    """A parameter's name here (parts: OURS) or there (THEIRS)."""
    return ".".join(parts.get(part, part) for part in name.split("."))


def _with_weights(kind: Any, config: Any, source: PreTrainedModel, parts: Mapping[str, str]) -> Any:
    """A model of this kind and config with the source's tensors under their other names."""
    tensors = {renamed(name, parts): tensor for name, tensor in source.state_dict().items()}
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model, report = kind.from_pretrained(
            None, config=config, state_dict=tensors, dtype=source.dtype, output_loading_info=True
        )
    finally:
        if shown:
            logging.enable_progress_bar()
    assert not any(report.values()), report  # the configs say the same, so the tensors are the same
    model.config.name_or_path = source.config.name_or_path
    model.generation_config = copy.deepcopy(source.generation_config)
    return model.train(source.training)
