"""Language models for transformers, registered with its Auto classes."""

from __future__ import annotations

import sys

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from hqlt.model.cache import HQLTCache, register_cache_for_export
from hqlt.model.config import HQLTConfig
from hqlt.model.language_model import HQLTForCausalLM, HQLTModel
from hqlt.model.presets import preset

__all__ = ["HQLTCache", "HQLTConfig", "HQLTForCausalLM", "HQLTModel", "preset", "register_cache_for_export"]

AutoConfig.register(HQLTConfig.model_type, HQLTConfig, exist_ok=True)
AutoModel.register(HQLTConfig, HQLTModel, exist_ok=True)
AutoModelForCausalLM.register(HQLTConfig, HQLTForCausalLM, exist_ok=True)

# `transformers serve` and pipelines look up a config's architecture among the attributes of the transformers module.
# transformers.processing_utils imports transformers a second time, so some modules hold an older module object: set the
# classes on each of them.
_parts = [vars(part) for name, part in list(sys.modules.items()) if name.partition(".")[0] == "transformers"]
for _transformers in (
    sys.modules["transformers"],
    *(part["transformers"] for part in _parts if "transformers" in part),
):
    for _class in (HQLTModel, HQLTForCausalLM):
        setattr(_transformers, _class.__name__, _class)
