"""Models of transformers as models whose layers are KV-memories, or FW-memories by the gated delta rule; and back."""

from __future__ import annotations

from hqlt.model.pretrained.architectures import ARCHITECTURES, config_as, config_of
from hqlt.model.pretrained.weights import from_transformers, moved, to_transformers

__all__ = ["ARCHITECTURES", "config_as", "config_of", "from_transformers", "moved", "to_transformers"]
