"""Conversion of models of transformers, from folders or GGUF files, and comparison with the original."""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel

from hqlt.data import Tokenizer
from hqlt.language.checkpoint import tensor_names, weight_files
from hqlt.language.convert import Converted
from hqlt.language.folder import load_strict, quiet_transformers
from hqlt.model import HQLTForCausalLM
from hqlt.model.pretrained import from_transformers, our_names
from hqlt.model.pretrained.gguf import ROPE_FREQUENCIES, Gguf, tensors_in

MULTIMODAL = ("qwen3_5",)
"""Multimodal models whose text layers are converted. The config of those is nested in the model's config."""
SKIPPED = {
    "mtp.": "predicts tokens further ahead; transformers ignores it too",
    "model.visual.": "processes images; only the text model is converted",
}
"""Prefixes of tensors that are not converted → the reason."""


def read_their_config(folder: Path, architecture: str) -> PreTrainedConfig:
    """Read the config of a folder of transformers, or of its text layers, and check that its weights are safetensors.

    Raises:
        FileNotFoundError: when there are no weights.
        ValueError: when weights are pickles, or the config is invalid.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: expected the folder of a {architecture}, got a file")
    if pickles := [file.name for file in weight_files(folder) if file.suffix != ".safetensors"]:
        raise ValueError(
            f"{folder}: expected safetensors, got {', '.join(pickles)}, which are pickles and can execute code when "
            f"loaded; if you trust them, load the model with transformers and save it with save_pretrained"
        )
    try:
        config: PreTrainedConfig = CONFIG_MAPPING[architecture].from_pretrained(folder).get_text_config()
    except (StrictDataclassError, KeyError, TypeError, AttributeError) as error:
        what = " ".join(str(error).split())
        raise ValueError(f"{folder / 'config.json'}: expected the config of a {architecture}, got {what}") from error
    return config


def convert_pretrained(folder: Path, config: PreTrainedConfig) -> Converted:
    """Convert the model in a folder of transformers.

    Raises:
        ValueError: when the weights do not match the config, or our layers cannot express the model.
    """
    theirs = load_strict(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], folder, config)
    in_files = (name for file in weight_files(folder) for name in tensor_names(file))
    skipped = {name: why for name in in_files for prefix, why in SKIPPED.items() if name.startswith(prefix)}
    return _converted(theirs, skipped, notes=[], reference=lambda: theirs)


def convert_gguf(gguf: Gguf, config: PreTrainedConfig) -> Converted:
    """Convert the model in a GGUF file, whose config is `config_in(gguf)`. Raises ValueError as `tensors_in` does."""
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    tensors = tensors_in(gguf, config)
    with quiet_transformers():
        theirs = kind.from_pretrained(None, config=config, state_dict=tensors, dtype=torch.float32).eval()
    if (end_of_turn := gguf.fields.get("tokenizer.ggml.eot_token_id")) not in (None, config.eos_token_id):
        theirs.generation_config.eos_token_id = [config.eos_token_id, end_of_turn]
    skipped = {ROPE_FREQUENCIES: "computed from the config"} if ROPE_FREQUENCIES in gguf.stored else {}
    notes = [f"the tensors were stored as {gguf.quantizations()}; they are float32 now"]
    return _converted(theirs, skipped, notes, reference=lambda: read_by_transformers(gguf.file, config))


def _converted(
    theirs: PreTrainedModel, skipped: dict[str, str], notes: list[str], reference: Callable[[], PreTrainedModel]
) -> Converted:
    ours, architecture = from_transformers(theirs), theirs.config.model_type
    config: Any = ours.config
    names = {part: [name] for name in theirs.state_dict() for part in our_names(name, config, architecture)[0]}
    return Converted(ours, names, skipped, notes, reference)


def read_by_transformers(file: Path, config: PreTrainedConfig) -> PreTrainedModel:
    """Load the model in a GGUF file with transformers' own reader, which shares only the package gguf with ours.

    The config is passed, because transformers does not read all fields about positions.
    """
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    with quiet_transformers(), contextlib.redirect_stderr(io.StringIO()):  # a progress bar cannot be disabled otherwise
        theirs = kind.from_pretrained(
            file.parent, gguf_file=file.name, config=copy.deepcopy(config), dtype=torch.float32
        )
    return theirs.eval()


TEXT = """The history of the bridge begins in 1832, when two engineers (neither of them older than 30) asked for
12,500 pounds. "It can't be done," said the mayor; he was wrong by 48 days. Über den Fluß führte bis dahin nur eine
Fähre, et le passage coûtait 3 sous. In 2019 its load was modelled anew:

    def load(x: float, span=61.5) -> float:
        return 9.81 * sum(w for w in weights if w <= x) / span  # kN per metre

— 橋は今も立っている. All of the bolts, but for 7, are the first ones. 🌉
"""
"""Text on which models are compared: prose, digits, several scripts, code."""
LIMIT = 1e-3
"""Maximum difference of logits, relative to their standard deviation. Rounding in float32 is far smaller, and any
mistake far larger."""


class Agreement(NamedTuple):
    """Comparison of two models' logits on a text."""

    tokens: int
    difference: float
    """Largest difference between two logits."""
    std: float
    """Standard deviation of the original's logits."""
    same_argmax: int
    """Number of tokens at which both models predict the same token."""


def agreement(converted: Converted, tokenizer: Tokenizer | None) -> Agreement:
    """Compare a converted model with its original, in at least float32.

    Args:
        converted: a model with a reference.
        tokenizer: encodes `TEXT`. Without one, random tokens are read.

    Returns:
        How well they agree.

    Raises:
        ValueError: when they differ by more than rounding.
    """
    assert converted.reference is not None
    config: Any = converted.model.config
    noise = torch.randint(config.vocab_size, (128,), generator=torch.Generator().manual_seed(0)).tolist()
    ids = torch.tensor([(tokenizer and tokenizer.encode(TEXT)[: config.max_position_embeddings]) or noise])
    theirs, ours = logits_of(converted.reference(), ids), logits_of(converted.model, ids)
    result = Agreement(
        tokens=ids.shape[1],
        difference=(ours - theirs).abs().max().item(),
        std=theirs.std().item(),
        same_argmax=int((ours.argmax(-1) == theirs.argmax(-1)).sum()),
    )
    if not result.difference <= LIMIT * result.std:
        raise ValueError(
            f"expected the logits of the original within {LIMIT} of their standard deviation {result.std:.3g}, got a "
            f"difference of {result.difference:.3g}; please report it (--check=false converts anyway)"
        )
    return result


@torch.no_grad()
def logits_of(model: PreTrainedModel | HQLTForCausalLM, ids: Tensor) -> Tensor:
    """The logits in at least float32; models in lower precision are copied first."""
    if model.dtype.itemsize < torch.float32.itemsize:
        model = nn.Module.float(copy.deepcopy(model))
    logits: Tensor = model(ids, use_cache=False).logits[0]
    return logits
