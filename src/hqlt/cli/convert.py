"""`hqlt convert`: a pretrained model, or a checkpoint of the paper's code, becomes a model of ours."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, NamedTuple

from rich.console import Console

from hqlt.data.text import read_text
from hqlt.errors import join_names, require

if TYPE_CHECKING:
    from hqlt.language.convert import Converted
    from hqlt.model import HQLTConfig


def convert(
    source: Path,
    folder: Path,
    settings: Path | None = None,
    map: Path | None = None,
    tokenizer: str | None = None,
    check: bool = True,
) -> None:
    """Convert a model of transformers (Llama, Qwen2, Qwen3, Qwen3-Next, Qwen3.5, Mistral, Olmo-Hybrid), a GGUF file
    (Llama, Mistral, SmolLM, Qwen2, Qwen3), or a checkpoint of the paper's code.

    The source is known by its config.json. Of transformers' models attention becomes a KV-memory and linear attention
    an FW-memory, with the same logits, which is checked on a text; `hqlt export --as` goes back. The weights in a GGUF
    file are dequantized to float32. Of the paper's code (and of flash-linear-attention: delta_net, gated_deltanet,
    transformer) names are mapped and shapes checked; every tensor is used once, or named with the reason why it is not.
    Where the converted model computes otherwise than that code, the report says so.

    Args:
        source: a folder (config.json and weights), a GGUF file, or of the paper's code a file of weights.
        folder: where to write; new or empty.
        settings: the paper's code: the checkpoint's config.json, if it is not beside the weights.
        map: the paper's code: a YAML file of regular expressions and what replaces them in the checkpoint's names.
        tokenizer: the tokenizer's folder or name, if its files are not beside the weights.
        check: run both models on a text, in float32, and write nothing where their logits differ by more than rounding.
    """
    from hqlt.data import load_tokenizer
    from hqlt.disk import new_folder
    from hqlt.language.export import save

    console = Console(highlight=False)
    found = read_source(source, settings, map)
    with TemporaryDirectory() as inside:
        named = tokenizer or found.tokenizer_in(Path(inside))
        text = load_tokenizer(named) if named else None
        if text is not None and text.vocab_size > found.config.vocab_size:
            raise ValueError(
                f"tokenizer: expected at most {found.config.vocab_size} tokens, as many as the checkpoint knows, got "
                f"one of {text.vocab_size}; is it another model's? Name its own by --tokenizer"
            )
        with new_folder(folder):
            converted = found.make()
            report(console, converted)
            if check and converted.reference is not None:
                from hqlt.language.pretrained import agreement

                agreed = agreement(converted, text)
                console.print(
                    f"checked on {agreed.tokens} tokens: logits are the original's to {agreed.difference:.1e} (their "
                    f"standard deviation is {agreed.spread:.2g}), {agreed.same} of {agreed.tokens} arg-maxima equal"
                )
            save(converted.model, text, named, folder)
    if named is None:
        console.print("note: no tokenizer was found; put its files into the folder, or convert with --tokenizer")
    console.print(f"written to {folder}", markup=False)


def report(console: Console, converted: Converted) -> None:
    parameters = sum(p.numel() for p in converted.model.parameters())
    read = len(converted.left_out) + len({name for parts in converted.names.values() for name in parts})
    console.print(f"{read} tensors became {len(converted.names)}: {parameters:,} parameters, {converted.model.dtype}")
    for name, why in converted.left_out.items():
        console.print(f"left out: {name}: {why}", markup=False)
    for note in converted.notes:
        console.print(f"note: {note}", markup=False)


class Source(NamedTuple):
    config: HQLTConfig
    """Of what it becomes."""
    make: Callable[[], Converted]
    """Converts it, which takes time."""
    tokenizer_in: Callable[[Path], str | None]
    """The folder of its tokenizer, where it came with one: this one if it has to be written."""


def read_source(source: Path, settings: Path | None, map: Path | None) -> Source:
    """Raises ValueError for what no model is made of, OSError for what cannot be read."""
    from hqlt.language.checkpoint import folder_of, read_checkpoint, settings_of
    from hqlt.language.convert import convert as convert_checkpoint
    from hqlt.language.folder import TOKENIZER_FILES
    from hqlt.language.paper_config import DEFAULTS, read_settings
    from hqlt.language.pretrained import TEXT_OF, convert_pretrained, read_their_config
    from hqlt.model.pretrained import ARCHITECTURES, config_of
    from hqlt.model.pretrained.gguf import is_gguf
    from hqlt.registry import check_choice

    if is_gguf(source):
        refuse_settings("GGUF file", settings, map)
        return read_gguf_source(source)
    if not (source / "config.json").exists() and (files := sorted(file.name for file in source.glob("*.gguf"))):
        raise ValueError(
            f"{source}: expected a GGUF file or a folder with config.json; name one of {join_names(files)}"
        )
    told = settings_of(source, settings)
    architecture = str(told.get("model_type"))
    check_choice("model_type", architecture, (*ARCHITECTURES, *TEXT_OF, *DEFAULTS))
    renames = read_renames(map) if map else None
    beside = any((folder_of(source) / name).is_file() for name in TOKENIZER_FILES)
    named = str(folder_of(source)) if beside else None
    if architecture in DEFAULTS:
        config, _ = read_settings(told)
        return Source(config, lambda: convert_checkpoint(read_checkpoint(source, settings, renames)), lambda _: named)
    refuse_settings(architecture, settings, map)
    theirs = read_their_config(source, architecture)
    return Source(config_of(theirs), lambda: convert_pretrained(source, theirs), lambda _: named)


def read_gguf_source(file: Path) -> Source:
    from hqlt.language.gguf_tokenizer import tokenizer_in
    from hqlt.language.pretrained import convert_gguf
    from hqlt.model.pretrained import config_of
    from hqlt.model.pretrained.gguf import config_in, read_gguf

    require("gguf", "accelerate")  # transformers reads no GGUF file without accelerate
    gguf = read_gguf(file)
    theirs = config_in(gguf)

    def write_tokenizer(folder: Path) -> str:
        try:
            tokenizer_in(gguf.fields).save_pretrained(folder)
        except ValueError as error:
            raise ValueError(f"{error}; name its tokenizer.json by --tokenizer") from error
        return str(folder)

    return Source(config_of(theirs), lambda: convert_gguf(gguf, theirs), write_tokenizer)


def refuse_settings(what: str, settings: Path | None, map: Path | None) -> None:
    if settings or map:
        raise ValueError(f"--settings, --map: expected neither for a {what}, whose config and names are known")


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
