"""LoRA by the package peft: low-rank updates of a model's linear maps, and merging them."""

from __future__ import annotations

import importlib
from typing import Any

from torch import nn

from hqlt.errors import require
from hqlt.model import HQLTForCausalLM

IN_LORA = ".lora_"
"""Part of the names of its parameters."""


class Lora:
    """Low-rank updates of all frozen linear maps in the blocks.

        W x → W x + B A x       A [rank, in] random, B [out, rank] zero at initialization

    Maps that are trained themselves are not changed.

    Args:
        model: the model, which is modified in place.
        rank: rank of the updates.

    Source:
        Hu et al. 2021, "LoRA", section 4.1.
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
        for name, parameter in model.named_parameters():  # peft freezes all other parameters
            parameter.requires_grad_(name in trained or IN_LORA in name)

    def merge(self) -> None:
        """Add B A to the weights, as new tensors, and restore the model's original modules."""
        self.wrapped.merge_and_unload(safe_merge=True)
