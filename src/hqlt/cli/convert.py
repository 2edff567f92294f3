"""`hqlt convert`: convert a pretrained model, or a checkpoint of the paper's code."""

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

    The type of the source is read from its config.json. Attention becomes a KV-memory and linear attention an
    FW-memory. The logits are compared with those of the original on a text. `hqlt export --as` converts back. The
    weights of a GGUF file are dequantized to float32. For the paper's code (and delta_net, gated_deltanet, transformer
    of flash-linear-attention), names are mapped and shapes checked; skipped tensors are printed with the reason, and so
    are differences between the converted model and that code.

    Args:
        source: folder (config.json and weights) or GGUF file; for the paper's code also a file of weights.
        folder: output folder; new or empty.
        settings: config.json of the checkpoint, if it is not beside the weights (paper's code only).
        map: YAML file of regular expressions and their replacements in names of tensors (paper's code only).
        tokenizer: folder or name of the tokenizer, if its files are not beside the weights.
        check: compare the logits of both models in float32, and write nothing if they differ by more than rounding.
    """
    from hqlt.data import load_tokenizer
    from hqlt.disk import new_folder
    from hqlt.language.export import save

    console = Console(highlight=False)
    opened = open_source(source, settings, map)
    with TemporaryDirectory() as temporary:
        tokenizer_name = tokenizer or opened.find_tokenizer(Path(temporary))
        loaded = load_tokenizer(tokenizer_name) if tokenizer_name else None
        if loaded is not None and loaded.vocab_size > opened.config.vocab_size:
            raise ValueError(
                f"tokenizer: expected at most {opened.config.vocab_size} tokens, the vocabulary of the model, got "
                f"{loaded.vocab_size}; is it another model's? Pass the right one as --tokenizer"
            )
        with new_folder(folder):
            converted = opened.convert()
            print_report(console, converted)
            if check and converted.reference is not None:
                from hqlt.language.pretrained import agreement

                result = agreement(converted, loaded)
                console.print(
                    f"checked on {result.tokens} tokens: logits differ from the original's by at most "
                    f"{result.difference:.1e} (standard deviation: {result.std:.2g}), and {result.same_argmax} of "
                    f"{result.tokens} predicted tokens are the same"
                )
            save(converted.model, loaded, tokenizer_name, folder)
    if tokenizer_name is None:
        console.print("note: no tokenizer was found; copy its files to the folder, or convert with --tokenizer")
    console.print(f"saved to {folder}", markup=False)


def print_report(console: Console, converted: Converted) -> None:
    """Print the number of tensors, those that were skipped, and notes."""
    parameters = sum(p.numel() for p in converted.model.parameters())
    read = len(converted.skipped) + len({name for parts in converted.names.values() for name in parts})
    console.print(
        f"{read} tensors converted to {len(converted.names)}: {parameters:,} parameters, {converted.model.dtype}"
    )
    for name, why in converted.skipped.items():
        console.print(f"skipped: {name}: {why}", markup=False)
    for note in converted.notes:
        console.print(f"note: {note}", markup=False)


class Source(NamedTuple):
    """A model to convert, of which only the config has been read."""

    config: HQLTConfig
    """Config of the converted model."""
    convert: Callable[[], Converted]
    """Reads the weights and converts them."""
    find_tokenizer: Callable[[Path], str | None]
    """Returns the folder of the source's tokenizer, if it has one. A GGUF file's is written to the given folder."""


def open_source(source: Path, settings: Path | None, map: Path | None) -> Source:
    """Detect the type of the source and read its config.

    Raises:
        ValueError: when it cannot be converted.
        OSError: when it cannot be read.
    """
    from hqlt.language.checkpoint import folder_of, read_checkpoint, settings_of
    from hqlt.language.convert import convert as convert_checkpoint
    from hqlt.language.folder import TOKENIZER_FILES
    from hqlt.language.paper_config import DEFAULTS, read_settings
    from hqlt.language.pretrained import MULTIMODAL, convert_pretrained, read_their_config
    from hqlt.model.pretrained import ARCHITECTURES, config_of
    from hqlt.model.pretrained.gguf import is_gguf
    from hqlt.registry import check_choice

    if is_gguf(source):
        refuse_settings("GGUF file", settings, map)
        return open_gguf(source)
    if not (source / "config.json").exists() and (files := sorted(file.name for file in source.glob("*.gguf"))):
        raise ValueError(
            f"{source}: expected a GGUF file or a folder with config.json, got a folder of GGUF files; choose one of "
            f"{join_names(files)}"
        )
    content = settings_of(source, settings)
    architecture = str(content.get("model_type"))
    check_choice("model_type", architecture, (*ARCHITECTURES, *MULTIMODAL, *DEFAULTS))
    renames = read_renames(map) if map else None
    has_tokenizer = any((folder_of(source) / name).is_file() for name in TOKENIZER_FILES)
    tokenizer = str(folder_of(source)) if has_tokenizer else None
    if architecture in DEFAULTS:
        config, _ = read_settings(content)
        return Source(
            config, lambda: convert_checkpoint(read_checkpoint(source, settings, renames)), lambda _: tokenizer
        )
    refuse_settings(architecture, settings, map)
    theirs = read_their_config(source, architecture)
    return Source(config_of(theirs), lambda: convert_pretrained(source, theirs), lambda _: tokenizer)


def open_gguf(file: Path) -> Source:
    """Read the config of a GGUF file."""
    from hqlt.language.gguf_tokenizer import tokenizer_in
    from hqlt.language.pretrained import convert_gguf
    from hqlt.model.pretrained import config_of
    from hqlt.model.pretrained.gguf import config_in, read_gguf

    require("gguf", "accelerate")  # transformers needs accelerate to read GGUF files
    gguf = read_gguf(file)
    theirs = config_in(gguf)

    def write_tokenizer(folder: Path) -> str:
        try:
            tokenizer_in(gguf.fields).save_pretrained(folder)
        except ValueError as error:
            raise ValueError(f"{error}; pass the folder of its tokenizer.json as --tokenizer") from error
        return str(folder)

    return Source(config_of(theirs), lambda: convert_gguf(gguf, theirs), write_tokenizer)


def refuse_settings(what: str, settings: Path | None, map: Path | None) -> None:
    """Raise ValueError if --settings or --map is given."""
    if settings or map:
        raise ValueError(f"--settings, --map: expected neither for a {what}, whose config and names are known")


def read_renames(file: Path) -> dict[str, str]:
    """Read the file of `--map`. Raises ValueError unless it is a mapping of strings to strings."""
    import yaml

    try:
        given = yaml.safe_load(read_text(file))
    except yaml.YAMLError as error:
        raise ValueError(f"{file}: expected YAML, got {error}") from None
    if not isinstance(given, dict) or not all(isinstance(text, str) for pair in given.items() for text in pair):
        raise ValueError(f"{file}: expected lines such as '^old_: new_', one per expression, got {given!r}")
    return given
