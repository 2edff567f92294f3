"""HQLT for `trust_remote_code=True`: the classes of the installed package. (`hqlt` must be installed.)

`hqlt export` copies this file beside a model. The classes are its own, so that what transformers notes on classes that
came with a model does not stick to the package's.
"""

from __future__ import annotations

from hqlt.model import config, language_model


class HQLTConfig(config.HQLTConfig):
    pass


class HQLTModel(language_model.HQLTModel):
    config_class = HQLTConfig


class HQLTForCausalLM(language_model.HQLTForCausalLM):
    config_class = HQLTConfig
