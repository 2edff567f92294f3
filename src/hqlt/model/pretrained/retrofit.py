"""Conversion of a model with full attention to one with windowed attention and FW-memories."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch

from hqlt.model.config import HQLTConfig
from hqlt.model.language_model import HQLTForCausalLM

NO_RULE = "none"
"""Instead of a rule: layers get a window but no FW-memory."""


def config_for(
    kv: HQLTConfig,
    *,
    full: Sequence[int] = (),
    window: int = 64,
    sinks: int = 4,
    rule: str = "delta",
    retention: str = "recent",
    kept: int = 0,
    **options: Any,
) -> HQLTConfig:
    """The config of a retrofitted model.

        full layers      y = full attention
        other layers     y = attention to window and sinks + γ ⊙ RMSNorm(FW read)     γ = 0 at initialization

    The other layers become hybrid layers with blend "synchronous", mixer "add" and no activation of the values. With
    rule "none" they remain attention, to window and sinks only. The retrofitted model uses all weights of the original.
    Before training, its logits equal those of the original for the first window + sinks tokens of a segment, and those
    of windowed attention after them.

    Args:
        kv: config of a model with full attention (`hqlt convert`).
        full: indices of the layers that keep full attention.
        window (tokens): window of the other layers.
        sinks (tokens): number of first tokens of a segment that stay visible.
        rule: write rule of the FW-memories, or "none".
        retention: which entries stay visible beyond the window.
        kept: number of these entries per KV head.
        **options: any fields of `HQLTConfig`, or options of the rule, such as feature_map="learned".

    Returns:
        A new config.

    Raises:
        ValueError: when the model has layers other than full attention, when an index in `full` does not exist, when no
            layer would change, and as `HQLTConfig` does.
    """
    refuse_other_than_full(kv)
    layers = kv.num_hidden_layers
    if wrong := sorted({index for index in full if not 0 <= index < layers}):
        raise ValueError(f"full: expected indices of layers from 0 to {layers - 1}, got {wrong}")
    if len(set(full)) == layers:
        raise ValueError(f"full: expected fewer than all {layers} layers, got all; nothing would change")
    config, alone = copy.deepcopy(kv), rule == NO_RULE
    kinds = ["kv" if alone or layer in full else "hybrid" for layer in range(layers)]
    if own := (kv.of_kind or {}).get("kv"):
        config.of_kind = {kind: dict(own) for kind in kinds}
    config.layer_kinds = kinds
    if alone:
        config.kv_window = [None if layer in full else window for layer in range(layers)]
    else:
        config.window, config.blend, config.mixer, config.fast_weights = window, "synchronous", "add", rule
        config.fw_activation = None
    config.sinks, config.retention, config.kept = sinks, retention, kept
    _set_others(config, options)
    config.check()
    return config


def _set_others(config: HQLTConfig, options: dict[str, Any]) -> None:
    others = dict(config.options or {})
    for name, value in options.items():
        if name in HQLTConfig.__annotations__:
            setattr(config, name, value)
        else:
            others[name] = value
    config.options = others or None


def refuse_other_than_full(config: HQLTConfig) -> None:
    """Check that all layers of a model are full attention.

    Raises:
        ValueError: when they are not.
    """
    if other := sorted({kind for kind in config.kinds if kind != "kv"}):
        raise ValueError(
            f"model: expected only kv layers, as `hqlt convert` makes of a transformer, got also {' and '.join(other)} "
            f"layers, whose memory is bounded already"
        )
    windows = config.kv_window if isinstance(config.kv_window, list) else [config.kv_window]
    if any(window is not None for window in windows):
        raise ValueError(f"model: expected layers with full attention (kv_window None), got {config.kv_window}")


def retrofitted(teacher: HQLTForCausalLM, config: HQLTConfig) -> HQLTForCausalLM:
    """Build the retrofitted model.

    Args:
        teacher: the original model.
        config: `config_for(teacher.config, …)`.

    Returns:
        A model that shares the teacher's tensors. Only its new parameters require gradients.
    """
    student = HQLTForCausalLM(config)
    missing, unknown = student.load_state_dict(teacher.state_dict(), strict=False, assign=True)
    assert not unknown, f"weights of the teacher that the student lacks: {unknown}"
    student.tie_weights()
    student.generation_config = copy.deepcopy(teacher.generation_config)
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(name in missing)
    torch.nn.Module.to(student, teacher.device)
    return student
