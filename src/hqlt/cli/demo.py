"""`hqlt demo`: six models, three tasks, a few minutes. Why two memories in one layer?"""

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
    """Train six models of equal size and budget on three tasks, and show what came out.

    State tracking (parity, trained on lengths 3–40, tested on 40–256), recall (more pairs than a small matrix holds)
    and real text (the source of Python's standard library). Prints one table, and leaves a run folder with config,
    JSONL, JSON and one HTML page.

    Args:
        quick: budgets of about a minute in all, too small to learn; to see that everything runs.
        folder: the run folder; a new one under runs/ by default. Give an unfinished one to resume it.
        seed: of weights and training data. Validation and test sets are the same for all.
        workers: processes side by side, one thread each; all cores by default.
    """
    folder = folder or Path("runs") / f"demo-{datetime.now():%Y%m%d-%H%M%S}"
    console = Console()
    again = ["hqlt", "demo", *["--quick"] * quick, f"--seed={seed}", f"--folder={folder}"]
    text: dict[str, Any] = {}

    def additions(results: Sequence[Result]) -> dict[str, Any]:
        hybrid, keeping = (on_text(results, model) for model in ("Synchronous", "Synchronous, surprise"))
        text.update(read_and_write(hybrid, keeping, folder))
        return text

    study = dataclasses.replace(read_study(known_studies()["demo"]), seeds=(seed,))
    run_study(
        study.quick() if quick else study,
        folder,
        again=shlex.join(again),
        workers=workers,
        device="cpu",
        console=console,
        quick=quick,
        additions=additions,
    )
    sample = text["samples"][0]
    console.print(Text.assemble((f"{sample['model']} continues", "bold"), f" {sample['prompt']!r}:"))
    console.print(sample["text"], markup=False, highlight=False)


def on_text(results: Sequence[Result], model: str) -> Result:
    return next(r for r in results if (r.cell.task, r.cell.model) == ("text", model))


def read_and_write(result: Result, keeping: Result, folder: Path) -> dict[str, Any]:
    """What a trained text model writes, what each of its memories contributes as it reads held-out text, and which
    entries of it another one keeps."""
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
    spread = max(greatest - least, 1e-9)
    prompt, temperature, seed = "def ", 0.7, 0
    torch.manual_seed(seed)
    tokens = torch.tensor([list(prompt.encode())])
    written = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), do_sample=True, temperature=temperature, max_new_tokens=300
    )
    text = bytes(written[0, tokens.shape[1] :].tolist()).decode("utf-8", "replace")
    facts = {"model": result.cell.model, "least": least, "greatest": greatest, "mean": share.mean().item()}
    read = zip(batch.inputs[0].tolist(), share.tolist(), strict=True)
    marked = [{"text": chr(byte), "share": value, "shade": (value - least) / spread} for byte, value in read]
    keeper = HQLTForCausalLM.from_pretrained(folder / "models" / keeping.cell.name).eval()
    how = {"model": result.cell.model, "temperature": temperature, "seed": seed}
    return {
        "shares": {**facts, "gate": shares.gate.mean().item(), "bytes": marked},
        "kept": kept_in_text(keeper, batch.inputs[0].tolist(), Bytes(), folder),
        "samples": [{**how, "prompt": prompt, "text": text}],
    }
