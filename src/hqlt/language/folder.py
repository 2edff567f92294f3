"""A language model on disk: config.json, model.safetensors, and a tokenizer's files unless its tokens are bytes."""

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
    """The folder of a model: `model/` of the given run, or the given folder itself.

    Raises FileNotFoundError, saying what was looked for and what is there, where neither holds a model.
    """
    where = Path(where)
    for folder in (where / "model", where):  # a run's own config.json holds its settings
        if holds_model(folder):
            return folder
    raise FileNotFoundError(
        f"{where}: expected a model's folder (config.json, model.safetensors) or a run that holds one in model/, "
        f"found {found_in(where)}"
    )


def holds_model(folder: Path) -> bool:
    """Whether its config.json is a model's, which names a model_type."""
    try:
        return "model_type" in json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def found_in(folder: Path) -> str:
    """What stands in a model's place."""
    if not folder.is_dir():
        return "no such folder"
    models = [str(path) for path in sorted(folder.glob("models/*")) if holds_model(path)]
    if models:
        return f"a study; name one of its models: {join_names(models)}"
    if (folder / "config.json").is_file():
        return "a config.json without model_type, as a run's is; a run has its model/ once training has ended"
    return "no config.json"


def read_config(where: str | Path) -> HQLTConfig:
    """The config of the model in a folder, which takes no time. Raises ValueError where it is none of ours."""
    from huggingface_hub.errors import StrictDataclassError

    from hqlt.model import HQLTConfig

    file = find_model(where) / "config.json"
    kind = json.loads(file.read_text(encoding="utf-8"))["model_type"]
    if kind != HQLTConfig.model_type:
        raise ValueError(f"{file}: expected a model of type {HQLTConfig.model_type}, got {kind}; see `hqlt convert`")
    try:
        config: HQLTConfig = HQLTConfig.from_pretrained(file.parent)
    except (StrictDataclassError, TypeError) as error:
        raise ValueError(f"{file}: expected a model's settings, got {' '.join(str(error).split())}") from error
    return config


def load_model(where: str | Path, device: torch.device | str = "cpu") -> HQLTForCausalLM:
    """The model in a folder, in the dtype in which it was saved, ready to be used.

    Raises ValueError for a broken file, and for weights that are not those of the config: too few, too many, of other
    shapes.
    """
    from hqlt.model import HQLTForCausalLM

    model: HQLTForCausalLM = load_whole(HQLTForCausalLM, find_model(where), read_config(where))
    nn.Module.to(model, device)
    return model


def load_whole(kind: Any, folder: Path, config: Any) -> Any:
    """The model of a class of transformers with the weights in a folder; raises ValueError as `load_model` does."""
    try:
        with quiet_transformers():  # what it reports is an error below
            model, report = kind.from_pretrained(
                folder, config=config, dtype="auto", output_loading_info=True, ignore_mismatched_sizes=True
            )
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{folder}: expected whole files of weights, got {type(error).__name__}: {error}") from error
    refuse_other_weights(folder, report)
    return model.eval()


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Errors alone of what transformers reports."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def refuse_other_weights(folder: Path, report: dict[str, Any]) -> None:
    """report: of transformers, what did not fit."""
    shapes = [f"{name} {list(found)} for {list(asked)}" for name, found, asked in report["mismatched_keys"]]
    wrong = {"of another shape": shapes, "missing": report["missing_keys"], "unknown": report["unexpected_keys"]}
    told = [f"{len(names)} {what}, such as {min(names)}" for what, names in wrong.items() if names]
    if told:
        raise ValueError(
            f"{folder}: expected the weights that its config.json describes, got {'; '.join(told)}; are both files of "
            f"the same model?"
        )


def tokenizer_of(where: str | Path, vocab_size: int) -> Tokenizer:
    """The tokenizer beside a model; bytes where its tokens are bytes, and where there is none and the model knows 256.

    Raises ValueError where neither can be, or where the tokenizer has tokens that the model does not know.
    """
    folder = find_model(where)
    if any((folder / name).is_file() for name in TOKENIZER_FILES):
        tokenizer = model_tokenizer(folder)
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
    if tells_bytes(tokenizer):
        template, tokenizer = tokenizer.chat_template, load_tokenizer("bytes")
        tokenizer.chat_template = template
    return tokenizer


def tells_bytes(tokenizer: Tokenizer) -> bool:
    """Whether token i is byte i, as in the files that `export` writes beside a byte model."""
    text = "".join(map(chr, range(0x250))) + "漢🙂"
    return tokenizer.vocab_size == 256 and tokenizer.eos_id is None and tokenizer.encode(text) == list(text.encode())
