"""Llama, Qwen2, Qwen3 and Mistral of transformers as models whose layers are all KV-memories, and back."""

from __future__ import annotations

from hqlt.model.pretrained.architectures import ARCHITECTURES, config_as, config_of
from hqlt.model.pretrained.weights import from_transformers, to_transformers

__all__ = ["ARCHITECTURES", "config_as", "config_of", "from_transformers", "to_transformers"]
