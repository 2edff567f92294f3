"""Models of transformers, in its folders or in GGUF files: whole, converted, and compared with the original."""

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
from hqlt.language.folder import load_whole, quiet_transformers
from hqlt.model import HQLTForCausalLM
from hqlt.model.pretrained import from_transformers, moved
from hqlt.model.pretrained.gguf import ROPE_FREQUENCIES, Gguf, tensors_in

TEXT_OF = ("qwen3_5",)
"""Models of text and images: their text layers, whose config lies in theirs, convert."""
LEFT_OUT = {
    "mtp.": "it predicts tokens further ahead; transformers reads none of it either",
    "model.visual.": "it sees images; what converts is the model of text",
}
"""What a file may hold beside the model, by how its names begin."""


def read_their_config(folder: Path, architecture: str) -> PreTrainedConfig:
    """The config of a folder of transformers, that of the text layers, whose weights are there and no pickles.

    Raises FileNotFoundError where there are no weights, ValueError for pickles and for values that are not a config's.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: expected the folder of a {architecture}, got a file")
    if pickles := [file.name for file in weight_files(folder) if file.suffix != ".safetensors"]:
        raise ValueError(
            f"{folder}: expected safetensors, got {', '.join(pickles)}, which are pickles and may run code when they "
            f"are read; where you trust them, load the model with transformers and save it by save_pretrained"
        )
    try:
        config: PreTrainedConfig = CONFIG_MAPPING[architecture].from_pretrained(folder).get_text_config()
    except (StrictDataclassError, KeyError, TypeError, AttributeError) as error:
        said = " ".join(str(error).split())
        raise ValueError(f"{folder / 'config.json'}: expected the config of a {architecture}, got {said}") from error
    return config


def convert_pretrained(folder: Path, config: PreTrainedConfig) -> Converted:
    """Raises ValueError for weights that are not those of the config, and for what our layers do not compute."""
    theirs = load_whole(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], folder, config)
    in_files = (name for file in weight_files(folder) for name in tensor_names(file))
    left_out = {name: why for name in in_files for begin, why in LEFT_OUT.items() if name.startswith(begin)}
    return _converted(theirs, left_out, notes=[], reference=lambda: theirs)


def convert_gguf(gguf: Gguf, config: PreTrainedConfig) -> Converted:
    """config: what `config_in` finds. Raises ValueError as `tensors_in` does."""
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    tensors = tensors_in(gguf, config)
    with quiet_transformers():
        theirs = kind.from_pretrained(None, config=config, state_dict=tensors, dtype=torch.float32).eval()
    if (end_of_turn := gguf.fields.get("tokenizer.ggml.eot_token_id")) not in (None, config.eos_token_id):
        theirs.generation_config.eos_token_id = [config.eos_token_id, end_of_turn]
    left_out = {ROPE_FREQUENCIES: "they follow from the config"} if ROPE_FREQUENCIES in gguf.stored else {}
    notes = [f"the tensors were stored as {gguf.quantizations()}; they are float32 now"]
    return _converted(theirs, left_out, notes, reference=lambda: read_by_transformers(gguf.file, config))


def _converted(
    theirs: PreTrainedModel, left_out: dict[str, str], notes: list[str], reference: Callable[[], PreTrainedModel]
) -> Converted:
    ours, architecture = from_transformers(theirs), theirs.config.model_type
    told: Any = ours.config
    names = {part: [name] for name in theirs.state_dict() for part in moved(name, told, architecture)[0]}
    return Converted(ours, names, left_out, notes, reference)


def read_by_transformers(file: Path, config: PreTrainedConfig) -> PreTrainedModel:
    """The model in a GGUF file by transformers' own reading of its tensors, sharing only the package gguf with ours.

    The config is given: transformers does not see all that a file says of positions.
    """
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    with quiet_transformers(), contextlib.redirect_stderr(io.StringIO()):  # a progress bar that nothing else hides
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
"""What the models are compared on: prose, digits, other scripts, code."""
LIMIT = 1e-3
"""Of the logits' standard deviation: rounding in float32 stays far below, any mistake far above."""


class Agreement(NamedTuple):
    """How two models' logits compare on a text."""

    tokens: int
    difference: float
    """The largest between two logits."""
    spread: float
    """The standard deviation of the original's logits."""
    same: int
    """Tokens whose largest logit is the same one."""


def agreement(converted: Converted, tokenizer: Tokenizer | None) -> Agreement:
    """The model and the one that it was made of, in float32 at least, on `TEXT`, or random tokens without a tokenizer.

    Raises ValueError where they do not agree to rounding.
    """
    assert converted.reference is not None
    config: Any = converted.model.config
    noise = torch.randint(config.vocab_size, (128,), generator=torch.Generator().manual_seed(0)).tolist()
    ids = torch.tensor([(tokenizer and tokenizer.encode(TEXT)[: config.max_position_embeddings]) or noise])
    theirs, ours = logits_of(converted.reference(), ids), logits_of(converted.model, ids)
    found = Agreement(
        tokens=ids.shape[1],
        difference=(ours - theirs).abs().max().item(),
        spread=theirs.std().item(),
        same=int((ours.argmax(-1) == theirs.argmax(-1)).sum()),
    )
    if not found.difference <= LIMIT * found.spread:
        raise ValueError(
            f"expected the logits of the original to {LIMIT} of their standard deviation {found.spread:.3g}, got a "
            f"difference of {found.difference:.3g}; please report it (--check=false converts all the same)"
        )
    return found


@torch.no_grad()
def logits_of(model: PreTrainedModel | HQLTForCausalLM, ids: Tensor) -> Tensor:
    """In float32 at least: a copy computes them where the model is narrower."""
    if model.dtype.itemsize < torch.float32.itemsize:
        model = nn.Module.float(copy.deepcopy(model))
    logits: Tensor = model(ids, use_cache=False).logits[0]
    return logits
