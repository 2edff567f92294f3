"""Weights moved between transformers' architectures and ours: names change, numbers do not."""

from __future__ import annotations

import copy
from typing import Any

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel
from transformers.utils import logging

from hqlt.model.language_model import HQLTForCausalLM
from hqlt.model.pretrained.architectures import config_as, config_of

PARTS = {"self_attn": "memory", "input_layernorm": "memory_norm", "post_attention_layernorm": "mlp_norm"}
"""What parts of names are called there and here; all others are the same."""


def from_transformers(theirs: PreTrainedModel) -> HQLTForCausalLM:
    """A LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM or MistralForCausalLM as a model of kv layers.

    It computes the same logits, from the same tensors: nothing is copied.

    Raises ValueError for another architecture, and for a field of its config whose value our layers do not compute.
    """
    return _with_weights(HQLTForCausalLM, config_of(theirs.config), theirs, PARTS)


def to_transformers(ours: HQLTForCausalLM, architecture: str) -> PreTrainedModel:
    """A model of kv layers as transformers' "llama", "qwen2", "qwen3" or "mistral", from the same tensors.

    Raises ValueError where anything but that architecture's attention is in the model.
    """
    told: Any = ours.config
    config = config_as(told, architecture)
    kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return _with_weights(kind, config, ours, {here: there for there, here in PARTS.items()})


def _with_weights(kind: Any, config: Any, source: PreTrainedModel, names: dict[str, str]) -> Any:
    """A model of this kind and config with the source's tensors under other names."""
    tensors = {
        ".".join(names.get(part, part) for part in name.split(".")): tensor
        for name, tensor in source.state_dict().items()
    }
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
