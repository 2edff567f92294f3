"""A model of full attention as one whose layers attend to a window, with an FW-memory beside it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch

from hqlt.model.config import HQLTConfig
from hqlt.model.language_model import HQLTForCausalLM

NO_RULE = "none"
"""In a rule's place: layers get a window, and no FW-memory beside it."""


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
    """The config of a retrofitted model, from that of a model of full attention (`hqlt convert`).

        full layers      y = attention to everything, as it was
        all others       y = attention to the window and sinks + γ ⊙ RMSNorm(FW read), begun at γ = 0

    The layers in `full` stay as they are; the others become hybrid, blend "synchronous", mixer "add", values without an
    activation in both memories. With rule "none" they stay attention, to the window and sinks alone. So all weights of
    the model have their place, and a model with them, the new ones untrained, has its logits exactly for the first
    window + sinks tokens of a segment, and beyond them those of the windowed attention.

    retention, kept: `kept` entries stay visible beyond the window, by this policy. options: any field of HQLTConfig or
    option of the rule, such as feature_map="learned".

    Raises ValueError for a model with other layers than full attention, for indices of layers that it does not have,
    where no layer would change, and as HQLTConfig does.
    """
    refuse_other_than_full(kv)
    layers = kv.num_hidden_layers
    if wrong := sorted({index for index in full if not 0 <= index < layers}):
        raise ValueError(f"full: expected indices of layers from 0 to {layers - 1}, got {wrong}")
    if len(set(full)) == layers:
        raise ValueError(f"full: expected fewer than all {layers} layers, got all, and nothing would change")
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
    """Raises ValueError for a model that has other layers than kv layers that attend to everything."""
    if other := sorted({kind for kind in config.kinds if kind != "kv"}):
        raise ValueError(
            f"model: expected kv layers alone, as `hqlt convert` makes of a transformer, got {' and '.join(other)} "
            f"layers too; such a model has a bounded memory already"
        )
    reach = config.kv_window if isinstance(config.kv_window, list) else [config.kv_window]
    if any(window is not None for window in reach):
        raise ValueError(f"model: expected layers that attend to everything (kv_window None), got {config.kv_window}")


def retrofitted(teacher: HQLTForCausalLM, config: HQLTConfig) -> HQLTForCausalLM:
    """A model of `config_for(teacher.config, …)`: the teacher's tensors, which both then share, and new parameters as
    they begin. Those alone ask for gradients.
    """
    student = HQLTForCausalLM(config)
    missing, unknown = student.load_state_dict(teacher.state_dict(), strict=False, assign=True)
    assert not unknown, f"the teacher's weights without a place: {unknown}"
    student.tie_weights()
    student.generation_config = copy.deepcopy(teacher.generation_config)
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(name in missing)
    torch.nn.Module.to(student, teacher.device)
    return student
