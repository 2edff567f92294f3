"""Conversion of configs between transformers' architectures and `HQLTConfig`, from one table.

Whether a config can be expressed is tested, not listed: it is converted there and back, and a field whose value changes
is refused. This includes fields that only a later version of transformers has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from types import MappingProxyType
from typing import Any, NamedTuple

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig

from hqlt.layer import arguments_of
from hqlt.memory import KVMemory
from hqlt.memory.rotary import Rotary
from hqlt.model.config import HQLTConfig
from hqlt.registry import check_choice, options_of

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
"""Our fields → theirs, in every architecture."""


class Architecture(NamedTuple):
    """How the config of an architecture maps to ours, in addition to the shared fields.

    Names of our fields apply to all layers; "fw.…" names fields that differ for fw layers (`HQLTConfig.of_kind`).
    """

    renamed: dict[str, str | None]
    """More of our fields → its fields. None: it lacks this shared field."""
    fixed: dict[str, Any]
    """Our fields that its config lacks, with their constant values."""
    layer_types: bool = False
    """Whether its config lists which layers have a sliding window."""
    hybrid: bool = False
    """Whether its config lists which layers are linear attention; they become fw layers."""
    values: Mapping[str, Mapping[Any, Any]] = MappingProxyType({})
    """Our fields whose values differ: its value → ours."""
    required: Mapping[str, Any] = MappingProxyType({})
    """Its fields that must have these values."""
    partial_rotary: bool = False
    """Whether its config can restrict the rotary embedding to a part of each head."""
    positions_optional: bool = False
    """Whether it has no positional encoding if its config has no rope_theta."""

    def fields(self) -> dict[str, str]:
        """Our fields → its fields."""
        return {ours: name for ours, name in (SHARED | self.renamed).items() if name is not None}


OF_LINEAR: dict[str, str | None] = {
    "fw.num_heads": "linear_num_key_heads",
    "fw.head_dim": "linear_key_head_dim",
    "fw.conv_size": "linear_conv_kernel_dim",
    "num_value_heads": "linear_num_value_heads",
    "value_dim": "linear_value_head_dim",
}
"""Fields of linear attention, in all architectures that have it."""
GATED_DELTA: dict[str, Any] = {
    "fast_weights": "gated-delta", "mlp_bias": False, "kv_window": None, "fw.num_kv_heads": None, "fw.qkv_bias": False,
    "fw.o_bias": False, "fw.qk_norm": None, "fw.output_gate": "silu",
}  # fmt: skip
QWEN_HYBRID: dict[str, Any] = {
    **GATED_DELTA, "beta_max": 1.0, "qkv_bias": False, "o_bias": False, "qk_norm": "head", "output_gate": "sigmoid",
    "zero_centered_norms": True, "fw.zero_centered_norms": False, "zero_centered_block_norms": True,
}  # fmt: skip

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
    "qwen3_next": Architecture(
        OF_LINEAR, QWEN_HYBRID, hybrid=True, partial_rotary=True, required={"num_experts": 0, "attention_bias": False}
    ),
    "qwen3_5_text": Architecture(
        OF_LINEAR, QWEN_HYBRID, hybrid=True, partial_rotary=True, required={"attention_bias": False}
    ),
    "olmo_hybrid": Architecture(
        {
            **OF_LINEAR, "head_dim": None, "qkv_bias": "attention_bias", "o_bias": "attention_bias",
            "beta_max": "linear_allow_neg_eigval",
        },
        {**GATED_DELTA, "qk_norm": "full", "block_norms": "after", "fw.block_norms": "before", "fw.norm_eps": 1e-5},
        hybrid=True, values={"beta_max": {True: 2.0, False: 1.0}}, positions_optional=True,
    ),
}  # fmt: skip
"""By transformers' `model_type`."""

WITHOUT_EFFECT = frozenset(
    {
        "attention_dropout",  # only in training
        "pretraining_tp",  # no longer used by transformers
        "max_window_layers", "use_sliding_window",  # redundant with layer_types
        "linear_a_log_min", "linear_a_log_max", "linear_dt_min", "linear_dt_max", "linear_dt_init_floor",  # init only
        "decoder_sparse_step", "mlp_only_layers", "moe_intermediate_size", "norm_topk_prob", "num_experts_per_tok",
        "output_router_logits", "router_aux_loss_coef", "shared_expert_intermediate_size",  # only with experts
    }
)  # fmt: skip
"""Their fields that have no effect on the logits, given the others."""
OF_IMAGES = ("mrope_section", "mrope_interleaved")
"""Parameters of multi-axis rotary embeddings, whose axes coincide for text."""
OF_ATTENTION = frozenset(arguments_of("kv-only", None, None))


def config_of(theirs: PreTrainedConfig) -> HQLTConfig:
    """Convert a config of transformers, written by any version, to ours.

    Args:
        theirs: a config of one of `ARCHITECTURES`.

    Returns:
        The config of a model with the same logits.

    Raises:
        ValueError: when the architecture is unknown, or our layers cannot express the value of a field.
    """
    check_choice("model_type", theirs.model_type, ARCHITECTURES)
    kind = ARCHITECTURES[theirs.model_type]
    if getattr(theirs, "quantization_config", None):
        raise ValueError(
            "quantization_config: expected unquantized weights, got quantized ones; dequantize the model with "
            "transformers (model.dequantize()) and save it first"
        )
    values: dict[str, Any] = {ours: getattr(theirs, name, None) for ours, name in kind.fields().items()} | kind.fixed
    values |= {ours: of_theirs[values[ours]] for ours, of_theirs in kind.values.items()}
    scaling = _rotary(theirs)
    values["rope_theta"] = scaling.pop("rope_theta", None)
    values["partial_rotary_factor"] = scaling.pop("partial_rotary_factor", 1.0)
    values["rope_scaling"] = None if scaling == {"rope_type": "default"} else scaling
    if kind.layer_types:
        windows = {"sliding_attention": theirs.sliding_window}
        values["kv_window"] = _one_if_same([windows.get(layer) for layer in theirs.layer_types])
    linear = {"linear_attention": "fw"} if kind.hybrid else {}
    kinds = [linear.get(layer, "kv") for layer in getattr(theirs, "layer_types", [None] * theirs.num_hidden_layers)]
    own = {name: values.pop(name) for name in list(values) if name.startswith("fw.")}
    if "fw" in kinds:
        values["of_kind"] = {"fw": {name.removeprefix("fw."): value for name, value in own.items()}}
    try:
        config = HQLTConfig(layer_kinds=kinds, **values)
    except StrictDataclassError as error:
        raise ValueError(f"expected the config of a {theirs.model_type}, got {_line(error)}") from error
    config.max_position_embeddings = theirs.max_position_embeddings
    again = _nearest(config, theirs.model_type)
    _refuse_changed(_normalized_theirs(theirs), _normalized_theirs(again), "our layers have")
    return config


def config_as(config: HQLTConfig, architecture: str) -> PreTrainedConfig:
    """Convert our config to one of transformers' architectures.

    Args:
        config: a config with the kinds of layers that the architecture has.
        architecture: one of `ARCHITECTURES`.

    Returns:
        The config of a model of transformers with the same logits.

    Raises:
        ValueError: when the architecture is unknown, or it cannot express the value of a field.
    """
    check_choice("architecture", architecture, ARCHITECTURES)
    hybrid = ARCHITECTURES[architecture].hybrid
    if "hybrid" in config.kinds or ("fw" in config.kinds) != hybrid:
        expected = "'kv' and 'fw'" if hybrid else "only 'kv'"
        is_made_of = "attention and linear attention" if hybrid else "all attention"
        raise ValueError(
            f"layer_kinds: expected {expected}, because a {architecture} is {is_made_of}, got {config.kinds}"
        )
    theirs = _nearest(config, architecture)
    _refuse_changed(_normalized(config), _normalized(config_of(theirs)), f"a {architecture} has")
    return theirs


def _nearest(config: HQLTConfig, architecture: str) -> PreTrainedConfig:
    """The nearest config of the architecture."""
    kind, ours = ARCHITECTURES[architecture], _normalized(config)
    windows = ours["kv_window"] if isinstance(ours["kv_window"], list) else [ours["kv_window"]] * len(config.kinds)
    ours["kv_window"] = windows[0]
    for field, of_theirs in kind.values.items():
        ours[field] = next((theirs for theirs, value in of_theirs.items() if value == ours.get(field)), False)
    values = {name: ours[field] for field, name in kind.fields().items()} | dict(kind.required)
    if kind.layer_types:
        values["sliding_window"] = next(filter(None, windows), None)
        values["use_sliding_window"] = values["sliding_window"] is not None
        values["layer_types"] = [f"{'sliding' if window else 'full'}_attention" for window in windows]
    if kind.hybrid:
        values["layer_types"] = [f"{'linear' if layer == 'fw' else 'full'}_attention" for layer in config.kinds]
    if config.rope_theta is not None:
        part = {"partial_rotary_factor": config.partial_rotary_factor} if kind.partial_rotary else {}
        values["rope_parameters"] = {"rope_theta": config.rope_theta, **part, **(ours["rope_scaling"] or {})}
    elif kind.positions_optional:
        values["rope_parameters"] = {"rope_theta": None}
    if hasattr(config, "max_position_embeddings"):
        values["max_position_embeddings"] = config.max_position_embeddings
    try:
        theirs: PreTrainedConfig = AutoConfig.for_model(architecture, **values)
    except StrictDataclassError as error:
        raise ValueError(f"expected a config that a {architecture} can have, got {_line(error)}") from error
    return theirs


def _normalized_theirs(theirs: PreTrainedConfig) -> dict[str, Any]:
    """The fields of a config of transformers that affect the logits."""
    own = {field.name for field in fields(theirs)} - {field.name for field in fields(PreTrainedConfig)}
    values = {name: getattr(theirs, name) for name in sorted(own - WITHOUT_EFFECT)}
    values["rope_parameters"] = _rotary(theirs)
    if "layer_types" in values:
        window = f"sliding_attention of {values.pop('sliding_window', None)}"
        values["layer_types"] = [window if layer == "sliding_attention" else layer for layer in theirs.layer_types]
    return values


def _rotary(theirs: PreTrainedConfig) -> dict[str, Any]:
    """`rope_parameters` without entries that are None, the older name of rope_type, and those only for images."""
    ignored = ("type", *OF_IMAGES)
    return {name: value for name, value in theirs.rope_parameters.items() if value is not None and name not in ignored}


def _normalized(config: HQLTConfig) -> dict[str, Any]:
    """The fields of a config of kv and fw layers that affect the logits, with the names of `Architecture`."""
    rotary = Rotary.of(config.rope_theta, config.partial_rotary_factor, config.rope_scaling)
    values = {name: getattr(config, name) for name in (*SHARED, "mlp_bias", "zero_centered_block_norms")}
    for kind in dict.fromkeys(config.kinds):
        index, attends = config.kinds.index(kind), kind == "kv"
        layer = {**config.layer_options(index), "block_norms": config.block_options(index)["norms"]}
        values |= {
            name if attends or name not in {*OF_ATTENTION, "block_norms"} else f"fw.{name}": value
            for name, value in _normalized_layer(layer, attends).items()
        }
    return values | {
        "kv_window": _one_if_same(config.kv_window),
        "rope_scaling": None if rotary is None or rotary.scaling is None else dict(rotary.scaling),
    }


def _normalized_layer(layer: dict[str, Any], attends: bool) -> dict[str, Any]:
    """A layer's options, with None and other defaults replaced by the values they stand for."""
    heads = layer["num_heads"]
    width = layer["head_dim"] or layer["hidden_size"] // heads
    defaults = {
        "num_kv_heads": heads,
        "head_dim": width,
        "num_value_heads": heads,
        "value_dim": width,
        "head_norm": False if attends else "head",
    }
    explicit = {
        "kv_activation": None if layer["kv_activation"] == "default" else layer["kv_activation"],
        "fw_activation": "silu" if layer["fw_activation"] == "default" else layer["fw_activation"],
        "output_gate": "silu" if layer["output_gate"] is True else layer["output_gate"],
        "head_norm": "head" if layer["head_norm"] is True else layer["head_norm"],
    }
    filled = {name: value for name, value in defaults.items() if name in layer and layer[name] is None}
    unused = {name for name, default in options_of(KVMemory.with_retention).items() if layer.get(name) == default}
    values = {**layer, **explicit, **filled}
    return {name: value for name, value in values.items() if name not in {"window", "blend", *unused}}


def _one_if_same(windows: Any) -> Any:
    same = isinstance(windows, list) and len(set(windows)) == 1
    return windows[0] if same else windows


def _refuse_changed(given: Mapping[str, Any], again: Mapping[str, Any], who: str) -> None:
    for name, value in given.items():
        if again.get(name) != value:
            raise ValueError(f"{name}: expected {again.get(name)!r}, which is what {who}, got {value!r}")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
