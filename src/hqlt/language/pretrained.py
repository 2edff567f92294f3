"""Folders of transformers' models: read as they are, checked to be whole, converted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig

from hqlt.language.checkpoint import tensor_names, weight_files
from hqlt.language.convert import Converted
from hqlt.language.folder import load_whole
from hqlt.model.pretrained import from_transformers, moved

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
    ours = from_transformers(theirs)
    told: Any = ours.config
    names = {part: [name] for name in theirs.state_dict() for part in moved(name, told, config.model_type)[0]}
    in_files = (name for file in weight_files(folder) for name in tensor_names(file))
    left_out = {name: why for name in in_files for begin, why in LEFT_OUT.items() if name.startswith(begin)}
    return Converted(ours, names, left_out, notes=[])
