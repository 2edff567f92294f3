"""A language model on disk: config.json, model.safetensors, and a tokenizer's files unless its tokens are bytes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from hqlt.data import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from hqlt.model import HQLTForCausalLM

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")


def find_model(where: str | Path) -> Path:
    """The folder of a model: the given one, or `model/` in the given run's.

    Raises FileNotFoundError, saying what was looked for, where neither holds a config.json.
    """
    where = Path(where)
    for folder in (where, where / "model"):
        if (folder / "config.json").is_file():
            return folder
    raise FileNotFoundError(
        f"{where}: expected a model's folder (config.json, model.safetensors) or a run that holds one in model/, "
        f"found {'no config.json' if where.is_dir() else 'no such folder'}"
    )


def load_model(where: str | Path, device: torch.device | str = "cpu") -> HQLTForCausalLM:
    """The model in a folder, in the dtype in which it was saved, ready to be used."""
    from transformers.utils import logging

    from hqlt.model import HQLTForCausalLM

    logging.disable_progress_bar()
    model: HQLTForCausalLM = HQLTForCausalLM.from_pretrained(find_model(where), dtype="auto")
    nn.Module.to(model, device)
    return model.eval()


def tokenizer_of(where: str | Path, vocab_size: int) -> Tokenizer:
    """The tokenizer beside a model; bytes where there is none and the model knows 256 tokens.

    Raises ValueError where neither can be, or where the tokenizer has tokens that the model does not know.
    """
    folder = find_model(where)
    if any((folder / name).is_file() for name in TOKENIZER_FILES):
        tokenizer = load_tokenizer(str(folder))
    elif vocab_size == 256:
        tokenizer = load_tokenizer("bytes")
    else:
        raise ValueError(
            f"{folder}: expected a tokenizer's files ({', '.join(TOKENIZER_FILES)}) beside a model of {vocab_size} "
            f"tokens, found none; copy those that it was trained with (without any, 256 tokens are bytes)"
        )
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"{folder}: expected a tokenizer of at most {vocab_size} tokens, as many as the model knows, "
            f"got one of {tokenizer.vocab_size}; is it another model's?"
        )
    return tokenizer
