"""`hqlt demo`: train six models on three tasks in a few minutes, to show why a layer has two memories."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text

from hqlt.data.tokenizer import Bytes
from hqlt.study import known_studies, read_study
from hqlt.study.run import run_study
from hqlt.task import StandardLibrary, generator_for
from hqlt.train.grid import Result


def demo(
    quick: bool = False,
    folder: Path | None = None,
    seed: int = 0,
    workers: int | None = None,
) -> None:
    """Train six models of equal size and budget on three tasks, and compare them.

    The tasks are state tracking (parity, trained on lengths 3–40, tested on 40–256), recall (more key–value pairs than
    a small matrix can hold) and real text (the source of Python's standard library). Prints a table, and writes
    config, metrics (JSONL), results (JSON) and an HTML page to a run folder.

    Args:
        quick: use budgets of about a minute in total, too small to learn, to check that everything runs.
        folder: run folder; default: a new one under runs/. The folder of an unfinished run resumes it.
        seed: seed of weights and training data. Validation and test sets are the same for all seeds.
        workers: number of parallel processes, with one thread each; default: the number of cores.
    """
    folder = folder or Path("runs") / f"demo-{datetime.now():%Y%m%d-%H%M%S}"
    console = Console()
    command = ["hqlt", "demo", *["--quick"] * quick, f"--seed={seed}", f"--folder={folder}"]
    text: dict[str, Any] = {}

    def additions(results: Sequence[Result]) -> dict[str, Any]:
        hybrid, keeping = (text_result(results, model) for model in ("Synchronous", "Synchronous, surprise"))
        text.update(text_sections(hybrid, keeping, folder))
        return text

    study = dataclasses.replace(read_study(known_studies()["demo"]), seeds=(seed,))
    run_study(
        study.quick() if quick else study,
        folder,
        resume_command=shlex.join(command),
        workers=workers,
        device="cpu",
        console=console,
        quick=quick,
        additions=additions,
    )
    sample = text["samples"][0]
    console.print(Text.assemble((f"{sample['model']} continues", "bold"), f" {sample['prompt']!r}:"))
    console.print(sample["text"], markup=False, highlight=False)


def text_result(results: Sequence[Result], model: str) -> Result:
    """Find the result of a model on text."""
    return next(r for r in results if (r.cell.task, r.cell.model) == ("text", model))


def text_sections(result: Result, keeping: Result, folder: Path) -> dict[str, Any]:
    """Make the page's sections on the text models.

    They show a sample, what each memory contributes while the model reads held-out text, and which KV entries another
    model (`keeping`) keeps.
    """
    from transformers.utils import logging

    from hqlt.model import HQLTForCausalLM
    from hqlt.report import memory_shares
    from hqlt.report.kept_page import kept_in_text

    logging.disable_progress_bar()
    model = HQLTForCausalLM.from_pretrained(folder / "models" / result.cell.name).eval()
    task = StandardLibrary(length=480)
    batch = task.sample(generator_for("test", 1), 1, "test")
    shares = memory_shares(model, batch.inputs, batch.resets)
    share = shares.fw.mean(dim=0)[0]
    least, greatest = share.min().item(), share.max().item()
    span = max(greatest - least, 1e-9)
    prompt, temperature, seed = "def ", 0.7, 0
    torch.manual_seed(seed)
    tokens = torch.tensor([list(prompt.encode())])
    written = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), do_sample=True, temperature=temperature, max_new_tokens=300
    )
    text = bytes(written[0, tokens.shape[1] :].tolist()).decode("utf-8", "replace")
    facts = {"model": result.cell.model, "least": least, "greatest": greatest, "mean": share.mean().item()}
    read = zip(batch.inputs[0].tolist(), share.tolist(), strict=True)
    marked = [{"text": chr(byte), "share": value, "shade": (value - least) / span} for byte, value in read]
    keeper = HQLTForCausalLM.from_pretrained(folder / "models" / keeping.cell.name).eval()
    how = {"model": result.cell.model, "temperature": temperature, "seed": seed}
    return {
        "shares": {**facts, "gate": shares.gate.mean().item(), "bytes": marked},
        "kept": kept_in_text(keeper, batch.inputs[0].tolist(), Bytes(), folder),
        "samples": [{**how, "prompt": prompt, "text": text}],
    }
