"""`hqlt convert`: a checkpoint of the paper's code becomes a model of ours."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from hqlt.data.text import read_text


def convert(
    checkpoint: Path,
    folder: Path,
    settings: Path | None = None,
    map: Path | None = None,
    tokenizer: str | None = None,
) -> None:
    """Convert a checkpoint of the paper's code (or of flash-linear-attention: delta_net, transformer).

    Names are mapped and shapes checked; every tensor is used once, or named with the reason why it is not. Where the
    converted model computes otherwise than that code, the report says so.

    Args:
        checkpoint: a folder (config.json; safetensors or PyTorch files) or a file of weights.
        folder: where to write; new or empty.
        settings: the checkpoint's config.json, if it is not beside the weights.
        map: a YAML file of regular expressions and what replaces them in the checkpoint's names.
        tokenizer: the tokenizer's folder or name, if its files are not beside the weights.
    """
    from hqlt.data import load_tokenizer
    from hqlt.disk import new_in
    from hqlt.language.checkpoint import folder_of, read_checkpoint, settings_of
    from hqlt.language.convert import convert as convert_checkpoint
    from hqlt.language.export import save
    from hqlt.language.folder import TOKENIZER_FILES
    from hqlt.language.paper_config import read_settings

    console = Console(highlight=False)
    renames = read_renames(map) if map else None
    config, _ = read_settings(settings_of(checkpoint, settings))
    beside = any((folder_of(checkpoint) / name).is_file() for name in TOKENIZER_FILES)
    source = tokenizer or (str(folder_of(checkpoint)) if beside else None)
    text = load_tokenizer(source) if source else None
    if text is not None and text.vocab_size > config.vocab_size:
        raise ValueError(
            f"tokenizer: expected at most {config.vocab_size} tokens, as many as the checkpoint knows, got one of "
            f"{text.vocab_size}; is it another model's? Name its own by --tokenizer"
        )
    with new_in(folder):
        read = read_checkpoint(checkpoint, settings, renames)
        converted = convert_checkpoint(read)
        save(converted.model, text, source, folder)
    parameters = sum(p.numel() for p in converted.model.parameters())
    console.print(
        f"{len(read.tensors)} tensors became {len(converted.names)}: {parameters:,} parameters, {converted.model.dtype}"
    )
    for name, why in converted.left_out.items():
        console.print(f"left out: {name}: {why}", markup=False)
    for note in converted.notes:
        console.print(f"note: {note}", markup=False)
    if source is None:
        console.print("note: no tokenizer was found; put its files into the folder, or convert with --tokenizer")
    console.print(f"written to {folder}", markup=False)


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
