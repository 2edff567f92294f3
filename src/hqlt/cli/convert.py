"""`hqlt convert`: a pretrained model, or a checkpoint of the paper's code, becomes a model of ours."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from hqlt.data.text import read_text

if TYPE_CHECKING:
    from hqlt.language.convert import Converted
    from hqlt.model import HQLTConfig


def convert(
    source: Path,
    folder: Path,
    settings: Path | None = None,
    map: Path | None = None,
    tokenizer: str | None = None,
) -> None:
    """Convert a model of transformers (Llama, Qwen2, Qwen3, Qwen3-Next, Qwen3.5, Mistral, Olmo-Hybrid), or a
    checkpoint of the paper's code.

    The source is known by its config.json. Of transformers' models attention becomes a KV-memory and linear attention
    an FW-memory, with the same logits; `hqlt export --as` goes back. Of the paper's code (and of
    flash-linear-attention: delta_net, gated_deltanet, transformer) names are mapped and shapes checked; every tensor
    is used once, or named with the reason why it is not. Where the converted model computes otherwise than that code,
    the report says so.

    Args:
        source: a folder (config.json and weights), or of the paper's code a file of weights.
        folder: where to write; new or empty.
        settings: the paper's code: the checkpoint's config.json, if it is not beside the weights.
        map: the paper's code: a YAML file of regular expressions and what replaces them in the checkpoint's names.
        tokenizer: the tokenizer's folder or name, if its files are not beside the weights.
    """
    from hqlt.data import load_tokenizer
    from hqlt.disk import new_in
    from hqlt.language.checkpoint import folder_of
    from hqlt.language.export import save
    from hqlt.language.folder import TOKENIZER_FILES

    console = Console(highlight=False)
    config, make = read_source(source, settings, map)
    beside = any((folder_of(source) / name).is_file() for name in TOKENIZER_FILES)
    named = tokenizer or (str(folder_of(source)) if beside else None)
    text = load_tokenizer(named) if named else None
    if text is not None and text.vocab_size > config.vocab_size:
        raise ValueError(
            f"tokenizer: expected at most {config.vocab_size} tokens, as many as the checkpoint knows, got one of "
            f"{text.vocab_size}; is it another model's? Name its own by --tokenizer"
        )
    with new_in(folder):
        converted = make()
        save(converted.model, text, named, folder)
    parameters = sum(p.numel() for p in converted.model.parameters())
    read = len(converted.left_out) + len({name for parts in converted.names.values() for name in parts})
    console.print(f"{read} tensors became {len(converted.names)}: {parameters:,} parameters, {converted.model.dtype}")
    for name, why in converted.left_out.items():
        console.print(f"left out: {name}: {why}", markup=False)
    for note in converted.notes:
        console.print(f"note: {note}", markup=False)
    if named is None:
        console.print("note: no tokenizer was found; put its files into the folder, or convert with --tokenizer")
    console.print(f"written to {folder}", markup=False)


def read_source(source: Path, settings: Path | None, map: Path | None) -> tuple[HQLTConfig, Callable[[], Converted]]:
    """The config of what the source becomes, and the function that converts it, which takes time."""
    from hqlt.language.checkpoint import read_checkpoint, settings_of
    from hqlt.language.convert import convert as convert_checkpoint
    from hqlt.language.paper_config import DEFAULTS, read_settings
    from hqlt.language.pretrained import TEXT_OF, convert_pretrained, read_their_config
    from hqlt.model.pretrained import ARCHITECTURES, config_of
    from hqlt.registry import one_of

    told = settings_of(source, settings)
    architecture = str(told.get("model_type"))
    one_of("model_type", architecture, (*ARCHITECTURES, *TEXT_OF, *DEFAULTS))
    renames = read_renames(map) if map else None
    if architecture in DEFAULTS:
        config, _ = read_settings(told)
        return config, lambda: convert_checkpoint(read_checkpoint(source, settings, renames))
    if settings or map:
        raise ValueError(
            f"--settings, --map: expected neither for a {architecture}, whose config and names are transformers' own"
        )
    theirs = read_their_config(source, architecture)
    return config_of(theirs), lambda: convert_pretrained(source, theirs)


def read_renames(file: Path) -> dict[str, str]:
    """What `--map` names. Raises ValueError where it is not a mapping of text to text."""
    import yaml

    try:
        given = yaml.safe_load(read_text(file))
    except yaml.YAMLError as error:
        raise ValueError(f"{file}: expected YAML: {error}") from None
    if not isinstance(given, dict) or not all(isinstance(text, str) for pair in given.items() for text in pair):
        raise ValueError(f"{file}: expected a line such as '^old_: new_' for each expression, got {given!r}")
    return given
