"""Text of a run: preparing a text file as training data, and a sample of the trained model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hqlt.data import TokenFiles, parts_of, prepare
from hqlt.data.local import TextFiles
from hqlt.data.text import printable
from hqlt.disk import write_atomic

if TYPE_CHECKING:
    from hqlt.model import HQLTForCausalLM

HELD_OUT = 0.1
"""Share at the end of a text that is held out for validation."""
PROMPT_TOKENS, TOKENS, TEMPERATURE, SEED = 48, 240, 0.8, 0
"""Parameters of the sample."""


def prepare_file(file: Path, folder: Path, tokenizer: str | Path = "bytes") -> Path:
    """Tokenize a file into the folder `data` within the given folder, and return it.

    A text file is one document. It is split once, at a line end near nine tenths of it, so that training and validation
    text are contiguous; both parts are saved in `text` within the folder. For other files (JSON Lines, Parquet),
    documents are held out as by `hqlt data prepare`.

    Raises ValueError for a file without text, and if the folder has tokens of another text.
    """
    (part,) = parts_of(file, validation_share=0, test_share=0)
    if not isinstance(part.source, TextFiles):
        prepare(file, folder / "data", tokenizer=tokenizer)
        return folder / "data"
    parts = split_text("".join(part.source), file)
    for name, text in parts.items():
        saved = folder / "text" / f"{name}.txt"
        if saved.exists() and saved.read_bytes() != text.encode():
            raise ValueError(f"{file}: has changed since the run in {folder} was started; give another --folder")
    for name, text in parts.items():
        (folder / "text").mkdir(exist_ok=True)
        write_atomic(folder / "text" / f"{name}.txt", text.encode())
    held_out: dict[str, Any] = {"validation": folder / "text" / "validation.txt", "test_share": 0}
    prepare(folder / "text" / "train.txt", folder / "data", tokenizer=tokenizer, **held_out)
    return folder / "data"


def split_text(text: str, file: Path) -> dict[str, str]:
    """The training part and the validation part of a text, by split."""
    if len(text) < 2:
        raise ValueError(f"{file}: expected a text, got a file of {len(text)} characters")
    near = min(max(round(len(text) * (1 - HELD_OUT)), 1), len(text) - 1)
    line = text.find("\n", near - 1, near + len(text) // 100) + 1
    place = line if 0 < line < len(text) else near
    return {"train": text[:place], "validation": text[place:]}


def sample_of(model: HQLTForCausalLM, files: TokenFiles, name: str) -> dict[str, Any]:
    """A sample of the model: the prompt from some text, its continuation, and the sampling parameters."""
    from hqlt.language import generation

    tokens = files.read(0, min(PROMPT_TOKENS, len(files)))[0].tolist()
    pieces: list[str] = []
    eos = files.tokenizer.eos_ids
    generation.continue_text(
        model,
        generation.prefill(model, tokens),
        max_new_tokens=TOKENS,
        temperature=TEMPERATURE,
        seed=SEED,
        eos=eos,
        streamer=generation.TextStreamer(files.tokenizer, 1, eos, lambda row, text: pieces.append(text)),
    )
    return {
        "model": name,
        "temperature": TEMPERATURE,
        "seed": SEED,
        "prompt": printable(files.tokenizer.decode(tokens)),
        "text": printable("".join(pieces)),
    }
