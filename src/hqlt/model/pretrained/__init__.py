"""Conversion of transformers' models to kv and fw layers (the latter with the gated delta rule), and back."""

from __future__ import annotations

from hqlt.model.pretrained.architectures import ARCHITECTURES, config_as, config_of
from hqlt.model.pretrained.weights import from_transformers, our_names, to_transformers

__all__ = ["ARCHITECTURES", "config_as", "config_of", "from_transformers", "our_names", "to_transformers"]
