"""Llama, Qwen2, Qwen3 and Mistral of transformers as models whose layers are all KV-memories, and back."""

from __future__ import annotations

from hqlt.model.pretrained.architectures import ARCHITECTURES, config_as, config_of
from hqlt.model.pretrained.weights import OURS, from_transformers, renamed, to_transformers

__all__ = ["ARCHITECTURES", "OURS", "config_as", "config_of", "from_transformers", "renamed", "to_transformers"]
