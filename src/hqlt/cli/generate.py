"""`hqlt generate`: a model goes on with a text, or with what it remembers of one."""

from __future__ import annotations

import sys
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
        prompt: the text to go on with.
        prompt_file: a file with the text, before the prompt where both are given.
        tokens: how many to make at most; 0 only reads.
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
    from hqlt.device import usable_device
    from hqlt.language import generation
    from hqlt.language.folder import load_model, tokenizer_of

    if batch < 1 or tokens < 0:
        raise SystemExit(f"expected batch ≥ 1 and tokens ≥ 0, got batch {batch} and tokens {tokens}")
    if temperature < 0 or not 0 < top_p <= 1 or (top_k is not None and top_k < 1):
        raise SystemExit(
            f"expected temperature ≥ 0, 0 < top-p ≤ 1 and top-k ≥ 1, got temperature {temperature}, top-p {top_p} "
            f"and top-k {top_k}"
        )
    if save_state is not None and batch > 1 and tokens > 0:
        raise SystemExit("save-state: expected one continuation, or --tokens=0, because a file keeps one text")
    if save_state is not None and (save_state.is_dir() or not save_state.parent.is_dir()):
        raise SystemExit(f"save-state: expected a file in a folder that is there, got {save_state}")
    notes = Console(stderr=True)
    try:
        language_model = load_model(model, usable_device(device))
        tokenizer = tokenizer_of(model, language_model.config.vocab_size)
        text = (prompt_file.read_text(encoding="utf-8") if prompt_file else "") + prompt
        past = generation.load_past(load_state, language_model) if load_state else None
        past = read_with_progress(language_model, tokenizer.encode(text), past, notes)
    except (ValueError, OSError) as error:
        raise SystemExit(reason(error)) from None
    if tokens > 0:
        console = Console(soft_wrap=True)
        began = time.monotonic()
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
        if console.is_terminal:
            speed = made.numel() / (time.monotonic() - began)
            notes.print(f"{made.numel()} tokens, {speed:.0f} a second", style="dim")
    if save_state is not None:
        generation.save_past(save_state, past, language_model)
        notes.print(f"{save_state}: {save_state.stat().st_size / 1e6:.1f} MB", style="dim")


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
        with Live(Group(*(Panel(text) for text in texts)), console=console, vertical_overflow="visible"):
            yield lambda row, text: texts[row].append(text)
        return
    yield lambda row, text: texts[row].append(text)
    for i, text in enumerate(texts):
        sys.stdout.write(f"{'' if i == 0 else chr(10)}--- {i + 1} of {rows}\n{text.plain}\n")
