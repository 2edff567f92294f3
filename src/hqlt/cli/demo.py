"""`hqlt demo`: five models, three tasks, a few minutes. Why two memories in one layer?"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from hqlt._version import version
from hqlt.task import StandardLibrary, generator_for
from hqlt.train.fit import Budget
from hqlt.train.grid import Cell, Event, Result, as_json, run_grid

MODELS: dict[str, dict[str, Any]] = {
    "Transformer": {"layer_kinds": "kv"},
    "DeltaNet": {"layer_kinds": "fw"},
    "Delayed-Streaming": {"blend": "delayed-streaming"},
    "Delayed-Chunk": {"blend": "delayed-chunk"},
    "Synchronous": {"blend": "synchronous"},
}

# What all models of a task share; no positions, so that lengths beyond training are not foreign to anyone.
PARITY = {"hidden_size": 32, "num_heads": 4, "num_hidden_layers": 1, "window": 8, "rope_theta": None}
RECALL = {"hidden_size": 64, "num_heads": 4, "num_hidden_layers": 2, "window": 64, "rope_theta": None, "conv_size": 4}
TEXT = {"hidden_size": 64, "num_heads": 4, "num_hidden_layers": 3, "window": 32}


def experiments(quick: bool) -> list[tuple[str, dict[str, Any], dict[str, Any], Budget]]:
    """(task, its options, the models' common configuration, the budget), for each task."""
    few: dict[str, Any] = {"validations": 2, "validation_rows": 16, "test_rows": 64} if quick else {}
    return [
        (
            "parity",
            {},
            PARITY,
            Budget(steps=40 if quick else 150, batch_size=128, learning_rate=1e-2, **few),
        ),
        (
            "recall",
            {"vocabulary": 128, "pairs": 32, "train_pairs": [4, 8, 16, 32]},
            RECALL,
            Budget(steps=15 if quick else 320, batch_size=16, learning_rate=1e-2, **few),
        ),
        (
            "text",
            {"length": 256},
            TEXT,
            Budget(
                steps=15 if quick else 300,
                batch_size=8,
                learning_rate=1e-2,
                **({"validation_rows": 64, "test_rows": 256} | few),
            ),
        ),
    ]


def demo(
    quick: bool = False,
    folder: Path | None = None,
    seed: int = 0,
    workers: int | None = None,
) -> None:
    """Train five models of equal size and budget on three tasks, and show what came out.

    State tracking (parity, trained on lengths 3–40, tested on 40–256), recall (more pairs than a small matrix holds)
    and real text (the source of Python's standard library). Prints one table, and leaves a run folder with config,
    JSONL, JSON and one HTML page.

    Args:
        quick: budgets of about a minute in all, too small to learn much; to see that everything runs.
        folder: the run folder; a new one under runs/ by default. Give an unfinished one to go on with it.
        seed: of weights and training data. Validation and test sets are the same for all.
        workers: processes side by side, one thread each; all cores by default.
    """
    from hqlt.report.live import GridDisplay

    cells = [
        Cell(
            model=model,
            config=sized(common, own),
            task=task,
            task_options=options,
            budget=budget,
            seed=seed,
        )
        for task, options, common, budget in experiments(quick)
        for model, own in MODELS.items()
    ]
    folder = folder or Path("runs") / f"demo-{datetime.now():%Y%m%d-%H%M%S}"
    folder.mkdir(parents=True, exist_ok=True)
    console = Console()
    workers = workers or os.cpu_count() or 1
    settings = {
        "command": "hqlt " + " ".join(sys.argv[1:]),
        "seed": seed,
        "workers": workers,
        "hqlt": version,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{os.cpu_count()} × {platform.machine()}",
        "cells": [dataclasses.asdict(cell) for cell in cells],
    }
    (folder / "config.json").write_text(json.dumps(settings, indent=1))
    console.print(f"{len(cells)} cells on {workers} processes → {folder}", highlight=False)
    begun = time.monotonic()
    results: list[Result] = []
    with (folder / "metrics.jsonl").open("a") as log, GridDisplay(len(cells), console) as display:

        def on_event(told: Event | Result) -> None:
            display.on_event(told)
            if isinstance(told, Result):
                results.append(told)
            else:
                log.write(json.dumps({"cell": told.cell.name, **told.progress._asdict()}) + "\n")

        try:
            run_grid(cells, folder, workers, on_event)
        except KeyboardInterrupt:
            console.print(
                f"stopped with {len(results)} of {len(cells)} cells finished; go on with: hqlt demo "
                f"{'--quick ' if quick else ''}--seed={seed} --folder={folder}",
                highlight=False,
            )
            raise
    order = [cell.name for cell in cells]
    results.sort(key=lambda result: order.index(result.cell.name))
    show(results, folder, settings, console)
    console.print(f"{time.monotonic() - begun:.0f} s in all", highlight=False)


def sized(common: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """A model's configuration with its MLPs as wide as makes all models equal in size.

    The hybrid's layer has a mixer that a memory alone does not need; the baselines get those weights in their MLPs.
    """
    hidden, layers = common["hidden_size"], common["num_hidden_layers"]
    config = {**common, **own, "initializer_range": hidden**-0.5 / 2, "intermediate_size": 3 * hidden}
    if (kind := config.get("layer_kinds")) is not None:
        config["layer_kinds"] = [kind] * layers
        config["intermediate_size"] += round(hidden / 3)  # d·d of the mixer, over the three matrices of d·m
    return config


def show(results: list[Result], folder: Path, settings: dict[str, Any], console: Console) -> None:
    """One table, one plot, one page, one JSON file."""
    from hqlt.report.page import write_page
    from hqlt.report.plots import figure_of, save
    from hqlt.report.table import table_of

    table = table_of(results)
    (folder / "results.json").write_text(json.dumps([as_json(result) for result in results], indent=1))
    (folder / "table.md").write_text(table.as_markdown())
    plot = save(figure_of(results), folder / "curves.png")
    best = max((r for r in results if r.cell.task == "text"), key=lambda r: r.cell.model == "Synchronous")
    text = read_and_write(best, folder)
    write_page(
        folder / "report.html",
        title="One layer, two memories",
        introduction=(
            "Five models of equal size and budget: softmax attention alone, fast weights alone, and three blends of "
            "the two in every layer. Parity needs a state to be tracked, recall a precise memory, text some of each."
        ),
        table=table,
        plot=plot,
        spoken=text["spoken"],
        samples=text["samples"],
        protocol=(
            "Checkpoints were chosen by the validation score and tested once. Validation and test sets are the same "
            "for all models and come from other seeds (text: other files) than the training data and each other. "
            "All that was run is in the table."
        ),
        settings=json.dumps({k: v for k, v in settings.items() if k != "cells"}, indent=1)
        + "\n"
        + "\n".join(f"{r.cell.name}: {r.cell.budget}, best update {r.fit.best_step}" for r in results),
    )
    console.print(table.for_terminal())
    sample = text["samples"][0]
    console.print(f"[bold]{sample['model']} goes on from[/bold] {sample['prompt']!r}:")
    console.print(sample["text"], markup=False, highlight=False)
    console.print(f"page: {folder / 'report.html'}    plot: {folder / 'curves.png'}", highlight=False)


def read_and_write(result: Result, folder: Path) -> dict[str, Any]:
    """What a trained text model writes, and which of its memories speaks while it reads held-out text."""
    from transformers.utils import logging

    from hqlt.model import HQLTForCausalLM
    from hqlt.report import memory_shares

    logging.disable_progress_bar()
    model = HQLTForCausalLM.from_pretrained(folder / "models" / result.cell.name).eval()
    task = StandardLibrary(length=480)
    batch = task.sample(generator_for("test", 1), 1, "test")
    shares = memory_shares(model, batch.inputs, batch.resets)
    share = shares.fw.mean(dim=0)[0]
    least, greatest = share.min().item(), share.max().item()
    prompt, temperature, seed = "def ", 0.7, 0
    torch.manual_seed(seed)
    tokens = torch.tensor([list(prompt.encode())])
    written = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), do_sample=True, temperature=temperature, max_new_tokens=300
    )
    text = bytes(written[0, tokens.shape[1] :].tolist()).decode("utf-8", "replace")
    return {
        "spoken": {
            "model": result.cell.model,
            "least": least,
            "greatest": greatest,
            "mean": share.mean().item(),
            "gate": shares.gate.mean().item(),
            "bytes": [
                {"text": chr(byte), "share": value, "shade": (value - least) / max(greatest - least, 1e-9)}
                for byte, value in zip(batch.inputs[0].tolist(), share.tolist(), strict=True)
            ],
        },
        "samples": [
            {
                "model": result.cell.model,
                "temperature": temperature,
                "seed": seed,
                "prompt": prompt,
                "text": text,
            }
        ],
    }
