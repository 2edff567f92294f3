"""Low-rank changes to a model's linear maps, by peft, and their merging."""

from __future__ import annotations

import importlib
from typing import Any

from torch import nn

from hqlt.errors import require
from hqlt.model import HQLTForCausalLM

IN_LORA = ".lora_"
"""Stands in the names of its parameters."""


class Lora:
    """W x → W x + B A x for the linear maps of the blocks, A [rank, in] begun at random, B [out, rank] at 0.

    Frozen maps alone: those of new parameters are trained themselves. Source: Hu et al. 2021, "LoRA", section 4.1.
    """

    def __init__(self, model: HQLTForCausalLM, rank: int) -> None:
        require("peft")
        peft: Any = importlib.import_module("peft")
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        maps = [
            f"model.{name}"
            for name, module in model.model.named_modules()
            if isinstance(module, nn.Linear) and not module.weight.requires_grad
        ]
        config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=maps)
        self.wrapped: Any = peft.LoraModel(model, config, "default")
        for name, parameter in model.named_parameters():  # peft freezes all but its own
            parameter.requires_grad_(name in trained or IN_LORA in name)

    def merge(self) -> None:
        """Add B A to the weights, in new tensors, and take the model back to what it was made of."""
        self.wrapped.merge_and_unload(safe_merge=True)
