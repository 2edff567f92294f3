"""`hqlt eval`: a language model on the paper's tasks, at lengths far beyond training, and looking for a key."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from hqlt.data import Tokenizer
    from hqlt.model import HQLTForCausalLM
    from hqlt.report.table import Table

NEEDLE_FILLER = 200_000
"""Characters of real text that the needle's haystack is made of."""


def eval(
    model: Path,
    suite: Literal["paper"] | None = None,
    tasks: str | None = None,
    local: Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    lengths: Path | None = None,
    passkey: bool = False,
    longest: int = 1_000_000,
    every: int = 2048,
    trials: int = 2,
    device: str = "cpu",
    folder: Path | None = None,
) -> None:
    """Evaluate a language model: tasks of lm-evaluation-harness, texts of any length, keys hidden in them.

    Prints tables, and leaves results.json, plots and one page in a folder. Texts are never cut: memories are carried
    from piece to piece, in constant memory. Numbers do not depend on the batch size.

    Args:
        model: a model's folder, or the run that trained it.
        suite: "paper": its ten tasks, beside its row for the model most like this one.
        tasks: names of the harness's tasks, with commas between them.
        local: a folder of data for local tasks (lambada_local, wikitext2_local, piqa_local) and of task files of your
            own, in which {local} stands for the folder.
        limit: documents of each task, to see that everything runs.
        batch_size: texts side by side.
        lengths: a text file; how well it is predicted at each distance from its beginning.
        passkey: find a five-digit key in repeated sentences and in real text, by length and depth.
        longest: tokens that `--lengths` and `--passkey` go up to.
        every: `--lengths` compares with memories emptied every so many tokens.
        trials: keys for each length and depth.
        device: where the model runs, such as "cuda".
        folder: where results go; a new one under runs/ by default.
    """
    from hqlt.language.folder import find_model, load_model, tokenizer_of

    if not (suite or tasks or lengths or passkey):
        raise SystemExit("expected something to evaluate: --suite paper, --tasks NAMES, --lengths FILE or --passkey")
    try:
        language_model = load_model(model, device)
        tokenizer = tokenizer_of(model, language_model.config.vocab_size)
        place = folder or Path("runs") / f"eval-{model.resolve().name}-{datetime.now():%Y%m%d-%H%M%S}"
        place.mkdir(parents=True, exist_ok=True)
        job = Job(language_model, tokenizer, place)
        if suite or tasks:
            on_tasks(job, names_of(suite, tasks), local, limit, batch_size)
        if lengths:
            on_lengths(job, lengths, longest, every)
        if passkey:
            on_passkey(job, longest, trials)
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from None
    job.leave({"model": str(find_model(model)), "limit": limit, "batch_size": batch_size, "trials": trials})


@dataclass
class Job:
    """What is evaluated, and what has come out so far."""

    model: HQLTForCausalLM
    tokenizer: Tokenizer
    folder: Path
    results: dict[str, Any] = field(default_factory=dict)
    sections: list[dict[str, Any]] = field(default_factory=list)
    console: Console = field(default_factory=Console)

    @property
    def unit(self) -> str:
        return "byte" if self.tokenizer.name == "bytes" else "token"

    def add(self, title: str, name: str, results: Any, table: Table, plot: str | None = None) -> None:
        self.results[name] = results
        self.sections.append({"title": title, "table": table, "plot": plot})
        self.console.print(f"[bold]{title}[/bold]")
        self.console.print(table.for_terminal())

    def leave(self, options: dict[str, Any]) -> None:
        """Everything as JSON, and one page."""
        from hqlt import __version__, fingerprint
        from hqlt.report.page import write_page

        settings = {
            **options,
            "fingerprint": fingerprint(self.model),
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "dtype": str(self.model.dtype),
            "tokenizer": self.tokenizer.name,
            "hqlt": __version__,
            "torch": torch.__version__,
        }
        written = {"settings": settings, "config": self.model.config.to_diff_dict(), "results": self.results}
        (self.folder / "results.json").write_text(json.dumps(written, indent=1, default=str) + "\n", encoding="utf-8")
        write_page(
            self.folder / "report.html",
            title=f"Evaluation of {options['model']}",
            introduction="Texts are never cut: what was read is carried on in the memories, in constant memory.",
            sections=self.sections,
            protocol="hqlt eval, with these settings:",
            settings=json.dumps(settings, indent=1),
        )
        self.console.print(f"page: {self.folder / 'report.html'}", highlight=False)

    @contextmanager
    def progress(self, what: str, total: int) -> Iterator[Any]:
        """Gives told(tokens)."""
        columns = (
            TextColumn(what),
            BarColumn(),
            TextColumn("{task.completed:,}/{task.total:,}"),
            TimeRemainingColumn(),
        )
        notes = Console(stderr=True)
        with Progress(*columns, console=notes, transient=True, disable=not notes.is_terminal) as progress:
            bar = progress.add_task("", total=total)
            yield lambda tokens: progress.advance(bar, tokens)


def names_of(suite: str | None, tasks: str | None) -> list[str]:
    from hqlt.evaluate.paper import tables

    named = [name.strip() for name in (tasks or "").split(",") if name.strip()]
    return list(dict.fromkeys([*(tables()["suite"] if suite else []), *named]))


def on_tasks(job: Job, names: list[str], local: Path | None, limit: int | None, batch_size: int) -> None:
    from hqlt.evaluate.harness import HarnessModel, run_tasks
    from hqlt.evaluate.paper import compare, counterpart
    from hqlt.report.table import Table, TableCell

    results = run_tasks(HarnessModel(job.model, job.tokenizer, batch_size), names, local, limit)
    config: Any = job.model.config
    paper = counterpart(config).name
    rows = [
        [line.task, line.metric, f"{line.ours:.4g}", "" if line.error is None else f"± {line.error:.2g}",
         "–" if line.paper is None else f"{line.paper:g}"]
        for line in compare(results, config)
    ]  # fmt: skip
    caption = f"Accuracies in percent. Paper: its {paper}." + (f" The first {limit} documents only." if limit else "")
    table = Table(["task", "metric", "ours", "error", "paper"], [list(map(TableCell, row)) for row in rows], caption)
    job.add("Tasks", "tasks", results, table)


def on_lengths(job: Job, file: Path, longest: int, every: int) -> None:
    from hqlt.evaluate.lengths import bits_by_position
    from hqlt.report.evaluation import figure_of_lengths
    from hqlt.report.plots import save
    from hqlt.report.table import Table, TableCell

    tokens = job.tokenizer.encode(file.read_text(encoding="utf-8"))[:longest]
    with job.progress("reading", len(tokens)) as told:
        bins = bits_by_position(job.model, tokens, every, told)
    rows = [[f"{part.begin:,} – {part.end:,}", f"{part.carried:.4f}", f"{part.emptied:.4f}"] for part in bins]
    caption = f"{file.name}, {len(tokens):,} tokens, read once, in bits per {job.unit}."
    columns = ["position", "all before", f"emptied every {every:,}"]
    table = Table(columns, [list(map(TableCell, row)) for row in rows], caption)
    plot = save(figure_of_lengths(bins, every, job.unit), job.folder / "lengths.png")
    job.add("Far beyond training", "lengths", [part._asdict() for part in bins], table, plot)


def on_passkey(job: Job, longest: int, trials: int) -> None:
    from hqlt.evaluate.retrieval import PASSKEY, lengths_up_to, needle, retrieval
    from hqlt.report.evaluation import figure_of_retrieval
    from hqlt.report.plots import save
    from hqlt.report.table import Table, TableCell
    from hqlt.task.text import files_of

    text = bytes(files_of("test")[0][:NEEDLE_FILLER].tolist()).decode(errors="replace")
    lengths = lengths_up_to(longest)
    found = {}
    for haystack in (PASSKEY, needle(text)):
        with job.progress(haystack.name, trials * sum(lengths)) as told:
            found[haystack.name] = retrieval(job.model, job.tokenizer, haystack, lengths, trials=trials, told=told)
    rows = [
        [name, f"{depth:.0%}", *(f"{100 * one.right / trials:.0f}" for one in results if one.depth == depth)]
        for name, results in found.items()
        for depth in sorted({one.depth for one in results})
    ]
    caption = (
        f"Keys found, in percent: {trials} of five digits for each length (in tokens) and depth, greedy answers. "
        f"Needle: Python's library as filler."
    )
    columns = ["text", "depth", *(f"{length:,}" for length in lengths)]
    table = Table(columns, [list(map(TableCell, row)) for row in rows], caption)
    plot = save(figure_of_retrieval(found), job.folder / "passkey.png")
    written = {name: [result._asdict() for result in results] for name, results in found.items()}
    job.add("A key in a long text", "passkey", written, table, plot)
