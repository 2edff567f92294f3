"""`hqlt generate`: continue a text, or a saved state."""

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
"""Number of last characters of the prompt that are shown before the continuation."""


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
        model: folder of a model, or of the run that trained it.
        prompt: the text to continue. As in transformers, the tokenizer's special tokens are put before it, and special
            tokens spelled out in it are recognized.
        prompt_file: a file with the text; if both are given, the prompt follows it.
        max_new_tokens: maximum number of tokens to generate; 0 only reads the prompt, to save its state.
        temperature: sampling temperature; 0 decodes greedily.
        top_p: sample from the smallest set of most likely tokens with at least this total probability.
        top_k: sample from this many of the most likely tokens.
        seed: random seed; the same seed gives the same text. Default: a different seed at each start.
        num_return_sequences: number of continuations to generate.
        greedy: always choose the most likely token.
        save_state: save the state after the prompt and the new text to this file.
        load_state: continue from the state in this file.
        store: store the state after the prompt in this folder, and start from the longest stored prefix of the prompt.
            Several commands and models may share the folder; its contents may be deleted at any time.
        draft: folder or run of a smaller model with the same tokenizer, for speculative decoding: it proposes tokens,
            and the model checks several at a time. The text stays the same and comes faster if the proposals are right.
        prompt_lookup: speculative decoding without a draft model: propose what followed the last tokens at an earlier
            place in the text. Faster if the text repeats itself.
        device: device of the model, such as cpu; default: cuda if available.
    """
    sampling: Any = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "greedy": greedy, "seed": seed}
    check(max_new_tokens, num_return_sequences, save_state, load_state, store, sampling)
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
    past = read_prompt(language_model, ids, load_state, store, notes)
    try:
        if max_new_tokens:
            options = {
                "max_new_tokens": max_new_tokens,
                "num_return_sequences": num_return_sequences,
                "drafts": drafts,
                **sampling,
            }
            past = print_continuation(language_model, past, tokenizer, text[-SHOWN:], notes, options)
    finally:  # also after Ctrl-C, or if the reader of the pipe has exited
        if save_state is not None:
            save_or_rescue(save_state, past, language_model, notes)


def print_continuation(
    model: HQLTForCausalLM, past: Past, tokenizer: Tokenizer, text: str, notes: Console, options: dict[str, Any]
) -> Past:
    """Print the continuation after the end of the prompt while it is generated. options: those of `continue_text`."""
    from hqlt.language import generation

    rows, eos = options["num_return_sequences"], tokenizer.eos_ids
    console = Console(soft_wrap=rows == 1)
    began = time.monotonic()
    with live_output(console, text, rows) as write:
        streamer = generation.TextStreamer(tokenizer, rows, eos, write)
        new, past = generation.continue_text(model, past, eos=eos, streamer=streamer, **options)
    if console.is_terminal:
        speed = new.numel() / (time.monotonic() - began)
        notes.print(f"{new.numel()} tokens, {speed:.0f} per second", style="dim")
    return past


def read_prompt(
    model: HQLTForCausalLM, ids: list[int], load_state: Path | None, store: Path | None, notes: Console
) -> Past:
    """Read the prompt, after a loaded state or the longest prefix in a store."""
    from hqlt.language import generation
    from hqlt.state import PrefixStore

    past = generation.load_past(load_state, model) if load_state else None
    prefixes = PrefixStore(model, folder=store) if store else None
    with progress("reading", len(ids), least=generation.PREFILL_CHUNK) as on_progress:
        if prefixes is None:
            return generation.prefill(model, ids, past, on_progress)
        past, stored = generation.prefill_from_store(prefixes, model, ids, on_progress)
    notes.print(f"{stored} of the prompt's {len(ids)} tokens were reused from {store}", style="dim", soft_wrap=True)
    return past


def drafts_for(
    draft: Path | None, prompt_lookup: bool, tokenizer: Tokenizer, device: torch.device
) -> Callable[[Sequence[int]], Drafts | None]:
    """A function from the tokens to `Drafts`. Raises ValueError if the draft model has another tokenizer."""
    from hqlt.language.folder import load_model, read_config, tokenizer_of
    from hqlt.language.generation import Drafts

    if draft is None:
        return lambda tokens: Drafts(tokens) if prompt_lookup else None
    theirs = tokenizer_of(draft, read_config(draft).vocab_size)
    if theirs.digest != tokenizer.digest:
        raise ValueError(
            f"draft: expected a model with the same tokenizer ({tokenizer.name}), got {theirs.name} in {draft}"
        )
    return functools.partial(Drafts, model=load_model(draft, device))


def ids_of(text: str, tokenizer: Tokenizer, begins: bool) -> list[int]:
    """The tokens of a prompt, with the tokenizer's special tokens before it if a text begins here."""
    ids = tokenizer.encode_prompt(text, add_special_tokens=False)
    prefix = tokenizer.prefix_ids
    return [*prefix, *ids] if begins and ids[: len(prefix)] != prefix else ids


def check_sampling(*, temperature: float, top_p: float, top_k: int | None, seed: int | None, **_: Any) -> None:
    """Raises ValueError for sampling options out of range."""
    expect("temperature", temperature, 0 <= temperature < float("inf"), "a number ≥ 0")
    expect("top-p", top_p, 0 < top_p <= 1, "above 0 and at most 1")
    expect("top-k", top_k, top_k is None or top_k >= 1, "at least 1")
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
    sampling: dict[str, Any],
) -> None:
    """Raises ValueError or OSError for options that would otherwise fail only after the model has run."""
    check_sampling(**sampling)
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
        raise ValueError("store: expected no --load-state with it, got both; only prompts that begin a text are stored")
    if store is not None:
        check_writable(store, folder=True)
    if save_state is None:
        return
    if num_return_sequences > 1 and max_new_tokens > 0:
        raise ValueError(
            f"save-state: expected one continuation, or --max-new-tokens=0, got {num_return_sequences}, but a file "
            f"holds the state of one text"
        )
    if save_state.is_dir() or not save_state.parent.is_dir():
        raise ValueError(f"save-state: expected a file in an existing folder, got {save_state}")
    check_folder_writable(save_state.parent)


def save_or_rescue(path: Path, past: Past, model: HQLTForCausalLM, notes: Console) -> None:
    """Save the past; if the file cannot be written, save it to a temporary folder, so that it is not lost."""
    from hqlt.language.generation import save_past

    try:
        save_past(path, past, model)
    except Exception as error:  # safetensors has its own exceptions
        elsewhere = Path(tempfile.mkdtemp(prefix="hqlt-")) / path.name
        save_past(elsewhere, past, model)
        raise SystemExit(f"{path} could not be written ({reason(error)}); the state was saved to {elsewhere}") from None
    notes.print(f"{path}: {path.stat().st_size / 1e6:.1f} MB", style="dim", markup=False, soft_wrap=True)


@contextmanager
def live_output(console: Console, prompt: str, rows: int) -> Iterator[Callable[[int, str], object]]:
    """Yields write(row, text). One row is printed as it is generated; several are shown in panels or in turn."""
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
        with Live(panels, console=console, transient=True):  # as much as fits on the screen
            yield lambda row, text: texts[row].append(text)
    finally:
        console.print(panels)
