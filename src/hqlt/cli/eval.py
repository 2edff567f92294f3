"""`hqlt eval`: evaluate a language model on tasks, on texts far longer than in training, and on key retrieval."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from rich.console import Console

from hqlt.cli.progress import progress
from hqlt.cli.retention_options import RetentionOptions
from hqlt.data.text import beginning_of
from hqlt.disk import exclusive_folder
from hqlt.errors import require
from hqlt.run_folder import COMMANDS, kind_of

if TYPE_CHECKING:
    from hqlt.data import Tokenizer
    from hqlt.evaluate.paper import Comparison
    from hqlt.evaluate.retrieval import Haystack
    from hqlt.model import HQLTForCausalLM

PARTS = {"Tasks": "tasks", "Bits by position": "lengths", "Key retrieval": "passkey"}
"""Name in results.json of each part, by its title on the page."""
NEEDLE_FILLER = 200_000
"""Number of characters of real text in the needle's haystack."""


def eval(
    model: Path,
    suite: Literal["paper"] | None = None,
    tasks: str | None = None,
    local: Path | None = None,
    limit: int | None = None,
    compare: str | None = None,
    batch_size: int = 8,
    max_length: int | None = None,
    lengths: Path | None = None,
    passkey: bool = False,
    max_tokens: int = 1_000_000,
    reset_every: int = 2048,
    trials: int = 2,
    device: str | None = None,
    folder: Path | None = None,
    **retention_options: Any,
) -> None:
    """Evaluate a language model on tasks of lm-evaluation-harness, on long texts, and on key retrieval.

    Prints tables, and after each part writes results.json, plots and an HTML page to a folder. Texts are read in
    chunks with carried memories; tasks truncate them to --max-length. Results do not depend on the batch size.

    Args:
        model: folder of a model, or of the run that trained it.
        suite: "paper" runs the paper's ten tasks and shows its results for the same model, if it has any.
        tasks: names of harness tasks, separated by commas.
        local: folder with data for the local tasks (lambada_local, wikitext2_local, piqa_local) and optionally with
            task files of your own, in which {local} stands for the folder. Python files that they name are executed.
        limit: number of documents per task, for a quick test.
        compare: folders of earlier evaluations on tasks, separated by commas; each adds a column to the table.
        batch_size: number of texts read at once.
        max_length: maximum number of tokens that tasks read to predict the next one: contexts are truncated on the
            left, long documents are read in windows; default: 2,048 with --suite, otherwise no limit.
        lengths: text file; reports bits per token by position.
        passkey: find a five-digit key in repeated sentences and in real text, by length and depth.
        max_tokens: maximum number of tokens read by --lengths and --passkey.
        reset_every: --lengths compares with memories that are emptied after this many tokens.
        trials: number of keys per length and depth.
        device: device of the model, such as cpu; default: cuda if available.
        folder: folder for the results; default: a new one under runs/.
    """
    options = {**locals(), **retention_options}
    del options["retention_options"]
    from hqlt.device import usable_device
    from hqlt.evaluate.paper import tables
    from hqlt.language.folder import find_model, tokenizer_of

    place = folder or Path("runs") / f"eval-{model.resolve().name}-{datetime.now():%Y%m%d-%H%M%S}"
    check_options(options, place)
    retention = RetentionOptions(**retention_options)
    config = retention.config_of(model)
    options |= {"model": find_model(model), "device": usable_device(device)}
    if suite and max_length is None:
        options["max_length"] = tables()["max_length"]
    tokenizer = tokenizer_of(model, config.vocab_size)
    text = tokens_of(lengths, tokenizer, max_tokens) if lengths else []
    haystacks = haystacks_for(tokenizer, max_tokens) if passkey else []
    others = earlier_results(options) if compare else {}
    loaded = tasks_of(suite, tasks, local)
    with exclusive_folder(place):
        job = Job(retention.load(model, options["device"], Console()), tokenizer, place, options)
        job.kept = kept_in(job, text, haystacks)
        if loaded:
            evaluate_tasks(job, loaded, others)
        if lengths:
            evaluate_lengths(job, lengths.name, text, reset_every)
        if passkey:
            evaluate_retrieval(job, haystacks, max_tokens, trials)


def check_options(options: dict[str, Any], place: Path) -> None:
    """Refuse, before any work is done, what would only fail later.

    Raises:
        ValueError: for options that do not fit together, and for a folder that holds a run.
        OSError: for a folder that does not exist.
        ModuleNotFoundError: for a missing package.
    """
    tasks = options["suite"] or options["tasks"]
    if not (tasks or options["lengths"] or options["passkey"]):
        raise ValueError("expected something to evaluate: --suite paper, --tasks NAMES, --lengths FILE or --passkey")
    if options["compare"] is not None and not tasks:
        raise ValueError("compare: expected tasks to compare, got none; give --tasks NAMES")
    for name in ("limit", "batch_size", "max_length", "max_tokens", "reset_every", "trials"):
        if options[name] is not None and options[name] < 1:
            raise ValueError(f"{name.replace('_', '-')}: expected at least 1, got {options[name]}")
    if options["local"] and not options["local"].is_dir():
        raise NotADirectoryError(f"local: expected a folder, got {options['local']}")
    if place.is_dir() and (kind := kind_of(place)):
        raise ValueError(f"{place}: expected a folder for results only, found a run of {COMMANDS[kind]}; name another")
    require("jinja2", "matplotlib", *["lm_eval"] * bool(tasks))


def tokens_of(file: Path, tokenizer: Tokenizer, max_tokens: int) -> list[int]:
    """Read the first `max_tokens` tokens of a text file, and no more of the file than they need.

    Raises:
        ValueError: if the file is not text in UTF-8, or has fewer than two tokens.
        OSError: if the file cannot be read.
    """
    size, whole, tokens = max_tokens, False, list[int]()
    while not whole and len(tokens) <= max_tokens:
        size *= 4
        text, whole = beginning_of(file, size)
        tokens = [*tokenizer.prefix_ids, *tokenizer.encode(text)]
    if len(tokens[:max_tokens]) < 2:
        got = min(len(tokens), max_tokens)
        raise ValueError(f"{file}: expected at least two tokens, to predict one from the other, got {got}")
    return tokens[:max_tokens]


def haystacks_for(tokenizer: Tokenizer, max_tokens: int) -> list[Haystack]:
    """Make the haystacks that keys are hidden in.

    Raises:
        ValueError: if the shortest text has no room for a key.
    """
    from hqlt.evaluate.retrieval import PASSKEY, haystack_tokens, lengths_up_to, needle
    from hqlt.task.text import files_of

    library = bytes(files_of("test")[0][:NEEDLE_FILLER].tolist()).decode(errors="replace")
    haystacks = [PASSKEY, needle(library)]
    for haystack in haystacks:
        haystack_tokens(tokenizer, haystack, [], "00000", lengths_up_to(max_tokens)[0], depth=0)
    return haystacks


def kept_in(job: Job, text: list[int], haystacks: list[Haystack]) -> dict[str, Any] | None:
    """Show which KV entries are kept of a text, which contains a key if there are haystacks."""
    from hqlt.evaluate.retrieval import haystack_tokens
    from hqlt.report.kept_page import SHOWN, kept_in_text

    for haystack in haystacks[-1:]:
        filler = job.tokenizer.encode(haystack.filler[: 8 * SHOWN])
        text = list(haystack_tokens(job.tokenizer, haystack, filler, "52407", SHOWN, depth=0.25))
    return kept_in_text(job.model, text, job.tokenizer, job.folder) if text else None


@dataclass
class Job:
    """An evaluation, and its results so far."""

    model: HQLTForCausalLM
    tokenizer: Tokenizer
    folder: Path
    options: dict[str, Any]
    results: dict[str, Any] = field(default_factory=dict)
    sections: list[dict[str, Any]] = field(default_factory=list)
    kept: dict[str, Any] | None = None
    """The page's section on kept entries, for a model that keeps entries beyond its window."""
    console: Console = field(default_factory=Console)

    @functools.cached_property
    def facts(self) -> dict[str, Any]:
        """What the results depend on besides the options."""
        from hqlt import __version__, fingerprint

        return {
            "fingerprint": fingerprint(self.model),
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "dtype": str(self.model.dtype),
            "tokenizer": self.tokenizer.name,
            "hqlt": __version__,
            "torch": torch.__version__,
        }

    @property
    def unit(self) -> str:
        return "byte" if self.tokenizer.name == "bytes" else "token"

    def add(
        self, title: str, results: Any, columns: list[str], rows: list[list[str]], caption: str, figure: Any = None
    ) -> None:
        """Print a table, and write all results so far, because a later part may fail or be interrupted."""
        from hqlt.report.plots import save
        from hqlt.report.table import Table, TableCell

        name = PARTS[title]
        table = Table(columns, [list(map(TableCell, row)) for row in rows], caption)
        plot = None if figure is None else save(figure, self.folder / f"{name}.png")
        self.results[name] = results
        self.sections.append({"title": title, "table": table, "plot": plot})
        self.console.print(f"[bold]{title}[/bold]")
        self.console.print(table.for_terminal())
        self.write()

    def write(self) -> None:
        """Write results.json and the page."""
        from hqlt.report.page import write_page

        settings = self.options | self.facts
        written = {"settings": settings, "config": self.model.config.to_diff_dict(), "results": self.results}
        (self.folder / "results.json").write_text(json.dumps(written, indent=1, default=str) + "\n", encoding="utf-8")
        max_length = self.options["max_length"]
        write_page(
            self.folder / "report.html",
            title=f"Evaluation of {self.options['model']}",
            introduction="Texts are read in chunks, with memories carried from chunk to chunk."
            + (f" Tasks read at most {max_length:,} tokens to predict the next one." if max_length else ""),
            sections=self.sections,
            kept=self.kept,
            protocol="hqlt eval, with these settings:",
            settings=json.dumps(settings, indent=1, default=str),
        )
        self.console.print(f"page: {self.folder / 'report.html'}", highlight=False)


def tasks_of(suite: str | None, tasks: str | None, local: Path | None) -> list[Any]:
    """Load the tasks of the suite and the tasks given by name, with their data."""
    from hqlt.evaluate.paper import tables

    named = [name.strip() for name in (tasks or "").split(",") if name.strip()]
    names = list(dict.fromkeys([*(tables()["suite"] if suite else []), *named]))
    if tasks is not None and not named:
        raise ValueError(f"tasks: expected the name of a task, got {tasks!r}")
    if not names:
        return []
    from hqlt.evaluate.harness import load_tasks

    return load_tasks(names, local)


def earlier_results(options: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Read the results of earlier evaluations on tasks, by folder.

    Raises:
        ValueError: for an evaluation without tasks, or with another limit or max_length than this one.
        OSError: for a folder without results.
    """
    found = {}
    for name in filter(None, map(str.strip, options["compare"].split(","))):
        file = Path(name) / "results.json"
        evaluation = json.loads(file.read_text(encoding="utf-8"))
        if "tasks" not in evaluation.get("results", {}):
            raise ValueError(f"compare: expected an evaluation of `hqlt eval --tasks` in {name}, got one without tasks")
        for option in ("limit", "max_length"):
            if (theirs := evaluation["settings"][option]) != options[option]:
                raise ValueError(
                    f"compare: expected an evaluation with {option.replace('_', '-')} {options[option]}, "
                    f"got {theirs} in {name}"
                )
        found[name] = evaluation["results"]["tasks"]
    return found


def evaluate_tasks(job: Job, tasks: list[Any], others: dict[str, dict[str, Any]]) -> None:
    """Run the tasks, and compare the results with the paper's and with those of earlier evaluations."""
    from hqlt.evaluate.harness import HarnessModel, run_tasks
    from hqlt.evaluate.paper import PERCENT, compare, counterpart

    options, limit = job.options, job.options["limit"]
    model = HarnessModel(job.model, job.tokenizer, options["batch_size"], options["max_length"])
    results = run_tasks(model, tasks, limit)
    config: Any = job.model.config
    paper = counterpart(config)
    known = {
        name: {(line.task, line.metric): with_error(line) for line in compare(theirs, config)}
        for name, theirs in others.items()
    }
    rows = [
        [line.task, line.metric, with_error(line), "–" if line.paper is None else f"{line.paper:g}"]
        + [other_scores.get((line.task, line.metric), "–") for other_scores in known.values()]
        for line in compare(results, config)
    ]
    caption = f"{', '.join(PERCENT)} and their averages in percent. " + (
        f"Paper: its model {paper.name}." if paper else "The paper has no such model."
    )
    if limit:
        caption += f" The first {limit} documents of each task only."
    job.add("Tasks", results, ["task", "metric", "ours", "paper", *known], rows, caption)


def with_error(line: Comparison) -> str:
    """Format a result with its standard error."""
    return f"{line.ours:.4g}" + ("" if line.error is None else f" ± {line.error:.2g}")


def evaluate_lengths(job: Job, name: str, tokens: list[int], reset_every: int) -> None:
    """Measure bits by position in a text."""
    from hqlt.evaluate.lengths import bits_by_position
    from hqlt.report.evaluation import figure_of_lengths

    with progress("reading", len(tokens)) as on_progress:
        bins = bits_by_position(job.model, tokens, reset_every, on_progress)
    rows = [[f"{part.begin:,} – {part.end:,}", f"{part.carried:.4f}", f"{part.emptied:.4f}"] for part in bins]
    caption = f"{name}: bits per {job.unit} by position; {len(tokens):,} tokens, read once."
    columns = ["position", "memories carried", f"emptied every {reset_every:,}"]
    figure = figure_of_lengths(bins, reset_every, job.unit)
    job.add("Bits by position", [part._asdict() for part in bins], columns, rows, caption, figure)


def evaluate_retrieval(job: Job, haystacks: list[Haystack], max_tokens: int, trials: int) -> None:
    """Measure how often keys are found, by length and depth."""
    from hqlt.evaluate.retrieval import lengths_up_to, retrieval
    from hqlt.report.evaluation import figure_of_retrieval

    lengths = lengths_up_to(max_tokens)
    found = {}
    for haystack in haystacks:
        with progress(haystack.name, trials * sum(lengths)) as on_progress:
            found[haystack.name] = retrieval(
                job.model, job.tokenizer, haystack, lengths, trials=trials, on_progress=on_progress
            )
    rows = [
        [name, f"{depth:.0%}", *(f"{100 * one.right / trials:.0f}" for one in results if one.depth == depth)]
        for name, results in found.items()
        for depth in sorted({one.depth for one in results})
    ]
    caption = (
        f"Keys found, in percent, by depth and length in tokens: {trials} keys of five digits each, greedy answers. "
        f"The needle's filler is Python's standard library."
    )
    columns = ["text", "depth", *(f"{length:,}" for length in lengths)]
    written = {name: [result._asdict() for result in results] for name, results in found.items()}
    job.add("Key retrieval", written, columns, rows, caption, figure_of_retrieval(found))
