"""Text on its way in and out of a run: a file that becomes tokens, and what the trained model writes."""

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
"""The share at the end of a text that is for validation."""
PROMPT_TOKENS, TOKENS, TEMPERATURE, SEED = 48, 240, 0.8, 0
"""Of a sample."""


def prepare_file(file: Path, folder: Path, tokenizer: str | Path = "bytes") -> Path:
    """The tokens of a file of documents, in the folder `data` within the given one.

    A text is one document. It is cut once, at the end of a line near nine tenths of it, so that no held-out text stands
    between pieces of training text; both parts are kept beside the tokens, in `text`. Of other files (JSON lines,
    Parquet), documents are held out as `hqlt data prepare` does.

    Raises ValueError for a file without text, and where the folder has the tokens of other text.
    """
    (part,) = parts_of(file, validation_share=0, test_share=0)
    if not isinstance(part.source, TextFiles):
        prepare(file, folder / "data", tokenizer=tokenizer)
        return folder / "data"
    parts = cut("".join(part.source), file)
    for name, text in parts.items():
        there = folder / "text" / f"{name}.txt"
        if there.exists() and there.read_bytes() != text.encode():
            raise ValueError(f"{file}: was changed since {folder} was begun; give another --folder")
    for name, text in parts.items():
        (folder / "text").mkdir(exist_ok=True)
        write_atomic(folder / "text" / f"{name}.txt", text.encode())
    held_out: dict[str, Any] = {"validation": folder / "text" / "validation.txt", "test_share": 0}
    prepare(folder / "text" / "train.txt", folder / "data", tokenizer=tokenizer, **held_out)
    return folder / "data"


def cut(text: str, file: Path) -> dict[str, str]:
    """By split: the beginning and the rest of a text."""
    if len(text) < 2:
        raise ValueError(f"{file}: expected a text, got a file of {len(text)} characters")
    near = min(max(round(len(text) * (1 - HELD_OUT)), 1), len(text) - 1)
    line = text.find("\n", near - 1, near + len(text) // 100) + 1
    place = line if 0 < line < len(text) else near
    return {"train": text[:place], "validation": text[place:]}


def sample_of(model: HQLTForCausalLM, files: TokenFiles, name: str) -> dict[str, Any]:
    """What a model continues the beginning of some text with: prompt, text, and how it was drawn."""
    from hqlt.language import generation

    tokens = files.read(0, min(PROMPT_TOKENS, len(files)))[0].tolist()
    said: list[str] = []
    eos = files.tokenizer.eos_ids
    generation.continue_text(
        model,
        generation.prefill(model, tokens),
        max_new_tokens=TOKENS,
        temperature=TEMPERATURE,
        seed=SEED,
        eos=eos,
        streamer=generation.TextStreamer(files.tokenizer, 1, eos, lambda row, text: said.append(text)),
    )
    return {
        "model": name,
        "temperature": TEMPERATURE,
        "seed": SEED,
        "prompt": printable(files.tokenizer.decode(tokens)),
        "text": printable("".join(said)),
    }
