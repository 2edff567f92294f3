"""Conversion of the paper's checkpoints: names are mapped, shapes checked, and every tensor is accounted for."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hqlt.language.checkpoint import Checkpoint
from hqlt.language.paper_config import read_settings
from hqlt.model import HQLTConfig, HQLTForCausalLM

OUTSIDE_LAYERS = {
    "model.embed_tokens.weight": "model.embeddings.weight",
    "model.norm.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
}
IN_A_LAYER = {
    "memory_norm": "attn_norm",
    "mlp_norm": "mlp_norm",
    **{f"memory.{name}": f"attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "g_proj", "o_proj", "o_norm")},
    "memory.fw.beta_proj": "attn.b_proj",
    "memory.fw.decay_proj": "attn.a_proj",
    "memory.fw.A_log": "attn.A_log",
    "memory.fw.dt_bias": "attn.dt_bias",
    **{f"mlp.{name}": f"mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")},
}
MIXERS = {"vector": "attn.memory_gate_proj", "scalar": "attn.memory_mixer"}
CONVOLUTIONS = ("attn.q_conv1d", "attn.k_conv1d", "attn.v_conv1d")


class Converted(NamedTuple):
    """A converted model, and what to report about it."""

    model: HQLTForCausalLM
    names: dict[str, list[str]]
    """Our name of a tensor → names of the source tensors."""
    skipped: dict[str, str]
    """Source tensors that are not used → the reason."""
    notes: list[str]
    """Differences between the model and the code it comes from."""
    reference: Callable[[], PreTrainedModel] | None = None
    """Returns the original model, for comparison; None: its code is not available."""


def convert(checkpoint: Checkpoint) -> Converted:
    """Convert a checkpoint of the paper's code.

    Raises:
        ValueError: when a setting has no counterpart, or a tensor is missing, unknown or has the wrong shape.
    """
    config, notes = read_settings(checkpoint.settings)
    with torch.device("meta"):
        model = HQLTForCausalLM(config)
    theirs = checkpoint.tensors
    names = {ours: sources(ours, config, theirs) for ours in model.state_dict()}
    skipped = {name: why for name in theirs if (why := reason_to_skip(name, theirs[name], config))}
    check_all_used(names, theirs, skipped)
    weights = {
        ours: assemble(ours, [theirs[name] for name in parts], fused=is_fused_mlp(ours, theirs))
        for ours, parts in names.items()
    }
    for ours, expected in model.state_dict().items():
        if weights[ours].shape != expected.shape:
            raise ValueError(
                f"{ours}: expected shape {list(expected.shape)} according to the config, got "
                f"{list(weights[ours].shape)} from {', '.join(names[ours])}"
            )
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    return Converted(model.eval(), names, skipped, notes)


def sources(ours: str, config: HQLTConfig, theirs: Mapping[str, Tensor]) -> list[str]:
    """The source tensors of one of our tensors."""
    if ours == "lm_head.weight" and config.tie_word_embeddings and ours not in theirs:
        return [OUTSIDE_LAYERS["model.embed_tokens.weight"]]
    if ours in OUTSIDE_LAYERS:
        return [OUTSIDE_LAYERS[ours]]
    found = re.fullmatch(r"(model\.layers\.\d+)\.(.+?)(\.weight|\.bias|)", ours)
    layer, part, leaf = found.groups()  # type: ignore[union-attr]
    if part == "memory.conv":
        return [f"{layer}.{name}.weight" for name in CONVOLUTIONS]
    if part == "mlp.up_proj" and is_fused_mlp(ours, theirs):
        part = "mlp.gate_proj"
    return [f"{layer}.{MIXERS[config.mixer] if part == 'memory.mixer.gate_proj' else IN_A_LAYER[part]}{leaf}"]


def is_fused_mlp(ours: str, theirs: Mapping[str, Tensor]) -> bool:
    """Whether this is a gate or up projection that the source stores in one tensor, as older versions do."""
    layer, mlp, part = ours.partition(".mlp.")
    return part in ("gate_proj.weight", "up_proj.weight") and f"{layer}{mlp}up_proj.weight" not in theirs


def assemble(ours: str, parts: list[Tensor], fused: bool) -> Tensor:
    """Build one of our tensors: convolutions are concatenated, and a fused MLP has the gate's rows first."""
    if ours.endswith("memory.conv.weight"):
        return torch.cat([part.squeeze(1) for part in parts])
    (weight,) = parts
    if fused:
        return weight.chunk(2)[0 if ours.endswith("gate_proj.weight") else 1].clone()
    return weight


def reason_to_skip(name: str, tensor: Tensor, config: HQLTConfig) -> str | None:
    """Why a source tensor has no counterpart; None if it should have one."""
    if found := re.fullmatch(r"model\.layers\.(\d+)\.attn\.rotary\.inv_freq", name):
        layer = config.layer_options(int(found[1])) if int(found[1]) < config.num_hidden_layers else {}
        if not layer.get("rope_theta"):
            return None
        k = layer["hidden_size"] // layer["num_heads"]
        expected = layer["rope_theta"] ** (-torch.arange(0, k, 2, dtype=torch.float64) / k)
        if tensor.shape == expected.shape and torch.allclose(tensor.double(), expected, rtol=1e-2):
            return "computed from rope_theta"
    if name.endswith("attn.b_proj.weight") and config.fast_weights == "linear":
        return "unused by the original code: linear attention has no write strength β"
    if name.endswith("attn.memory_mixer.weight") and config.mixer == "vector":
        return "unused by the original code: the vector gate takes precedence"
    return None


def check_all_used(names: Mapping[str, list[str]], theirs: Mapping[str, Tensor], skipped: Mapping[str, str]) -> None:
    """Refuse missing and unknown tensors, and suggest similar names.

    Raises:
        ValueError: when there are any.
    """
    used = {name for parts in names.values() for name in parts}
    missing = sorted(used - set(theirs))
    unknown = sorted(set(theirs) - used - set(skipped))
    if not missing and not unknown:
        return
    lines = []
    for word, some, others in (("missing", missing, unknown), ("unknown", unknown, missing)):
        for name in some[:8]:
            near = difflib.get_close_matches(name, others, n=1)
            lines.append(f"  {word}: {name}{f' (did you mean {near[0]}?)' if near else ''}")
        lines += [f"  … and {len(some) - 8} more {word}"] * (len(some) > 8)
    raise ValueError(
        "expected a checkpoint with exactly the tensors of its config, got\n"
        + "\n".join(lines)
        + "\nMap different names by --map, a YAML file of regular expressions and their replacements."
    )
