"""HQLT for `trust_remote_code=True`. The package `hqlt` must be installed.

`hqlt export` copies this file to a model's folder. It defines subclasses, because transformers sets attributes on the
classes that it loads from a model's folder, and those of the package must not change.
"""

from __future__ import annotations

from hqlt.model import config, language_model


class HQLTConfig(config.HQLTConfig):
    pass


class HQLTModel(language_model.HQLTModel):
    config_class = HQLTConfig


class HQLTForCausalLM(language_model.HQLTForCausalLM):
    config_class = HQLTConfig
