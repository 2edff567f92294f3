"""A language model's configuration: `HybridMemory`'s own field names, and what a model adds to a layer."""

# No `from __future__ import annotations` here: the type checks of transformers' configs read the types themselves.

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
"""Keys that are no fields of a config, and that transformers itself passes: in `to_dict`, saving, loading, the Auto
classes. Its private ones, which begin with an underscore, come on top."""

MISSPELT = 0.85
"""How like a field a key in a file must be to count as that field misspelt. (unk_token_id is not bos_token_id.)"""


def fields_of(kind: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """What layers of this kind are built from: the fields that all share, `options`, and the kind's own (`of_kind`)."""
    return {**fields, **(fields.get("options") or {}), **(fields.get("of_kind") or {}).get(kind, {})}


def choices_of(kind: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """What is chosen by name in a layer of this kind."""
    return {
        "blend": fields["blend"] if kind == "hybrid" else f"{kind}-only",
        "mixer": fields["mixer"] if kind == "hybrid" else None,
        "fast_weights": None if kind == "kv" else fields["fast_weights"],
        "retention": None if kind == "fw" else fields["retention"],
    }


def without_unused(shared: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """The fields that several models share, without those that a model with these fields of its own has no use for.

    Raises ValueError for an unknown name.
    """
    defaults = {"blend": "synchronous", "mixer": "vector", "fast_weights": "delta", "retention": "recent"}
    fields = defaults | shared | own
    kinds = fields.get("layer_kinds") or "hybrid"
    several = kinds if isinstance(kinds, list) else [kinds]
    choices = [choices_of(kind, fields_of(kind, fields)) for kind in LAYER_KINDS if kind in several]
    if not choices:  # none of those kinds is one: the config says so
        return shared
    used = {name for choice in choices for name in arguments_of(**choice)}
    return {name: value for name, value in shared.items() if name in used or name not in layer_arguments()}


@strict
class HQLTConfig(PreTrainedConfig):
    """What `HQLTForCausalLM` is built from. The defaults are the paper's 340M model.

    >>> HQLTConfig(hidden_size=256, num_heads=4, num_hidden_layers=4, blend="delayed-chunk")
    >>> HQLTConfig(num_hidden_layers=4, layer_kinds=["fw", "kv", "fw", "kv"], kv_window=256)  # alternates over depth

    Raises ValueError for values that do not fit together and for unknown keys (transformers keeps those silently),
    and huggingface_hub's StrictDataclassFieldValidationError for a value of the wrong type, also when it is assigned.
    In a file, and among what is given beside a file, only keys that look like misspelt fields are refused: other tools
    write attributes of their own there (they are kept), and loaders pass on what is not the config's (it is ignored).
    """

    model_type = "hqlt"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012
    attribute_map = {"num_attention_heads": "num_heads"}  # noqa: RUF012

    hidden_size: int = 1024
    """Width of the residual stream."""
    num_heads: int = 8
    """Heads of every layer; they divide `hidden_size`."""
    window: int | None = 64
    """Tokens that a hybrid layer's KV-memory reaches, the current one included; None: all (synchronous only)."""
    blend: str = "synchronous"
    """When a token reaches each memory of a hybrid layer: "synchronous", "delayed-streaming", "delayed-chunk"."""
    mixer: str = "vector"
    """How a hybrid layer's two reads become one: "vector", "scalar", "sum", "add"."""
    fast_weights: str = "delta"
    """The FW-memory's write rule: "delta", "linear", "gated-delta", … (docs/rules.md)."""
    retention: str = "recent"
    """Which entries stay visible beyond a KV-memory's window: "recent" for none, "surprise", "value-norm", "random"."""
    kept: int = 0
    """Entries that a KV head keeps beyond its window, with another retention than "recent"."""
    score: str = "error"
    """What retention "surprise" compares: "error" or "beta-error"."""
    sinks: int = 0
    """First entries of a segment that stay visible beyond the window."""
    kept_alike: bool = False
    """Whether all heads keep the same entries."""
    kept_positions: str = "true"
    """How entries beyond the window are turned: "true" distance, "clamped" to the window, or "none"."""
    kept_norm: bool = False
    """RMSNorm of q and k of its own for entries beyond the window."""
    kept_gate: float | int | None = None
    """Where the logarithm of their weight begins, a number for each query head; None: no such weight."""
    beta_max: float | int | None = None
    """The largest write strength: 2.0 lets a rule track state, 1.0 is DeltaNet's. None: the rule's own default."""
    beta_bias: float | int | None = None
    """Where the bias of the write strengths' logits begins; None: there is none."""
    gate_bias: float | int | None = None
    """Where the bias of the mixer's logits begins; None: there is none."""
    write_gates: str = "current"
    """What Delayed-Streaming writes with: the gates of the "current" token, or the written one's "own"."""
    rope_theta: float | int | None = 10_000.0
    """Base of the KV-memory's rotary positions; None: no positions."""
    partial_rotary_factor: float | int = 1.0
    """The part of a head that rotary positions turn."""
    rope_scaling: dict[str, Any] | None = None
    """How rotary positions are scaled, as transformers names it; None: not."""
    num_kv_heads: int | None = None
    """Heads of pairs and matrices, which query heads share; None: `num_heads`."""
    head_dim: int | None = None
    """Width of a query or key head; None: hidden_size / num_heads."""
    num_value_heads: int | None = None
    """Value heads of an "fw" layer, a multiple of its key heads; None: as many."""
    value_dim: int | None = None
    """Width of a value head of an "fw" layer; None: `head_dim`."""
    qkv_bias: bool = False
    """Whether the projections to q, k and v have biases."""
    o_bias: bool = False
    """Whether the projection of what was read has a bias."""
    qk_norm: str | None = None
    """RMSNorm of q and k, over each "head" or the "full" width; None: none."""
    zero_centered_norms: bool = False
    """Whether the weight of the norms of q and k is 1 + w."""
    kv_activation: str | None = "default"
    """Of the values that the KV-memory sees: "silu" or None; "default": as `HybridMemory` has it."""
    fw_activation: str | None = "default"
    """Of the values that the FW-memory sees: "silu" or None; "default": as `HybridMemory` has it."""
    head_norm: bool | str | None = None
    """RMSNorm of what was read: over each "head" (or True), "group" of value heads with a common key head, or the
    "full" width; False: none; None: over heads where there is an FW-memory."""
    norm_eps: float = 1e-6
    """Added under the root of every RMSNorm."""
    conv_size: int = 0
    """Taps of a short convolution on q, k and v; 0: none."""
    output_gate: bool | str = False
    """What a layer's normed heads are multiplied by: "silu" (or True) of W_g x, "sigmoid" of it; False: nothing."""
    gate_rank: int | None = None
    """Numbers that the output gate's logits pass through; None: one matrix."""
    norm_after_gate: bool = False
    """Whether what the output gate has multiplied is normed, instead of the heads before it."""

    options: dict[str, Any] | None = None
    """Options of registered rules, mixers and blends that have no field here, by name."""

    layer_kinds: list[str] | None = None
    """One of "hybrid", "kv" (KV-memory alone) and "fw" (FW-memory alone) for each layer; None: all hybrid."""
    kv_window: int | list[int | None] | None = None
    """Tokens that a "kv" layer reaches, or a list with an entry for each layer; None: all, full attention."""
    of_kind: dict[str, dict[str, Any]] | None = None
    """What layers of one kind have otherwise than these fields: {"fw": {"num_heads": 16, "conv_size": 4}}."""
    block_norms: str = "before"
    """Where a block has norms: "before" its memory and its MLP, "after" them (of what they add), or "both"."""
    zero_centered_block_norms: bool = False
    """Whether the weight of the blocks' norms, and of the last one, is 1 + w."""
    num_hidden_layers: int = 24
    """Blocks of the model."""
    intermediate_size: int | None = None
    """Width of the SwiGLU MLPs; None: 256·⌈(8/3)·hidden_size/256⌉."""
    mlp_bias: bool = False
    """Whether the MLPs have biases."""
    vocab_size: int = 32_000
    """Tokens that the model knows."""
    tie_word_embeddings: bool = False
    """Whether the head uses the embeddings' matrix."""
    initializer_range: float = 0.02
    """Standard deviation of the initial linear maps and embeddings, but for those that write to the residual stream."""
    conv_init: str = "uniform"
    """How short convolutions begin: "uniform" in ±1/√conv_size, or "identity", the current token as it is."""

    use_cache: bool = True
    """Whether a call returns the memories' states, so that another call can go on."""
    bos_token_id: int | None = None
    """The token that begins a text, if there is one."""
    eos_token_id: int | list[int] | None = None
    """The token or tokens that end generation, if there are any."""
    pad_token_id: int | None = None
    """The token that fills up batches, if there is one. Its embedding is a token's like any other."""

    def __post_init__(self, **kwargs: Any) -> None:
        self._refuse_unknown(kwargs)
        if self.intermediate_size is None:
            self.intermediate_size = 256 * -(-8 * self.hidden_size // (3 * 256))
        super().__post_init__(**kwargs)
        self.check()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers, but misspelt fields are refused, and the overridden config is checked again."""
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
        """Say what `hqlt.with_retention` changes: what is not given is as by default, in layers of every kind.

        Raises ValueError as `check` does.
        """
        kind, before = find("retention", retention), find("retention", self.retention)
        split_options(options, {f"retention={retention!r}": kind, "KV": KVMemory.with_retention})
        changed = {"retention"}.union(*(options_of(of) for of in (before, kind, KVMemory.with_retention)))
        own = {field.name: field.default for field in fields(self) if field.name in changed}
        if window is not None:
            each = self.kv_window if isinstance(self.kv_window, list) else [self.kv_window]
            each = [None if reach is None else window for reach in each]
            self.kv_window = each if isinstance(self.kv_window, list) else each[0]
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
        """What `HybridMemory` is built with for this layer: its kind's choices, and the options that they use."""
        kind = self.kinds[layer]
        kv_window = self.kv_window[layer] if isinstance(self.kv_window, list) else self.kv_window
        window = {"hybrid": self.window, "kv": kv_window, "fw": None}[kind]
        given = {"depth": (layer, self.num_hidden_layers)} | self._fields_of(kind)
        choices = choices_of(kind, given)
        used = arguments_of(**choices)
        if kind == "kv" and kv_window is None:  # there is nothing beyond its reach
            choices["retention"] = "recent"
            used = [name for name in arguments_of(**choices) if name not in options_of(KVMemory.with_retention)]
        if given["beta_max"] is None and "beta_max" in used:
            given = given | {"beta_max": options_of(find("rule", choices["fast_weights"]))["beta_max"]}
        return {name: given[name] for name in used if name in given} | choices | {"window": window}

    def block_options(self, layer: int) -> dict[str, Any]:
        """What this layer's `Block` is built with beside its parts."""
        norms = self._fields_of(self.kinds[layer])["block_norms"]
        return {"norm_eps": self.norm_eps, "norms": norms, "zero_centered": self.zero_centered_block_norms}

    def _fields_of(self, kind: str) -> dict[str, Any]:
        shared = ("block_norms", "options", "of_kind", *layer_arguments())
        return fields_of(kind, {name: getattr(self, name) for name in shared if hasattr(self, name)})

    def check(self) -> None:
        """Raise ValueError, saying what was expected and what came, where no model can be built from these values."""
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
        with torch.device("meta"):  # the layer knows what it refuses, and on this device costs nothing
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
        """An option that was changed, and that no layer uses."""
        used, known = {name for options in layers for name in options}, set(layer_arguments())
        changed = [
            field.name for field in fields(self) if field.name in known and getattr(self, field.name) != field.default
        ]
        for name in [*changed, *(self.options or {})]:
            if name not in used and name not in ("window", "blend"):
                raise ValueError(
                    f"{name}: expected an option that a layer uses (layer_kinds {sorted(set(self.kinds))}, "
                    f"blend={self.blend!r}, mixer={self.mixer!r}, fast_weights={self.fast_weights!r}, "
                    f"retention={self.retention!r}), got one that "
                    f"none does; leave it out"
                )

    @classmethod
    def _own(cls) -> list[str]:
        return [field.name for field in fields(cls) if field.name in HQLTConfig.__annotations__]

    @classmethod
    def _knows(cls, name: str) -> bool:
        """Whether it is a field, or one of transformers' own keys."""
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
