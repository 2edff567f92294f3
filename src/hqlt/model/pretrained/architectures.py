"""What the configs of pretrained architectures say in our fields, and back: one table, and nothing lost on the way.

Whether a config can be expressed is not listed but tried: it is converted and converted back, and a field that comes
back with another value is refused. So is a field that only a later version of transformers knows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, NamedTuple

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig

from hqlt.memory.rotary import Rotary
from hqlt.model.config import HQLTConfig
from hqlt.registry import one_of

SHARED = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "norm_eps": "rms_norm_eps",
    "tie_word_embeddings": "tie_word_embeddings",
    "initializer_range": "initializer_range",
    "use_cache": "use_cache",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "pad_token_id": "pad_token_id",
}
"""Our fields and theirs, in every architecture."""


class Architecture(NamedTuple):
    """What an architecture has beside the shared fields."""

    named: dict[str, str]
    """More of our fields, and what its config calls them."""
    fixed: dict[str, Any]
    """Our fields that its config does not have, and what they always are."""
    layer_types: bool = False
    """Whether its config says of each layer whether it has the window."""

    def fields(self) -> dict[str, str]:
        """Our fields, and what its config calls them."""
        return SHARED | self.named


ARCHITECTURES = {
    "llama": Architecture(
        {"qkv_bias": "attention_bias", "o_bias": "attention_bias", "mlp_bias": "mlp_bias"},
        {"qk_norm": None, "kv_window": None},
    ),
    "qwen2": Architecture({}, {"qkv_bias": True, "o_bias": False, "mlp_bias": False, "qk_norm": None}, True),
    "qwen3": Architecture(
        {"qkv_bias": "attention_bias", "o_bias": "attention_bias"}, {"mlp_bias": False, "qk_norm": "head"}, True
    ),
    "mistral": Architecture(
        {"kv_window": "sliding_window"}, {"qkv_bias": False, "o_bias": False, "mlp_bias": False, "qk_norm": None}
    ),
}
"""By transformers' `model_type`."""

WITHOUT_EFFECT = frozenset(
    {
        "attention_dropout",  # in training alone
        "pretraining_tp",  # transformers reads it no more
        "max_window_layers", "use_sliding_window",  # layer_types says it
    }
)  # fmt: skip
"""Their fields that logits do not depend on, given the others."""


def config_of(theirs: PreTrainedConfig) -> HQLTConfig:
    """Our config for one of transformers', whatever version wrote it.

    Raises ValueError for another architecture, and for a field whose value our layers do not compute.
    """
    one_of("model_type", theirs.model_type, ARCHITECTURES)
    kind = ARCHITECTURES[theirs.model_type]
    if getattr(theirs, "quantization_config", None):
        raise ValueError(
            "quantization_config: expected weights that are plain numbers, got quantized ones; dequantize the model "
            "with transformers (model.dequantize()) and save it first"
        )
    values: dict[str, Any] = {ours: getattr(theirs, name, None) for ours, name in kind.fields().items()} | kind.fixed
    scaling = _rotary(theirs)
    values["rope_theta"] = scaling.pop("rope_theta", None)
    values["partial_rotary_factor"] = scaling.pop("partial_rotary_factor", 1.0)
    values["rope_scaling"] = None if scaling == {"rope_type": "default"} else scaling
    if kind.layer_types:
        windows = {"sliding_attention": theirs.sliding_window}
        values["kv_window"] = _one_if_same([windows.get(layer) for layer in theirs.layer_types])
    try:
        config = HQLTConfig(layer_kinds=["kv"] * theirs.num_hidden_layers, **values)
    except StrictDataclassError as error:
        raise ValueError(f"expected the config of a {theirs.model_type}, got {_line(error)}") from error
    config.max_position_embeddings = theirs.max_position_embeddings
    _refuse_lost(_told(theirs), _told(_expressed(config, theirs.model_type)), "our layers have")
    return config


def config_as(config: HQLTConfig, architecture: str) -> PreTrainedConfig:
    """The config of transformers' "llama", "qwen2", "qwen3" or "mistral" for one of ours that has only attention in it.

    Raises ValueError for another architecture, and for a field whose value the architecture does not have.
    """
    one_of("architecture", architecture, ARCHITECTURES)
    if set(config.kinds) != {"kv"}:
        raise ValueError(
            f"layer_kinds: expected only 'kv', because a {architecture} is all attention, got {config.kinds}"
        )
    theirs = _expressed(config, architecture)
    _refuse_lost(_attention(config), _attention(config_of(theirs)), f"a {architecture} has")
    return theirs


def _expressed(config: HQLTConfig, architecture: str) -> PreTrainedConfig:
    """The nearest that the architecture has."""
    kind, ours = ARCHITECTURES[architecture], _attention(config)
    windows = ours["kv_window"] if isinstance(ours["kv_window"], list) else [ours["kv_window"]] * len(config.kinds)
    ours["kv_window"] = windows[0]
    values = {name: ours[field] for field, name in kind.fields().items()}
    if kind.layer_types:
        values["sliding_window"] = next(filter(None, windows), None)
        values["use_sliding_window"] = values["sliding_window"] is not None
        values["layer_types"] = [f"{'sliding' if window else 'full'}_attention" for window in windows]
    if config.rope_theta is not None:
        values["rope_parameters"] = {"rope_theta": config.rope_theta, **(ours["rope_scaling"] or {})}
    if hasattr(config, "max_position_embeddings"):
        values["max_position_embeddings"] = config.max_position_embeddings
    try:
        theirs: PreTrainedConfig = AutoConfig.for_model(architecture, **values)
    except StrictDataclassError as error:
        raise ValueError(f"expected what a {architecture} can be, got {_line(error)}") from error
    return theirs


def _told(theirs: PreTrainedConfig) -> dict[str, Any]:
    """What a config says that logits depend on."""
    own = {field.name for field in fields(theirs)} - {field.name for field in fields(PreTrainedConfig)}
    told = {name: getattr(theirs, name) for name in sorted(own - WITHOUT_EFFECT)} | {"rope_parameters": _rotary(theirs)}
    if "layer_types" in told:
        window = f"sliding_attention of {told.pop('sliding_window')}"
        told["layer_types"] = [window if layer == "sliding_attention" else layer for layer in theirs.layer_types]
    return told


def _rotary(theirs: PreTrainedConfig) -> dict[str, Any]:
    """`rope_parameters` without what says nothing: None, and the older name of rope_type."""
    return {name: value for name, value in theirs.rope_parameters.items() if value is not None and name != "type"}


def _attention(config: HQLTConfig) -> dict[str, Any]:
    """What a config of kv layers says that logits depend on, in one form."""
    layer = config.layer_options(0)
    rotary = Rotary.of(config.rope_theta, config.partial_rotary_factor, config.rope_scaling)
    return {
        **{name: getattr(config, name) for name in (*SHARED, "mlp_bias")},
        **{name: value for name, value in layer.items() if name not in ("window", "blend")},
        "num_kv_heads": config.num_kv_heads or config.num_heads,
        "head_dim": config.head_dim or config.hidden_size // config.num_heads,
        "kv_window": _one_if_same(config.kv_window),
        "rope_scaling": None if rotary is None or rotary.scaling is None else dict(rotary.scaling),
        "kv_activation": None if config.kv_activation == "default" else config.kv_activation,
        "head_norm": bool(config.head_norm),
    }


def _one_if_same(windows: Any) -> Any:
    same = isinstance(windows, list) and len(set(windows)) == 1
    return windows[0] if same else windows


def _refuse_lost(given: Mapping[str, Any], again: Mapping[str, Any], who: str) -> None:
    for name, value in given.items():
        if again[name] != value:
            raise ValueError(f"{name}: expected {again[name]!r}, which is what {who}, got {value!r}")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
