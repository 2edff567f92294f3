"""`hqlt generate`: a model continues a text, or what it remembers of one."""

from __future__ import annotations

import functools
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from hqlt.cli.progress import progress
from hqlt.cli.retention_options import RetentionOptions
from hqlt.disk import check_folder_writable, check_writable
from hqlt.errors import reason

if TYPE_CHECKING:
    import torch

    from hqlt.data import Tokenizer
    from hqlt.language.generation import Drafts, Past
    from hqlt.model import HQLTForCausalLM

SHOWN = 400
"""Characters of a prompt's end that are shown before what follows."""


def generate(
    model: Path,
    prompt: str = "",
    prompt_file: Path | None = None,
    max_new_tokens: int = 200,
    temperature: float = 0.8,
    top_p: float = 0.95,
    top_k: int | None = None,
    seed: int | None = None,
    num_return_sequences: int = 1,
    greedy: bool = False,
    save_state: Path | None = None,
    load_state: Path | None = None,
    store: Path | None = None,
    draft: Path | None = None,
    prompt_lookup: bool = False,
    device: str | None = None,
    **retention_options: Any,
) -> None:
    """Continue a text. The new text is printed as it is generated; a pipe or file receives nothing else.

    A long document needs to be read only once: `--prompt-file BOOK --max-new-tokens 0 --save-state F` saves the state
    after it (small whatever the document's length, except with full attention), and `--load-state F --prompt QUESTION`
    continues from there immediately, as often as needed and on any machine that has the same model. `--store FOLDER`
    does this automatically: if a prompt begins like an earlier one, only the rest is read.

    Args:
        model: a model's folder, or the run that trained it.
        prompt: the text to continue. It begins with the special tokens that the tokenizer puts before every text, and
            those spelled out in it are special, as in transformers.
        prompt_file: a file with the text, before the prompt where both are given.
        max_new_tokens: maximum number of tokens to generate; 0 only reads the prompt, to save its state.
        temperature: below 1 the likely gets likelier; 0 is greedy.
        top_p: choose among the likeliest tokens that have this probability together.
        top_k: choose among this many of the likeliest tokens.
        seed: the same seed makes the same text; another one at each start by default.
        num_return_sequences: number of continuations to generate.
        greedy: always the likeliest token.
        save_state: keep what was read (the prompt, then the new text) in this file.
        load_state: continue from what was kept in this file.
        store: keep the state after the prompt in this folder, and continue from the longest beginning of the prompt
            that is in it. Many commands and models may share it; what is in it may be deleted at any time.
        draft: the folder or run of a smaller model with the same tokenizer. It proposes tokens that the model checks
            several at a time, so that the text comes faster where it is right, and is the same.
        prompt_lookup: propose what followed the last tokens where they stood in the text before: faster where a text
            repeats itself.
        device: where the model runs, such as cpu; cuda where there is one by default.
    """
    choice: Any = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "greedy": greedy, "seed": seed}
    check(max_new_tokens, num_return_sequences, save_state, load_state, store, choice)
    check_drafts(draft, prompt_lookup, num_return_sequences)
    from hqlt.data.text import read_text
    from hqlt.device import usable_device
    from hqlt.language.folder import tokenizer_of

    notes = Console(stderr=True)
    device_there = usable_device(device)
    text = (read_text(prompt_file) if prompt_file else "") + prompt
    retention = RetentionOptions(**retention_options)
    tokenizer = tokenizer_of(model, retention.config_of(model).vocab_size)
    ids = ids_of(text, tokenizer, begins=load_state is None)
    language_model = retention.load(model, device_there, notes)
    drafts = drafts_for(draft, prompt_lookup, tokenizer, device_there)(ids)
    past = read(language_model, ids, load_state, store, notes)
    try:
        if max_new_tokens:
            options = {
                "max_new_tokens": max_new_tokens,
                "num_return_sequences": num_return_sequences,
                "drafts": drafts,
                **choice,
            }
            past = write_on(language_model, past, tokenizer, text[-SHOWN:], notes, options)
    finally:  # after Ctrl-C, or where the reader of the pipe has left, too
        if save_state is not None:
            keep(save_state, past, language_model, notes)


def write_on(
    model: HQLTForCausalLM, past: Past, tokenizer: Tokenizer, text: str, notes: Console, options: dict[str, Any]
) -> Past:
    """Show what is made, as it is made, behind the end of the prompt's text. options: of `continue_text`."""
    from hqlt.language import generation

    rows, eos = options["num_return_sequences"], tokenizer.eos_ids
    console = Console(soft_wrap=rows == 1)
    began = time.monotonic()
    with shown(console, text, rows) as write:
        streamer = generation.TextStreamer(tokenizer, rows, eos, write)
        made, past = generation.continue_text(model, past, eos=eos, streamer=streamer, **options)
    if console.is_terminal:
        speed = made.numel() / (time.monotonic() - began)
        notes.print(f"{made.numel()} tokens, {speed:.0f} per second", style="dim")
    return past


def read(model: HQLTForCausalLM, ids: list[int], load_state: Path | None, store: Path | None, notes: Console) -> Past:
    """The prompt after what was kept in a file, or but for its beginning in a store."""
    from hqlt.language import generation
    from hqlt.state import PrefixStore

    past = generation.load_past(load_state, model) if load_state else None
    prefixes = PrefixStore(model, folder=store) if store else None
    with progress("reading", len(ids), least=generation.PREFILL_CHUNK) as told:
        if prefixes is None:
            return generation.prefill(model, ids, past, told)
        past, stored = generation.prefill_from_store(prefixes, model, ids, told)
    notes.print(f"{stored} of the prompt's {len(ids)} tokens were reused from {store}", style="dim", soft_wrap=True)
    return past


def drafts_for(
    draft: Path | None, prompt_lookup: bool, tokenizer: Tokenizer, device: torch.device
) -> Callable[[Sequence[int]], Drafts | None]:
    """Who guesses what follows some tokens. Raises ValueError where the draft model's tokens are others."""
    from hqlt.language.folder import load_model, read_config, tokenizer_of
    from hqlt.language.generation import Drafts

    if draft is None:
        return lambda tokens: Drafts(tokens) if prompt_lookup else None
    theirs = tokenizer_of(draft, read_config(draft).vocab_size)
    if theirs.digest != tokenizer.digest:
        raise ValueError(
            f"draft: expected a model with the same tokenizer, got one with another ({theirs.name}, not "
            f"{tokenizer.name}) in {draft}"
        )
    return functools.partial(Drafts, model=load_model(draft, device))


def ids_of(text: str, tokenizer: Tokenizer, begins: bool) -> list[int]:
    """A prompt's tokens. begins: whether it is a text's beginning, which has the tokenizer's special tokens."""
    ids = tokenizer.encode_prompt(text, add_special_tokens=False)
    prefix = tokenizer.prefix_ids
    return [*prefix, *ids] if begins and ids[: len(prefix)] != prefix else ids


def check_choice(*, temperature: float, top_p: float, top_k: int | None, seed: int | None, **_: Any) -> None:
    """Raises ValueError for options that `hqlt.language.generation.continue_text` cannot follow."""
    expect("temperature", temperature, 0 <= temperature < float("inf"), "temperature ≥ 0")
    expect("top-p", top_p, 0 < top_p <= 1, "0 < top-p ≤ 1")
    expect("top-k", top_k, top_k is None or top_k >= 1, "top-k ≥ 1")
    expect("seed", seed, seed is None or 0 <= seed < 2**63, f"from 0 to {2**63 - 1}")


def expect(name: str, value: object, holds: object, expected: str) -> None:
    if not holds:
        raise ValueError(f"{name}: expected {expected}, got {value}")


def check_drafts(draft: Path | None, prompt_lookup: bool, num_return_sequences: int = 1) -> None:
    expect("prompt-lookup", prompt_lookup, not (draft and prompt_lookup), "--draft or --prompt-lookup, not both")
    expect(
        "num-return-sequences",
        num_return_sequences,
        num_return_sequences == 1 or not (draft or prompt_lookup),
        "1 with --draft or --prompt-lookup",
    )


def check(
    max_new_tokens: int,
    num_return_sequences: int,
    save_state: Path | None,
    load_state: Path | None,
    store: Path | None,
    choice: dict[str, Any],
) -> None:
    """Raises ValueError or OSError for what would only fail after other work is done."""
    check_choice(**choice)
    expect("num-return-sequences", num_return_sequences, num_return_sequences >= 1, "at least 1")
    expect("max-new-tokens", max_new_tokens, max_new_tokens >= 0, "at least 0")
    expect(
        "max-new-tokens",
        max_new_tokens,
        max_new_tokens or save_state or store,
        "at least 1, or --save-state or --store to keep the prompt's state",
    )
    if load_state is not None and not load_state.is_file():
        raise FileNotFoundError(f"load-state: expected a file that --save-state wrote, found none at {load_state}")
    if load_state is not None and store is not None:
        raise ValueError("store: expected without --load-state, because a prompt after a state is no text's beginning")
    if store is not None:
        check_writable(store, folder=True)
    if save_state is None:
        return
    if num_return_sequences > 1 and max_new_tokens > 0:
        raise ValueError("save-state: expected one continuation, or --max-new-tokens=0, because a file holds one text")
    if save_state.is_dir() or not save_state.parent.is_dir():
        raise ValueError(f"save-state: expected a file in a folder that is there, got {save_state}")
    check_folder_writable(save_state.parent)


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


@contextmanager
def shown(console: Console, prompt: str, rows: int) -> Iterator[Callable[[int, str], object]]:
    """Gives told(row, text): one row is written as it comes; several stand in panels, in a pipe one after the other."""
    if console.is_terminal:
        console.print(Text(prompt, style="dim"), end="" if rows == 1 else "\n")
    if rows == 1:
        yield lambda row, text: (sys.stdout.write(text), sys.stdout.flush())
        sys.stdout.write("\n")
        return
    texts = [Text() for _ in range(rows)]
    if not console.is_terminal:
        yield lambda row, text: texts[row].append(text)
        for i, text in enumerate(texts):
            sys.stdout.write(f"{'' if i == 0 else chr(10)}--- {i + 1} of {rows}\n{text.plain}\n")
        return
    panels = Group(*map(Panel, texts))
    try:
        with Live(panels, console=console, transient=True):  # as much as there is room for
            yield lambda row, text: texts[row].append(text)
    finally:
        console.print(panels)
