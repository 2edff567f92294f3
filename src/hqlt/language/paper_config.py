"""Conversion of the settings of the paper's code, and notes on what a converted model computes differently.

The code is github.com/kazuki-irie/hybrid-memory, a fork of flash-linear-attention, with model types `hybrid_qlt`,
`delta_net` and `transformer`. The library's own model types are the latter two and `gated_deltanet`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from huggingface_hub.errors import StrictDataclassError

from hqlt.model import HQLTConfig
from hqlt.registry import check_choice

COPIED: dict[str, Any] = {
    "hidden_size": 2048, "num_hidden_layers": 24, "norm_eps": 1e-6, "vocab_size": 32_000, "tie_word_embeddings": False,
    "initializer_range": 0.02, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None,
}  # fmt: skip
"""Settings with the same name and meaning, and the original code's defaults."""
COMMON: dict[str, Any] = {
    **COPIED, "hidden_ratio": 4, "intermediate_size": None, "hidden_act": "swish", "attnres_block_size": None,
}  # fmt: skip
SHORT_CONV: dict[str, Any] = {"attn_mode": "chunk", "use_short_conv": True, "conv_size": 4, "attn": None}
LINEAR: dict[str, Any] = {
    **COMMON, **SHORT_CONV, "expand_k": 1, "expand_v": 1, "use_beta": True, "qk_norm": "l2", "qk_activation": "silu",
}  # fmt: skip
DEFAULTS: dict[str, dict[str, Any]] = {
    "hybrid_qlt": {
        **LINEAR, "num_heads": 6, "use_gate": True, "allow_neg_eigval": True, "chunk_size": 64,
        "use_local_pos_encoding": False, "use_memory_gate": False, "use_memory_gate_separate": False,
        "use_memory_scaler": False, "use_memory_dynamic_scaler": False,
    },
    "delta_net": {**LINEAR, "num_heads": 16, "use_gate": False, "allow_neg_eigval": False},
    "gated_deltanet": {
        **COMMON, **SHORT_CONV, "num_hidden_layers": 21, "num_heads": 6, "num_v_heads": None, "head_dim": 256,
        "expand_v": 2, "use_gate": True, "output_gate_activation": "swish", "allow_neg_eigval": False,
    },
    "transformer": {
        **COMMON, "num_heads": 32, "num_kv_heads": None, "qkv_bias": False, "qk_norm": False, "window_size": None,
        "rope_theta": 10_000.0,
    },
}  # fmt: skip
"""By model type: the settings that are read, and the original code's defaults."""

ALL_MUST: dict[str, Any] = {"hidden_act": "swish", "attnres_block_size": None}
LINEAR_MUST: dict[str, Any] = {**ALL_MUST, "use_beta": True, "qk_norm": "l2"}
MUST_BE: dict[str, dict[str, Any]] = {
    "hybrid_qlt": {
        **LINEAR_MUST, "expand_k": 1, "expand_v": 1, "qk_activation": "identity",
        "use_memory_gate_separate": False, "use_memory_scaler": False,
    },
    "delta_net": {**LINEAR_MUST, "qk_activation": "silu"},
    "gated_deltanet": ALL_MUST,
    "transformer": {**ALL_MUST, "qkv_bias": False, "qk_norm": False},
}  # fmt: skip
"""By model type: the only values that our layers support."""

MODES = {
    "sync_chunk": ("synchronous", "delta"),
    "sync_chunk_linear": ("synchronous", "linear"),
    "delayed": ("delayed-streaming", "delta"),
    "chunk": ("delayed-chunk", "delta"),
}


class Settings(NamedTuple):
    """Converted settings."""

    config: HQLTConfig
    notes: list[str]
    """Differences between the converted model and the original code."""


def read_settings(given: Mapping[str, Any]) -> Settings:
    """Convert the content of a config.json of the paper's code.

    Raises:
        ValueError: when our layers do not support a value, or a value is invalid.
    """
    try:
        return _converted(given)
    except (StrictDataclassError, TypeError, AttributeError, KeyError) as error:
        raise ValueError(f"expected the settings of a model, got {' '.join(str(error).split())}") from error


def _converted(given: Mapping[str, Any]) -> Settings:
    kind = given.get("model_type")
    check_choice("model_type", str(kind), DEFAULTS)
    assert isinstance(kind, str)
    theirs = {name: given.get(name, default) for name, default in DEFAULTS[kind].items()}
    for name, value in MUST_BE[kind].items():
        if theirs[name] != value:
            raise ValueError(f"{name}: expected {value!r}, the only value our layers support, got {theirs[name]!r}")
    fields = {name: theirs[name] for name in (*COPIED, "num_heads")}
    fields["intermediate_size"] = theirs["intermediate_size"] or 256 * -(
        -int(theirs["hidden_size"] * (theirs["hidden_ratio"] or 4) * 2 / 3) // 256
    )
    of_layers = {
        "hybrid_qlt": _hybrid, "delta_net": _delta_net, "gated_deltanet": _gated_deltanet, "transformer": _transformer
    }[kind]  # fmt: skip
    return Settings(HQLTConfig(**fields, **of_layers(theirs)), notes_on(theirs) if kind == "hybrid_qlt" else [])


def _hybrid(theirs: Mapping[str, Any]) -> dict[str, Any]:
    check_choice("attn_mode", theirs["attn_mode"], MODES)
    blend, rule = MODES[theirs["attn_mode"]]
    mixer = "vector" if theirs["use_memory_gate"] else "scalar" if theirs["use_memory_dynamic_scaler"] else "sum"
    fields = {
        "blend": blend,
        "fast_weights": rule,
        "mixer": mixer,
        "window": theirs["chunk_size"],
        "beta_max": None if rule == "linear" or theirs["allow_neg_eigval"] else 1.0,  # the default is 2
        "rope_theta": 10_000.0 if theirs["use_local_pos_encoding"] else None,
        "conv_size": theirs["conv_size"] if theirs["use_short_conv"] else 0,
        "output_gate": theirs["use_gate"],
    }
    return fields | _attention_layers(theirs, "hybrid")


def _delta_net(theirs: Mapping[str, Any]) -> dict[str, Any]:
    width, heads = theirs["hidden_size"], theirs["num_heads"]
    return {
        "fast_weights": "delta",
        "head_dim": round(width * theirs["expand_k"]) // heads,
        "value_dim": round(width * theirs["expand_v"]) // heads,
        "output_gate": theirs["use_gate"],
        **_linear(theirs),
    }


def _gated_deltanet(theirs: Mapping[str, Any]) -> dict[str, Any]:
    gate = theirs["output_gate_activation"]
    return {
        "fast_weights": "gated-delta",
        "head_dim": theirs["head_dim"],
        "value_dim": int(theirs["head_dim"] * theirs["expand_v"]),
        "num_value_heads": theirs["num_v_heads"],
        "output_gate": theirs["use_gate"] and {"swish": "silu"}.get(gate, gate),
        **_linear(theirs),
    }


def _linear(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """What both of flash-linear-attention's own have."""
    return {
        "layer_kinds": ["fw"] * theirs["num_hidden_layers"],
        "beta_max": 2.0 if theirs["allow_neg_eigval"] else 1.0,
        "conv_size": theirs["conv_size"] if theirs["use_short_conv"] else 0,
        **_attention_layers(theirs, "fw"),
    }


def _transformer(theirs: Mapping[str, Any]) -> dict[str, Any]:
    if theirs["num_kv_heads"] not in (None, theirs["num_heads"]):
        raise ValueError(
            f"num_kv_heads: expected the same as num_heads = {theirs['num_heads']}, got {theirs['num_kv_heads']}"
        )
    return {
        "layer_kinds": ["kv"] * theirs["num_hidden_layers"],
        "kv_window": theirs["window_size"],
        "rope_theta": theirs["rope_theta"],
    }


def _attention_layers(theirs: Mapping[str, Any], others: str) -> dict[str, Any]:
    """The fields for layers of plain attention among those of another kind."""
    attention = theirs["attn"]
    if not attention:
        return {}
    if not isinstance(attention, Mapping):
        raise ValueError(f"attn: expected one mapping of settings for all attention layers, got {attention}")
    own = {
        "num_heads": attention.get("num_heads", theirs["num_heads"]),
        "num_kv_heads": attention.get("num_kv_heads"),
        "head_dim": None,
        "qkv_bias": attention.get("qkv_bias", False),
        "rope_theta": attention.get("rope_theta", 10_000.0),
        "conv_size": 0,
        "output_gate": False,
    }
    kinds = ["kv" if i in attention["layers"] else others for i in range(theirs["num_hidden_layers"])]
    return {"layer_kinds": kinds, "kv_window": attention.get("window_size"), "of_kind": {"kv": own}}


def notes_on(theirs: Mapping[str, Any]) -> list[str]:
    """Where the paper's code differs from the paper's equations, which the converted model follows."""
    mode, positions = theirs["attn_mode"], theirs["use_local_pos_encoding"]
    notes = ["Padded batches: in the original code, rows attend to each other during evaluation; here they do not."]
    if mode == "sync_chunk_linear":
        notes += [
            "LOGITS DIFFER: the original code sums the normaliser of linear attention over heads, this model over time "
            "(which is correct); the weights were trained with the former.",
            "Calls: the original code carries no fast weights between calls in this mode; this model does.",
        ]
    if mode.startswith("sync") and positions:
        notes.append(
            "Decoding: in the original code, rotary positions of all layers but the first are off by one, because the "
            "layers share one token counter; here decoding equals one pass."
        )
    if mode == "delayed":
        notes.append("Packed documents: in the original code, writes cross document boundaries; here they do not.")
        notes.append(
            "Decoding: in the original code, the positions of q and k differ by one from the second step on; here "
            "decoding equals one pass."
            if positions
            else "Decoding without positions: in the original code, only the new keys are paired with the whole "
            "window's values; here decoding equals one pass."
        )
    if mode == "chunk":
        if theirs["chunk_size"] != 64:
            notes.append(
                f"LOGITS DIFFER: the original code writes fast weights in chunks of 64 regardless of the window; here "
                f"the chunk is the window, {theirs['chunk_size']}."
            )
        notes.append("Calls: the original code carries no state between calls in this mode; this model does.")
    return notes
