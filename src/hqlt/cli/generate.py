"""`hqlt generate`: a model goes on with a text, or with what it remembers of one."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from hqlt.disk import probe
from hqlt.errors import reason

if TYPE_CHECKING:
    from hqlt.language.generation import Past
    from hqlt.model import HQLTForCausalLM

SHOWN = 400
"""Characters of a prompt's end that are shown before what follows."""


def generate(
    model: Path,
    prompt: str = "",
    prompt_file: Path | None = None,
    tokens: int = 200,
    temperature: float = 0.8,
    top_p: float = 0.95,
    top_k: int | None = None,
    seed: int | None = None,
    batch: int = 1,
    greedy: bool = False,
    save_state: Path | None = None,
    load_state: Path | None = None,
    device: str | None = None,
) -> None:
    """Go on with a text, and show what comes as it comes. Into a pipe or a file goes the new text alone.

    A long document is read once, piece by piece: `--prompt-file BOOK --tokens 0 --save-state F` keeps what the memories
    hold of it in a file (small whatever the document's length, but for full attention), and
    `--load-state F --prompt QUESTION` goes on from there at once, as often as wanted and on any machine that has the
    same model.

    Args:
        model: a model's folder, or the run that trained it.
        prompt: the text to go on with. It begins with the special tokens that the tokenizer puts before every text, and
            those spelled out in it are special, as in transformers.
        prompt_file: a file with the text, before the prompt where both are given.
        tokens: how many to make at most; 0 only reads, to save the state.
        temperature: below 1 the likely gets likelier; 0 is greedy.
        top_p: choose among the likeliest tokens that have this probability together.
        top_k: choose among this many of the likeliest tokens.
        seed: the same seed makes the same text; another one at each start by default.
        batch: continuations side by side.
        greedy: always the likeliest token.
        save_state: keep what was read (the prompt, then the new text) in this file.
        load_state: go on from what was kept in this file.
        device: where the model runs, such as cpu; cuda where there is one by default.
    """
    from hqlt.data.text import read_text
    from hqlt.device import usable_device
    from hqlt.language import generation
    from hqlt.language.folder import load_model, read_config, tokenizer_of

    notes = Console(stderr=True)
    check(tokens, temperature, top_p, top_k, seed, batch, save_state)
    device_there = usable_device(device)
    text = (read_text(prompt_file) if prompt_file else "") + prompt
    if load_state is not None and not load_state.is_file():
        raise FileNotFoundError(f"load-state: expected a file that --save-state wrote, found none at {load_state}")
    tokenizer = tokenizer_of(model, read_config(model).vocab_size)
    ids = tokenizer.encode_prompt(text, add_special_tokens=False)
    if load_state is None and ids[: len(tokenizer.prefix_ids)] != tokenizer.prefix_ids:
        ids = [*tokenizer.prefix_ids, *ids]
    language_model = load_model(model, device_there)
    past = generation.load_past(load_state, language_model) if load_state else None
    past = read_with_progress(language_model, ids, past, notes)
    if tokens > 0:
        console = Console(soft_wrap=batch == 1)
        began = time.monotonic()
        try:
            with shown(console, text[-SHOWN:], batch) as told:
                made, past = generation.go_on(
                    language_model,
                    past,
                    tokens=tokens,
                    rows=batch,
                    temperature=temperature,
                    top_p=top_p,
                    top_k=top_k,
                    greedy=greedy or temperature == 0,
                    seed=seed,
                    eos=tokenizer.eos_id,
                    streamer=generation.TextStreamer(tokenizer, batch, tokenizer.eos_id, told),
                )
        except (KeyboardInterrupt, BrokenPipeError):
            if save_state is not None:
                keep(save_state, past, language_model, notes)
            raise
        if console.is_terminal:
            speed = made.numel() / (time.monotonic() - began)
            notes.print(f"{made.numel()} tokens, {speed:.0f} a second", style="dim")
    if save_state is not None:
        keep(save_state, past, language_model, notes)


def check(
    tokens: int,
    temperature: float,
    top_p: float,
    top_k: int | None,
    seed: int | None,
    batch: int,
    save_state: Path | None,
) -> None:
    """Raises ValueError or OSError for what would only fail after other work is done."""
    if batch < 1 or tokens < 0:
        raise ValueError(f"expected batch ≥ 1 and tokens ≥ 0, got batch {batch} and tokens {tokens}")
    if tokens == 0 and save_state is None:
        raise ValueError("tokens: expected at least 1, or --save-state to keep what is read, got 0")
    if not 0 <= temperature < float("inf") or not 0 < top_p <= 1 or (top_k is not None and top_k < 1):
        raise ValueError(
            f"expected temperature ≥ 0, 0 < top-p ≤ 1 and top-k ≥ 1, got temperature {temperature}, top-p {top_p} "
            f"and top-k {top_k}"
        )
    if seed is not None and not 0 <= seed < 2**63:
        raise ValueError(f"seed: expected from 0 to {2**63 - 1}, got {seed}")
    if save_state is None:
        return
    if batch > 1 and tokens > 0:
        raise ValueError("save-state: expected one continuation, or --tokens=0, because a file keeps one text")
    if save_state.is_dir() or not save_state.parent.is_dir():
        raise ValueError(f"save-state: expected a file in a folder that is there, got {save_state}")
    probe(save_state.parent)


def keep(path: Path, past: Past, model: HQLTForCausalLM, notes: Console) -> None:
    """Save what was read; where it cannot be saved there (any more), in a temporary folder, so that it is not lost."""
    from hqlt.language.generation import save_past

    try:
        save_past(path, past, model)
    except Exception as error:  # of safetensors too, which has its own
        elsewhere = Path(tempfile.mkdtemp(prefix="hqlt-")) / path.name
        save_past(elsewhere, past, model)
        raise SystemExit(f"{path} could not be written ({reason(error)}); what was read is in {elsewhere}") from None
    notes.print(f"{path}: {path.stat().st_size / 1e6:.1f} MB", style="dim", markup=False, soft_wrap=True)


def read_with_progress(model: HQLTForCausalLM, tokens: list[int], past: Past | None, notes: Console) -> Past:
    from hqlt.language.generation import PIECE, read

    columns = (TextColumn("reading"), BarColumn(), MofNCompleteColumn(), TextColumn("tokens"), TimeRemainingColumn())
    hidden = len(tokens) <= PIECE or not notes.is_terminal
    with Progress(*columns, console=notes, transient=True, disable=hidden) as progress:
        bar = progress.add_task("", total=len(tokens))
        return read(model, tokens, past, lambda n: progress.advance(bar, n))


@contextmanager
def shown(console: Console, prompt: str, rows: int) -> Iterator[Callable[[int, str], object]]:
    """Gives told(row, text): one row is written as it comes; several stand in panels, in a pipe one after the other."""
    texts = [Text() for _ in range(rows)]
    if rows == 1:
        if console.is_terminal:
            console.print(Text(prompt, style="dim"), end="")
        yield lambda row, text: (sys.stdout.write(text), sys.stdout.flush())
        sys.stdout.write("\n")
        return
    if console.is_terminal:
        console.print(Text(prompt, style="dim"))
        panels = Group(*(Panel(text) for text in texts))
        try:
            with Live(panels, console=console, transient=True):  # as much as there is room for
                yield lambda row, text: texts[row].append(text)
        finally:
            console.print(panels)
        return
    yield lambda row, text: texts[row].append(text)
    for i, text in enumerate(texts):
        sys.stdout.write(f"{'' if i == 0 else chr(10)}--- {i + 1} of {rows}\n{text.plain}\n")
