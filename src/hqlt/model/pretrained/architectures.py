"""What the configs of pretrained architectures say in our fields, and back: one table, and nothing lost on the way.

Whether a config can be expressed is not listed but tried: it is converted and converted back, and a field that comes
back with another value is refused. So is a field that only a later version of transformers knows.
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
"""Our fields and theirs, in every architecture."""


class Architecture(NamedTuple):
    """What an architecture has beside the shared fields.

    Our fields are those of all layers; "fw.…" are the ones that its FW-memories have otherwise (`HQLTConfig.of_kind`).
    """

    named: dict[str, str | None]
    """More of our fields, and what its config calls them; None for a shared one that it does not have."""
    fixed: dict[str, Any]
    """Our fields that its config does not have, and what they always are."""
    layer_types: bool = False
    """Whether its config says of each layer whether it has the window."""
    hybrid: bool = False
    """Whether its config says of each layer whether it is linear attention, which is an FW-memory alone here."""
    values: Mapping[str, Mapping[Any, Any]] = MappingProxyType({})
    """Of some of our fields: its value, and ours."""
    always: Mapping[str, Any] = MappingProxyType({})
    """Its fields that must have these values."""
    partial_rotary: bool = False
    """Whether it turns a part of each head, where its config says so."""
    positions_optional: bool = False
    """Whether it has no positions where its config has no rope_theta."""

    def fields(self) -> dict[str, str]:
        """Our fields, and what its config calls them."""
        return {ours: name for ours, name in (SHARED | self.named).items() if name is not None}


OF_LINEAR: dict[str, str | None] = {
    "fw.num_heads": "linear_num_key_heads",
    "fw.head_dim": "linear_key_head_dim",
    "fw.conv_size": "linear_conv_kernel_dim",
    "num_value_heads": "linear_num_value_heads",
    "value_dim": "linear_value_head_dim",
}
"""What the layers of linear attention have, in all architectures that have any."""
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
        OF_LINEAR, QWEN_HYBRID, hybrid=True, partial_rotary=True, always={"num_experts": 0, "attention_bias": False}
    ),
    "qwen3_5_text": Architecture(
        OF_LINEAR, QWEN_HYBRID, hybrid=True, partial_rotary=True, always={"attention_bias": False}
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
        "attention_dropout",  # in training alone
        "pretraining_tp",  # transformers reads it no more
        "max_window_layers", "use_sliding_window",  # layer_types says it
        "linear_a_log_min", "linear_a_log_max", "linear_dt_min", "linear_dt_max", "linear_dt_init_floor",  # beginnings
        "decoder_sparse_step", "mlp_only_layers", "moe_intermediate_size", "norm_topk_prob", "num_experts_per_tok",
        "output_router_logits", "router_aux_loss_coef", "shared_expert_intermediate_size",  # of experts
    }
)  # fmt: skip
"""Their fields that logits do not depend on, given the others."""
OF_IMAGES = ("mrope_section", "mrope_interleaved")
"""What rotary positions of two axes need, which in a text are one and the same."""
OF_ATTENTION = frozenset(arguments_of("kv-only", None, None))


def config_of(theirs: PreTrainedConfig) -> HQLTConfig:
    """Our config for one of transformers', whatever version wrote it.

    Raises ValueError for another architecture, and for a field whose value our layers do not compute.
    """
    check_choice("model_type", theirs.model_type, ARCHITECTURES)
    kind = ARCHITECTURES[theirs.model_type]
    if getattr(theirs, "quantization_config", None):
        raise ValueError(
            "quantization_config: expected weights that are plain numbers, got quantized ones; dequantize the model "
            "with transformers (model.dequantize()) and save it first"
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
    _refuse_lost(_told(theirs), _told(_expressed(config, theirs.model_type)), "our layers have")
    return config


def config_as(config: HQLTConfig, architecture: str) -> PreTrainedConfig:
    """The config of one of transformers' architectures (`ARCHITECTURES`) for one of ours that has its kinds of layers.

    Raises ValueError for another architecture, and for a field whose value the architecture does not have.
    """
    check_choice("architecture", architecture, ARCHITECTURES)
    hybrid = ARCHITECTURES[architecture].hybrid
    if "hybrid" in config.kinds or ("fw" in config.kinds) != hybrid:
        expected = "'kv' and 'fw'" if hybrid else "only 'kv'"
        is_made_of = "attention and linear attention" if hybrid else "all attention"
        raise ValueError(
            f"layer_kinds: expected {expected}, because a {architecture} is {is_made_of}, got {config.kinds}"
        )
    theirs = _expressed(config, architecture)
    _refuse_lost(_said(config), _said(config_of(theirs)), f"a {architecture} has")
    return theirs


def _expressed(config: HQLTConfig, architecture: str) -> PreTrainedConfig:
    """The nearest that the architecture has."""
    kind, ours = ARCHITECTURES[architecture], _said(config)
    windows = ours["kv_window"] if isinstance(ours["kv_window"], list) else [ours["kv_window"]] * len(config.kinds)
    ours["kv_window"] = windows[0]
    for field, of_theirs in kind.values.items():
        ours[field] = next((theirs for theirs, value in of_theirs.items() if value == ours.get(field)), False)
    values = {name: ours[field] for field, name in kind.fields().items()} | dict(kind.always)
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
        raise ValueError(f"expected what a {architecture} can be, got {_line(error)}") from error
    return theirs


def _told(theirs: PreTrainedConfig) -> dict[str, Any]:
    """What a config says that logits depend on."""
    own = {field.name for field in fields(theirs)} - {field.name for field in fields(PreTrainedConfig)}
    told = {name: getattr(theirs, name) for name in sorted(own - WITHOUT_EFFECT)} | {"rope_parameters": _rotary(theirs)}
    if "layer_types" in told:
        window = f"sliding_attention of {told.pop('sliding_window', None)}"
        told["layer_types"] = [window if layer == "sliding_attention" else layer for layer in theirs.layer_types]
    return told


def _rotary(theirs: PreTrainedConfig) -> dict[str, Any]:
    """`rope_parameters` without what says nothing: None, the older name of rope_type, and what only images need."""
    ignored = ("type", *OF_IMAGES)
    return {name: value for name, value in theirs.rope_parameters.items() if value is not None and name not in ignored}


def _said(config: HQLTConfig) -> dict[str, Any]:
    """What a config of kv and fw layers says that logits depend on, in one form, by the names of `Architecture`."""
    rotary = Rotary.of(config.rope_theta, config.partial_rotary_factor, config.rope_scaling)
    said = {name: getattr(config, name) for name in (*SHARED, "mlp_bias", "zero_centered_block_norms")}
    for kind in dict.fromkeys(config.kinds):
        index, attends = config.kinds.index(kind), kind == "kv"
        layer = {**config.layer_options(index), "block_norms": config.block_options(index)["norms"]}
        said |= {
            name if attends or name not in {*OF_ATTENTION, "block_norms"} else f"fw.{name}": value
            for name, value in _in_one_form(layer, attends).items()
        }
    return said | {
        "kv_window": _one_if_same(config.kv_window),
        "rope_scaling": None if rotary is None or rotary.scaling is None else dict(rotary.scaling),
    }


def _in_one_form(layer: dict[str, Any], attends: bool) -> dict[str, Any]:
    """A layer's options, with what None and other defaults stand for."""
    heads = layer["num_heads"]
    width = layer["head_dim"] or layer["hidden_size"] // heads
    defaults = {
        "num_kv_heads": heads,
        "head_dim": width,
        "num_value_heads": heads,
        "value_dim": width,
        "head_norm": False if attends else "head",
    }
    plain = {
        "kv_activation": None if layer["kv_activation"] == "default" else layer["kv_activation"],
        "fw_activation": "silu" if layer["fw_activation"] == "default" else layer["fw_activation"],
        "output_gate": "silu" if layer["output_gate"] is True else layer["output_gate"],
        "head_norm": "head" if layer["head_norm"] is True else layer["head_norm"],
    }
    filled = {name: value for name, value in defaults.items() if name in layer and layer[name] is None}
    unsaid = {name for name, default in options_of(KVMemory.with_retention).items() if layer.get(name) == default}
    said = {**layer, **plain, **filled}
    return {name: value for name, value in said.items() if name not in {"window", "blend", *unsaid}}


def _one_if_same(windows: Any) -> Any:
    same = isinstance(windows, list) and len(set(windows)) == 1
    return windows[0] if same else windows


def _refuse_lost(given: Mapping[str, Any], again: Mapping[str, Any], who: str) -> None:
    for name, value in given.items():
        if again.get(name) != value:
            raise ValueError(f"{name}: expected {again.get(name)!r}, which is what {who}, got {value!r}")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
