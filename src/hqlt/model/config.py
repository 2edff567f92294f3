"""The configuration of a language model: the arguments of `HybridMemory`, and those of the model around it."""

# No `from __future__ import annotations` here: transformers' config validation needs the types, not strings.

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from hqlt.layer import BLOCK_NORMS, HybridMemory, arguments_of, layer_arguments
from hqlt.memory import KVMemory
from hqlt.registry import check_choice, find, options_of, split_options

LAYER_KINDS = ("hybrid", "kv", "fw")
CONV_INITS = ("uniform", "identity")

FROM_TRANSFORMERS = frozenset(
    {
        "attn_implementation",
        "auto_map",
        "experts_implementation",
        "model_type",
        "name_or_path",
        "num_labels",
        "output_attentions",
        "quantization_config",
        "tie_last_hidden_states",
        "torch_dtype",
    }
)
"""Keys that are not config fields but that transformers itself passes in `to_dict`, when saving and loading, and in its
Auto classes. Its private keys, which begin with an underscore, are accepted too."""

MISSPELT = 0.85
"""Similarity from which a key in a file counts as a misspelled field. (unk_token_id must not count as bos_token_id.)"""


def fields_of(kind: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of layers of this kind: shared fields, overridden by `options` and by the kind's own (`of_kind`)."""
    return {**fields, **(fields.get("options") or {}), **(fields.get("of_kind") or {}).get(kind, {})}


def choices_of(kind: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The registered parts that a layer of this kind uses, by name."""
    return {
        "blend": fields["blend"] if kind == "hybrid" else f"{kind}-only",
        "mixer": fields["mixer"] if kind == "hybrid" else None,
        "fast_weights": None if kind == "kv" else fields["fast_weights"],
        "retention": None if kind == "fw" else fields["retention"],
    }


def without_unused(shared: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Drop the shared fields of several models that a model with these own fields does not use.

    Raises:
        ValueError: when the name of a part is unknown.
    """
    defaults = {"blend": "synchronous", "mixer": "vector", "fast_weights": "delta", "retention": "recent"}
    fields = defaults | shared | own
    kinds = fields.get("layer_kinds") or "hybrid"
    several = kinds if isinstance(kinds, list) else [kinds]
    choices = [choices_of(kind, fields_of(kind, fields)) for kind in LAYER_KINDS if kind in several]
    if not choices:  # all kinds are unknown, which the config reports
        return shared
    used = {name for choice in choices for name in arguments_of(**choice)}
    return {name: value for name, value in shared.items() if name in used or name not in layer_arguments()}


@strict
class HQLTConfig(PreTrainedConfig):
    """The configuration of an `HQLTForCausalLM`. The defaults are the paper's 340M model.

    Unlike other configs of transformers, it rejects unknown keys. When loading a file, it rejects only keys that look
    like misspelled fields: other tools add attributes to config files, which are kept, and loaders pass unrelated
    keyword arguments, which are ignored.

    Raises:
        ValueError: when values do not fit together, or for an unknown key.
        StrictDataclassFieldValidationError: when a value has the wrong type, also on assignment.

    Example:
        >>> from hqlt import HQLTConfig
        >>> config = HQLTConfig(hidden_size=256, num_heads=4, num_hidden_layers=4, blend="delayed-chunk")
        >>> config = HQLTConfig(num_hidden_layers=4, layer_kinds=["fw", "kv", "fw", "kv"], kv_window=256)
        >>> config.kinds
        ['fw', 'kv', 'fw', 'kv']
    """

    model_type = "hqlt"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012
    attribute_map = {"num_attention_heads": "num_heads"}  # noqa: RUF012

    hidden_size: int = 1024
    """Width of the residual stream."""
    num_heads: int = 8
    """Number of query heads per layer; divides `hidden_size`."""
    window: int | None = 64
    """Window of a hybrid layer's KV-memory in tokens, including the current one; None: unlimited (synchronous only)."""
    blend: str = "synchronous"
    """When a token reaches each memory of a hybrid layer: "synchronous", "delayed-streaming", "delayed-chunk"."""
    mixer: str = "vector"
    """How a hybrid layer combines its two reads: "vector", "scalar", "sum", "add"."""
    fast_weights: str = "delta"
    """The FW-memory's write rule: "delta", "linear", "gated-delta", … (docs/rules.md)."""
    retention: str = "recent"
    """Which KV entries stay visible beyond the window: "recent" (none), "surprise", "value-norm", "random"."""
    kept: int = 0
    """Number of KV entries that each KV head keeps beyond its window. Needs a retention other than "recent"."""
    score: str = "error"
    """Score that retention "surprise" ranks entries by: "error" or "beta-error"."""
    sinks: int = 0
    """Number of first KV entries of a segment that always stay visible."""
    kept_alike: bool = False
    """Whether all heads keep the same entries."""
    kept_positions: str = "true"
    """Rotary distance of entries beyond the window: "true", "clamped" to the window, or "none"."""
    kept_norm: bool = False
    """Whether entries beyond the window have an RMSNorm of q and k of their own."""
    kept_gate: float | int | None = None
    """Initial log weight of entries beyond the window, learned per query head; None: no weight."""
    beta_max: float | int | None = None
    """Maximum write strength β: 2.0 allows state tracking, 1.0 is DeltaNet's. None: the rule's default."""
    beta_bias: float | int | None = None
    """Initial bias of the logits of β; None: no bias."""
    gate_bias: float | int | None = None
    """Initial bias of the mixer's logits; None: no bias."""
    write_gates: str = "current"
    """Gates with which Delayed-Streaming writes: those of the "current" token, or the written token's "own"."""
    rope_theta: float | int | None = 10_000.0
    """Base of the rotary embedding of the KV-memory; None: no positional encoding."""
    partial_rotary_factor: float | int = 1.0
    """Share of each head to which the rotary embedding is applied."""
    rope_scaling: dict[str, Any] | None = None
    """Scaling of the rotary embedding, in transformers' format; None: no scaling."""
    num_kv_heads: int | None = None
    """Number of key-value heads and FW matrices, shared by the query heads; None: `num_heads`."""
    head_dim: int | None = None
    """Width of a query or key head; None: hidden_size / num_heads."""
    num_value_heads: int | None = None
    """Number of value heads of an "fw" layer, a multiple of its key heads; None: as many as key heads."""
    value_dim: int | None = None
    """Width of a value head of an "fw" layer; None: `head_dim`."""
    qkv_bias: bool = False
    """Whether the q, k and v projections have biases."""
    o_bias: bool = False
    """Whether the output projection has a bias."""
    qk_norm: str | None = None
    """RMSNorm of q and k, over each "head" or the "full" width; None: no norm."""
    zero_centered_norms: bool = False
    """Whether the norms of q and k multiply by 1 + w instead of w."""
    kv_activation: str | None = "default"
    """Activation of the KV-memory's values: "silu" or None; "default": that of `HybridMemory`."""
    fw_activation: str | None = "default"
    """Activation of the FW-memory's values: "silu" or None; "default": that of `HybridMemory`."""
    head_norm: bool | str | None = None
    """RMSNorm of the mixed reads: over each "head" (or True), each "group" of value heads that share a key head, or the
    "full" width; False: no norm; None: over heads in layers with an FW-memory."""
    norm_eps: float = 1e-6
    """Epsilon of every RMSNorm."""
    conv_size: int = 0
    """Kernel size of a short convolution over q, k and v; 0: no convolution."""
    output_gate: bool | str = False
    """Activation of an output gate W_g x that multiplies the normed heads: "silu" (or True) or "sigmoid"; False: no
    gate."""
    gate_rank: int | None = None
    """Rank of the output gate's projection; None: full rank."""
    norm_after_gate: bool = False
    """Whether the norm of the heads is applied after the output gate, not before it."""

    options: dict[str, Any] | None = None
    """Options of registered rules, mixers and blends that have no field here, by name."""

    layer_kinds: list[str] | None = None
    """Kind of each layer: "hybrid", "kv" (KV-memory only) or "fw" (FW-memory only); None: all hybrid."""
    kv_window: int | list[int | None] | None = None
    """Window of "kv" layers in tokens, or a list with one entry per layer; None: full attention."""
    of_kind: dict[str, dict[str, Any]] | None = None
    """Fields that differ for layers of one kind, such as {"fw": {"num_heads": 16, "conv_size": 4}}."""
    block_norms: str = "before"
    """Position of a block's norms: "before" its memory and MLP, "after" them (on their outputs), or "both"."""
    zero_centered_block_norms: bool = False
    """Whether the norms of the blocks and the final norm multiply by 1 + w instead of w."""
    num_hidden_layers: int = 24
    """Number of blocks."""
    intermediate_size: int | None = None
    """Width of the SwiGLU MLPs; None: 256·⌈(8/3)·hidden_size/256⌉."""
    mlp_bias: bool = False
    """Whether the MLPs have biases."""
    vocab_size: int = 32_000
    """Number of tokens in the vocabulary."""
    tie_word_embeddings: bool = False
    """Whether the output head shares its weight with the embeddings."""
    initializer_range: float = 0.02
    """Standard deviation of initial linear maps and embeddings, except those that write to the residual stream."""
    conv_init: str = "uniform"
    """Initial weights of short convolutions: "uniform" in ±1/√conv_size, or "identity"."""

    use_cache: bool = True
    """Whether a forward pass returns the states of the memories, so that another one can continue from them."""
    bos_token_id: int | None = None
    """Token that begins a text, if there is one."""
    eos_token_id: int | list[int] | None = None
    """Token or tokens that end generation, if there are any."""
    pad_token_id: int | None = None
    """Padding token, if there is one. Its embedding is not treated specially."""

    def __post_init__(self, **kwargs: Any) -> None:
        self._refuse_unknown(kwargs)
        if self.intermediate_size is None:
            self.intermediate_size = 256 * -(-8 * self.hidden_size // (3 * 256))
        super().__post_init__(**kwargs)
        self.check()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers, but misspelled fields are rejected and the config is checked again with all overrides."""
        return_unused = kwargs.pop("return_unused_kwargs", False)
        foreign = {name: value for name, value in config_dict.items() if not cls._knows(name)}
        cls._refuse_misspelt(foreign)
        own = {name: value for name, value in config_dict.items() if name not in foreign}
        config, unused = super().from_dict(own, return_unused_kwargs=True, **kwargs)
        for name, value in foreign.items():
            setattr(config, name, unused.pop(name, value))
        config.check()
        cls._refuse_misspelt(unused)
        return (config, unused) if return_unused else config

    def set_retention(self, retention: str, window: int | None = None, **options: Any) -> None:
        """Change the retention of all layers, as `hqlt.with_retention` does. Options that are not given are reset.

        Args:
            retention: name of the retention.
            window (tokens): new window of all layers that have one. Default: unchanged.
            **options: options of the retention.

        Raises:
            ValueError: as `check` does.
        """
        kind, before = find("retention", retention), find("retention", self.retention)
        split_options(options, {f"retention={retention!r}": kind, "KV": KVMemory.with_retention})
        changed = {"retention"}.union(*(options_of(of) for of in (before, kind, KVMemory.with_retention)))
        own = {field.name: field.default for field in fields(self) if field.name in changed}
        if window is not None:
            windows = self.kv_window if isinstance(self.kv_window, list) else [self.kv_window]
            windows = [None if old is None else window for old in windows]
            self.kv_window = windows if isinstance(self.kv_window, list) else windows[0]
            self.window = None if self.window is None else window
        for name, default in own.items():
            setattr(self, name, options.get(name, default))
        self.retention = retention
        others = {name: value for name, value in (self.options or {}).items() if name not in changed}
        self.options = others | {name: value for name, value in options.items() if name not in own} or None
        if self.of_kind is not None:
            self.of_kind = {
                of: {name: value for name, value in given.items() if name not in changed}
                for of, given in self.of_kind.items()
            }
        self.check()

    @property
    def kinds(self) -> list[str]:
        """The kind of each layer."""
        return ["hybrid"] * self.num_hidden_layers if self.layer_kinds is None else self.layer_kinds

    def layer_options(self, layer: int) -> dict[str, Any]:
        """The arguments of `HybridMemory` for this layer: the parts of its kind, and the options that they use."""
        kind = self.kinds[layer]
        kv_window = self.kv_window[layer] if isinstance(self.kv_window, list) else self.kv_window
        window = {"hybrid": self.window, "kv": kv_window, "fw": None}[kind]
        given = {"depth": (layer, self.num_hidden_layers)} | self._fields_of(kind)
        choices = choices_of(kind, given)
        used = arguments_of(**choices)
        if kind == "kv" and kv_window is None:  # nothing lies beyond an unlimited window
            choices["retention"] = "recent"
            used = [name for name in arguments_of(**choices) if name not in options_of(KVMemory.with_retention)]
        if given["beta_max"] is None and "beta_max" in used:
            given = given | {"beta_max": options_of(find("rule", choices["fast_weights"]))["beta_max"]}
        return {name: given[name] for name in used if name in given} | choices | {"window": window}

    def block_options(self, layer: int) -> dict[str, Any]:
        """The arguments of this layer's `Block`, other than its memory and MLP."""
        norms = self._fields_of(self.kinds[layer])["block_norms"]
        return {"norm_eps": self.norm_eps, "norms": norms, "zero_centered": self.zero_centered_block_norms}

    def _fields_of(self, kind: str) -> dict[str, Any]:
        shared = ("block_norms", "options", "of_kind", *layer_arguments())
        return fields_of(kind, {name: getattr(self, name) for name in shared if hasattr(self, name)})

    def check(self) -> None:
        """Check that a model can be built.

        Raises:
            ValueError: when it cannot.
        """
        for name in ("num_hidden_layers", "intermediate_size", "vocab_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name in ("norm_eps", "initializer_range"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a number above 0, got {getattr(self, name)}")
        if len(self.kinds) != self.num_hidden_layers:
            raise ValueError(
                f"layer_kinds: expected one entry for each of the {self.num_hidden_layers} layers "
                f"(num_hidden_layers), got {len(self.kinds)}: {self.kinds}"
            )
        for kind in self.kinds:
            check_choice("layer_kinds", kind, LAYER_KINDS)
        check_choice("conv_init", self.conv_init, CONV_INITS)
        for kind, own in (self.of_kind or {}).items():
            self._check_kind(kind, own)
        for layer in range(self.num_hidden_layers):
            check_choice("block_norms", self.block_options(layer)["norms"], BLOCK_NORMS)
        if isinstance(self.kv_window, list) and len(self.kv_window) != self.num_hidden_layers:
            raise ValueError(
                f"kv_window: expected one number, or an entry for each of the {self.num_hidden_layers} layers, got "
                f"{len(self.kv_window)}: {self.kv_window}"
            )
        layers = [self.layer_options(layer) for layer in range(self.num_hidden_layers)]
        self._refuse_unused(layers)
        with torch.device("meta"):  # the layer checks its own arguments, and costs nothing on this device
            for options in {repr(options): options for options in layers}.values():
                HybridMemory(**options)

    def _check_kind(self, kind: str, own: dict[str, Any]) -> None:
        check_choice("of_kind", kind, dict.fromkeys(self.kinds))
        used = self.layer_options(self.kinds.index(kind))
        for name in own:
            check_choice(
                f"of_kind[{kind!r}]", name, sorted({"block_norms", *used} - {"hidden_size", "window", "blend"})
            )

    def _refuse_unused(self, layers: list[dict[str, Any]]) -> None:
        """Refuse options that differ from their defaults and that no layer uses."""
        used, known = {name for options in layers for name in options}, set(layer_arguments())
        changed = [
            field.name for field in fields(self) if field.name in known and getattr(self, field.name) != field.default
        ]
        for name in [*changed, *(self.options or {})]:
            if name not in used and name not in ("window", "blend"):
                raise ValueError(
                    f"{name}: expected an option that a layer uses (layer_kinds {sorted(set(self.kinds))}, "
                    f"blend={self.blend!r}, mixer={self.mixer!r}, fast_weights={self.fast_weights!r}, "
                    f"retention={self.retention!r}), got one that no layer uses; remove it"
                )

    @classmethod
    def _own(cls) -> list[str]:
        return [field.name for field in fields(cls) if field.name in HQLTConfig.__annotations__]

    @classmethod
    def _knows(cls, name: str) -> bool:
        """Whether it is a field, or a key that transformers itself passes."""
        known = {field.name for field in fields(cls)} | FROM_TRANSFORMERS | cls.attribute_map.keys()
        return name.startswith("_") or name in known

    @classmethod
    def _refuse_unknown(cls, kwargs: dict[str, Any]) -> None:
        cls._refuse_misspelt(kwargs, cutoff=0.6)
        for name in kwargs:
            if not cls._knows(name):
                raise ValueError(
                    f"{cls.__name__}: expected fields of this config, got unknown {name!r}; "
                    f"the fields are {', '.join(cls._own())}"
                )

    @classmethod
    def _refuse_misspelt(cls, kwargs: Iterable[str], cutoff: float = MISSPELT) -> None:
        for name in kwargs:
            near = difflib.get_close_matches(name, cls._own(), n=1, cutoff=cutoff)
            if near and not cls._knows(name):
                raise ValueError(
                    f"{cls.__name__}: expected fields of this config, got unknown {name!r}; did you mean {near[0]!r}?"
                )
