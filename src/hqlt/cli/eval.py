"""`hqlt eval`: a language model on the paper's tasks, at lengths far beyond training, and looking for a key."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from rich.console import Console

from hqlt.cli.keeping import Keeping
from hqlt.cli.progress import progress
from hqlt.data.text import beginning_of
from hqlt.disk import exclusive_folder
from hqlt.errors import require
from hqlt.run_folder import COMMANDS, kind_of

if TYPE_CHECKING:
    from hqlt.data import Tokenizer
    from hqlt.evaluate.paper import Line
    from hqlt.evaluate.retrieval import Haystack
    from hqlt.model import HQLTForCausalLM

PARTS = {"Tasks": "tasks", "Far beyond training": "lengths", "A key in a long text": "passkey"}
"""By the title of each part: its name in results.json."""
NEEDLE_FILLER = 200_000
"""Characters of real text that the needle's haystack is made of."""


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
    **keeping: Any,
) -> None:
    """Evaluate a language model: tasks of lm-evaluation-harness, texts of any length, keys hidden in them.

    Prints tables, and leaves results.json, plots and one page in a folder, after each part. Texts are read whole, piece
    by piece, with the memories carried on; those of tasks are cut where `max_length` says so. Numbers do not depend on
    the batch size.

    Args:
        model: a model's folder, or the run that trained it.
        suite: "paper": its ten tasks, beside its row for this model, if it has one.
        tasks: names of the harness's tasks, with commas between them.
        local: a folder of data for local tasks (lambada_local, wikitext2_local, piqa_local) and of task files of your
            own, in which {local} stands for the folder. Python files that they name are run.
        limit: documents of each task, to see that everything runs.
        compare: folders of earlier evaluations on tasks, with commas between them: a column of the table for each.
        batch_size: texts side by side.
        max_length: tokens that tasks read at most to predict the next: contexts lose their beginning, long documents
            are read in windows. 2,048 for the suite, otherwise nothing is cut by default.
        lengths: a text file; how well it is predicted at each distance from its beginning.
        passkey: find a five-digit key in repeated sentences and in real text, by length and depth.
        max_tokens: tokens that `--lengths` and `--passkey` go up to.
        reset_every: `--lengths` compares with memories emptied every so many tokens.
        trials: keys for each length and depth.
        device: where the model runs, such as cpu; cuda where there is one by default.
        folder: where results go; a new one under runs/ by default.
    """
    options = {**locals(), **keeping}
    del options["keeping"]
    from hqlt.device import usable_device
    from hqlt.evaluate.paper import tables
    from hqlt.language.folder import find_model, tokenizer_of

    place = folder or Path("runs") / f"eval-{model.resolve().name}-{datetime.now():%Y%m%d-%H%M%S}"
    check(options, place)
    retention = Keeping(**keeping)
    config = retention.config_of(model)
    options |= {"model": find_model(model), "device": usable_device(device)}
    if suite and max_length is None:
        options["max_length"] = tables()["max_length"]
    tokenizer = tokenizer_of(model, config.vocab_size)
    text = tokens_of(lengths, tokenizer, max_tokens) if lengths else []
    haystacks = haystacks_for(tokenizer, max_tokens) if passkey else []
    others = earlier(options) if compare else {}
    loaded = tasks_of(suite, tasks, local)
    with exclusive_folder(place):
        job = Job(retention.load(model, options["device"], Console()), tokenizer, place, options)
        job.kept = kept_in(job, text, haystacks)
        if loaded:
            on_tasks(job, loaded, others)
        if lengths:
            on_lengths(job, lengths.name, text, reset_every)
        if passkey:
            on_passkey(job, haystacks, max_tokens, trials)


def check(options: dict[str, Any], place: Path) -> None:
    """Raises ValueError, OSError or ModuleNotFoundError for what would only fail after other work is done."""
    on_tasks = options["suite"] or options["tasks"]
    if not (on_tasks or options["lengths"] or options["passkey"]):
        raise ValueError("expected something to evaluate: --suite paper, --tasks NAMES, --lengths FILE or --passkey")
    if options["compare"] is not None and not on_tasks:
        raise ValueError("compare: expected together with tasks, whose figures stand side by side; give --tasks NAMES")
    for name in ("limit", "batch_size", "max_length", "max_tokens", "reset_every", "trials"):
        if options[name] is not None and options[name] < 1:
            raise ValueError(f"{name.replace('_', '-')}: expected at least 1, got {options[name]}")
    if options["local"] and not options["local"].is_dir():
        raise NotADirectoryError(f"local: expected a folder, got {options['local']}")
    if place.is_dir() and (kind := kind_of(place)):
        raise ValueError(f"{place}: expected a folder for results alone, found a run of {COMMANDS[kind]}; name another")
    require("jinja2", "matplotlib", *["lm_eval"] * bool(on_tasks))


def tokens_of(file: Path, tokenizer: Tokenizer, longest: int) -> list[int]:
    """The first tokens of a text, of which no more is read than they need.

    Raises ValueError and OSError for what is no text of two tokens or more.
    """
    size, whole, tokens = longest, False, list[int]()
    while not whole and len(tokens) <= longest:
        size *= 4
        text, whole = beginning_of(file, size)
        tokens = [*tokenizer.prefix_ids, *tokenizer.encode(text)]
    if len(tokens[:longest]) < 2:
        given = min(len(tokens), longest)
        raise ValueError(f"{file}: expected at least two tokens, to predict one from the other, got {given}")
    return tokens[:longest]


def haystacks_for(tokenizer: Tokenizer, longest: int) -> list[Haystack]:
    """What keys are hidden in. Raises ValueError where the shortest text has no room for a key."""
    from hqlt.evaluate.retrieval import PASSKEY, lengths_up_to, needle, text_of
    from hqlt.task.text import files_of

    library = bytes(files_of("test")[0][:NEEDLE_FILLER].tolist()).decode(errors="replace")
    haystacks = [PASSKEY, needle(library)]
    for haystack in haystacks:
        text_of(tokenizer, haystack, [], "00000", lengths_up_to(longest)[0], depth=0)
    return haystacks


def kept_in(job: Job, text: list[int], haystacks: list[Haystack]) -> dict[str, Any] | None:
    """Which entries stay of a text with a key in it where one is looked for, or else of the text that is read."""
    from hqlt.evaluate.retrieval import text_of
    from hqlt.report.kept_page import SHOWN, kept_in_text

    for haystack in haystacks[-1:]:
        filler = job.tokenizer.encode(haystack.filler[: 8 * SHOWN])
        text = list(text_of(job.tokenizer, haystack, filler, "52407", SHOWN, depth=0.25))
    return kept_in_text(job.model, text, job.tokenizer, job.folder) if text else None


@dataclass
class Job:
    """What is evaluated, and what has come out so far."""

    model: HQLTForCausalLM
    tokenizer: Tokenizer
    folder: Path
    options: dict[str, Any]
    results: dict[str, Any] = field(default_factory=dict)
    sections: list[dict[str, Any]] = field(default_factory=list)
    kept: dict[str, Any] | None = None
    """Which entries stay, for a model that keeps any."""
    console: Console = field(default_factory=Console)

    @functools.cached_property
    def facts(self) -> dict[str, Any]:
        """What else the numbers depend on."""
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
        """Show a table, and leave all there is so far: what comes next may fail, or be interrupted."""
        from hqlt.report.plots import save
        from hqlt.report.table import Table, TableCell

        name = PARTS[title]
        table = Table(columns, [list(map(TableCell, row)) for row in rows], caption)
        plot = None if figure is None else save(figure, self.folder / f"{name}.png")
        self.results[name] = results
        self.sections.append({"title": title, "table": table, "plot": plot})
        self.console.print(f"[bold]{title}[/bold]")
        self.console.print(table.for_terminal())
        self.leave()

    def leave(self) -> None:
        """Everything as JSON, and one page."""
        from hqlt.report.page import write_page

        settings = self.options | self.facts
        written = {"settings": settings, "config": self.model.config.to_diff_dict(), "results": self.results}
        (self.folder / "results.json").write_text(json.dumps(written, indent=1, default=str) + "\n", encoding="utf-8")
        cut = self.options["max_length"]
        write_page(
            self.folder / "report.html",
            title=f"Evaluation of {self.options['model']}",
            introduction="Texts are read whole, piece by piece: what was read is carried on in the memories."
            + (f" Those of tasks are cut: at most {cut:,} tokens are read to predict the next." if cut else ""),
            sections=self.sections,
            kept=self.kept,
            protocol="hqlt eval, with these settings:",
            settings=json.dumps(settings, indent=1, default=str),
        )
        self.console.print(f"page: {self.folder / 'report.html'}", highlight=False)


def tasks_of(suite: str | None, tasks: str | None, local: Path | None) -> list[Any]:
    """Those that are named, with their data."""
    from hqlt.evaluate.paper import tables

    named = [name.strip() for name in (tasks or "").split(",") if name.strip()]
    names = list(dict.fromkeys([*(tables()["suite"] if suite else []), *named]))
    if tasks is not None and not named:
        raise ValueError(f"tasks: expected the name of a task, got {tasks!r}")
    if not names:
        return []
    from hqlt.evaluate.harness import load_tasks

    return load_tasks(names, local)


def earlier(options: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """By folder: what earlier evaluations found on tasks.

    Raises ValueError and OSError for folders without, and for evaluations of other documents or contexts than this.
    """
    found = {}
    for name in filter(None, map(str.strip, options["compare"].split(","))):
        file = Path(name) / "results.json"
        told = json.loads(file.read_text(encoding="utf-8"))
        if "tasks" not in told.get("results", {}):
            raise ValueError(f"compare: expected an evaluation of `hqlt eval --tasks` in {name}, got one without tasks")
        for asked in ("limit", "max_length"):
            if (theirs := told["settings"][asked]) != options[asked]:
                option = asked.replace("_", "-")
                raise ValueError(
                    f"compare: expected an evaluation with {option} {options[asked]}, got {theirs} in {name}"
                )
        found[name] = told["results"]["tasks"]
    return found


def on_tasks(job: Job, tasks: list[Any], others: dict[str, dict[str, Any]]) -> None:
    from hqlt.evaluate.harness import HarnessModel, run_tasks
    from hqlt.evaluate.paper import PERCENT, compare, counterpart

    given, limit = job.options, job.options["limit"]
    model = HarnessModel(job.model, job.tokenizer, given["batch_size"], given["max_length"])
    results = run_tasks(model, tasks, limit)
    config: Any = job.model.config
    paper = counterpart(config)
    known = {
        name: {(line.task, line.metric): told(line) for line in compare(theirs, config)}
        for name, theirs in others.items()
    }
    rows = [
        [line.task, line.metric, told(line), "–" if line.paper is None else f"{line.paper:g}"]
        + [of_other.get((line.task, line.metric), "–") for of_other in known.values()]
        for line in compare(results, config)
    ]
    caption = f"{', '.join(PERCENT)} and their averages in percent. " + (
        f"Paper: its {paper.name}." if paper else "The paper has no such model."
    )
    if limit:
        caption += f" The first {limit} documents only."
    job.add("Tasks", results, ["task", "metric", "ours", "paper", *known], rows, caption)


def told(line: Line) -> str:
    """A number with its standard error."""
    return f"{line.ours:.4g}" + ("" if line.error is None else f" ± {line.error:.2g}")


def on_lengths(job: Job, name: str, tokens: list[int], every: int) -> None:
    from hqlt.evaluate.lengths import bits_by_position
    from hqlt.report.evaluation import figure_of_lengths

    with progress("reading", len(tokens)) as told:
        bins = bits_by_position(job.model, tokens, every, told)
    rows = [[f"{part.begin:,} – {part.end:,}", f"{part.carried:.4f}", f"{part.emptied:.4f}"] for part in bins]
    caption = f"{name}, {len(tokens):,} tokens, read once, in bits per {job.unit}."
    columns = ["position", "all before", f"emptied every {every:,}"]
    figure = figure_of_lengths(bins, every, job.unit)
    job.add("Far beyond training", [part._asdict() for part in bins], columns, rows, caption, figure)


def on_passkey(job: Job, haystacks: list[Haystack], longest: int, trials: int) -> None:
    from hqlt.evaluate.retrieval import lengths_up_to, retrieval
    from hqlt.report.evaluation import figure_of_retrieval

    lengths = lengths_up_to(longest)
    found = {}
    for haystack in haystacks:
        with progress(haystack.name, trials * sum(lengths)) as told:
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
    written = {name: [result._asdict() for result in results] for name, results in found.items()}
    job.add("A key in a long text", written, columns, rows, caption, figure_of_retrieval(found))
