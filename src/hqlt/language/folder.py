"""Language models on disk: config.json, model.safetensors and, unless tokens are bytes, the tokenizer's files."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import nn

from hqlt.data import Tokenizer, load_tokenizer
from hqlt.data.tokenizer import model_tokenizer
from hqlt.errors import join_names

if TYPE_CHECKING:
    from hqlt.model import HQLTConfig, HQLTForCausalLM

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")


def find_model(where: str | Path) -> Path:
    """Find the folder of a model: `model/` of the given run, or the given folder.

    Raises:
        FileNotFoundError: when neither holds a model.
    """
    where = Path(where)
    for folder in (where / "model", where):  # in this order, because a run's own config.json holds its settings
        if holds_model(folder):
            return folder
    raise FileNotFoundError(
        f"{where}: expected a model's folder (config.json, model.safetensors) or a run with one in model/, "
        f"found {description_of(where)}"
    )


def holds_model(folder: Path) -> bool:
    """Whether the folder has a config.json with a model_type."""
    try:
        return "model_type" in json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def description_of(folder: Path) -> str:
    """What a folder without a model contains, for an error message."""
    if not folder.is_dir():
        return "no such folder"
    models = [str(path) for path in sorted(folder.glob("models/*")) if holds_model(path)]
    if models:
        return f"a study; choose one of its models: {join_names(models)}"
    if (folder / "config.json").is_file():
        return "a config.json without model_type, as in a run; a run has model/ once training has finished"
    return "no config.json"


def read_config(where: str | Path) -> HQLTConfig:
    """Read the config of the model in a folder, without its weights.

    Raises:
        FileNotFoundError: as `find_model` does.
        ValueError: when it is not the config of an hqlt model.
    """
    from huggingface_hub.errors import StrictDataclassError

    from hqlt.model import HQLTConfig

    file = find_model(where) / "config.json"
    kind = json.loads(file.read_text(encoding="utf-8"))["model_type"]
    if kind != HQLTConfig.model_type:
        raise ValueError(
            f"{file}: expected a model of type {HQLTConfig.model_type}, got {kind}; convert it with `hqlt convert`"
        )
    try:
        config: HQLTConfig = HQLTConfig.from_pretrained(file.parent)
    except (StrictDataclassError, TypeError) as error:
        raise ValueError(f"{file}: expected a model's settings, got {' '.join(str(error).split())}") from error
    return config


def load_model(where: str | Path, device: torch.device | str = "cpu") -> HQLTForCausalLM:
    """Load the model in a folder, in the dtype in which it was saved and in evaluation mode.

    Args:
        where: a model's folder, or the run that trained it.
        device: where to put the model.

    Returns:
        The model.

    Raises:
        FileNotFoundError: as `find_model` does.
        ValueError: when a file is damaged, or weights are missing, unknown or of the wrong shape.
    """
    from hqlt.model import HQLTForCausalLM

    model: HQLTForCausalLM = load_strict(HQLTForCausalLM, find_model(where), read_config(where))
    nn.Module.to(model, device)
    return model


def load_strict(kind: Any, folder: Path, config: Any) -> Any:
    """Load a model of transformers, of the class `kind`. Raises ValueError as `load_model` does."""
    try:
        with quiet_transformers():  # its warnings are raised as errors below
            model, report = kind.from_pretrained(
                folder, config=config, dtype="auto", output_loading_info=True, ignore_mismatched_sizes=True
            )
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{folder}: expected complete weight files, got {type(error).__name__}: {error}") from error
    refuse_other_weights(folder, report)
    return model.eval()


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' warnings and progress bars. Errors are still reported."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def refuse_other_weights(folder: Path, report: dict[str, Any]) -> None:
    """Raise ValueError if transformers' loading report lists missing, unknown or mismatched tensors."""
    shapes = [f"{name} {list(found)} for {list(expected)}" for name, found, expected in report["mismatched_keys"]]
    wrong = {"with another shape": shapes, "missing": report["missing_keys"], "unknown": report["unexpected_keys"]}
    errors = [f"{len(names)} {what}, such as {min(names)}" for what, names in wrong.items() if names]
    if errors:
        raise ValueError(
            f"{folder}: expected the weights that its config.json describes, got {'; '.join(errors)}; are both files "
            f"of the same model?"
        )


def tokenizer_of(where: str | Path, vocab_size: int) -> Tokenizer:
    """Load the tokenizer of a model.

    Args:
        where: the model's folder, or the run that trained it.
        vocab_size (tokens): vocabulary of the model. With 256 and no tokenizer files, tokens are bytes.

    Returns:
        The tokenizer. If its tokens are the 256 bytes, this is the tokenizer "bytes".

    Raises:
        ValueError: when there are no tokenizer files and the vocabulary is not 256, or the tokenizer has more tokens
            than the model.
    """
    folder = find_model(where)
    if any((folder / name).is_file() for name in TOKENIZER_FILES):
        tokenizer = model_tokenizer(folder)
    elif vocab_size == 256:
        tokenizer = load_tokenizer("bytes")
    else:
        raise ValueError(
            f"{folder}: expected a tokenizer's files ({', '.join(TOKENIZER_FILES)}) beside a model of {vocab_size} "
            f"tokens, found none; copy those of its training (only a model of 256 tokens needs none)"
        )
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"{folder}: expected a tokenizer with at most {vocab_size} tokens, the vocabulary of the model, "
            f"got one with {tokenizer.vocab_size}; is it another model's?"
        )
    if is_byte_tokenizer(tokenizer):
        template, tokenizer = tokenizer.chat_template, load_tokenizer("bytes")
        tokenizer.chat_template = template
    return tokenizer


def is_byte_tokenizer(tokenizer: Tokenizer) -> bool:
    """Whether token i is byte i, as in the files that `export` writes for a byte model."""
    text = "".join(map(chr, range(0x250))) + "漢🙂"
    return tokenizer.vocab_size == 256 and tokenizer.eos_id is None and tokenizer.encode(text) == list(text.encode())
