"""`hqlt reproduce`: a study of the paper, or one of your own, as a grid of cells."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Literal

from rich.console import Console

from hqlt.device import usable_device
from hqlt.registry import check_choice, plugin_modules
from hqlt.study import known_studies, read_study
from hqlt.study.commands import TABLES, print_and_run
from hqlt.study.run import run_study

ALIASES = {"table-2": "expressivity"}


def reproduce(
    what: str,
    scale: Literal["laptop", "paper"] = "laptop",
    only: str | None = None,
    folder: Path | None = None,
    workers: int | None = None,
    device: str | None = None,
    quick: bool = False,
    export: Path | None = None,
) -> None:
    """Train and score every model of a study with every seed, and print ours beside the paper's.

    "expressivity" (or "table-2") is the paper's table of what each model can compute; "suite" has the other tasks,
    "ablations" windows, mixers and convolutions. "language" is the table of language models,
    "language-ablations" changes one part at a time, "recall" asks for facts by window size; at the paper's scale these
    three are commands for many GPUs, printed with an estimate of the hours, and run where there are GPUs.
    Or give a YAML file of your own. Cells run in parallel processes. A finished cell is never run again: the same
    command resumes where an earlier one was stopped.

    Args:
        what: the study's name, or a YAML file.
        scale: "laptop" shows who solves what on two cores; "paper" is the paper's own setting, for a GPU.
        only: one experiment of the study, such as "parity"; of commands for many GPUs, one run's name.
        folder: where everything goes; runs/STUDY-SCALE by default.
        workers: processes side by side, one thread each; all cores by default.
        device: where models are trained, such as "cuda"; all workers share it. cpu by default.
        quick: budgets too small to learn, to see that everything runs.
        export: a folder for what is worth committing, such as results/expressivity.
    """
    given = {"folder": folder, "workers": workers, "device": device, "export": export}
    if scale == "paper" and what in TABLES:
        if refused := [f"--{name}" for name, value in {**given, "quick": quick or None}.items() if value is not None]:
            raise SystemExit(
                f"{', '.join(refused)}: expected at most --only with {what} at the paper's scale, which is commands "
                f"for all GPUs with folders of their own under runs/"
            )
        print_and_run(what, only, Console(highlight=False))
        return
    given["device"] = device = device or "cpu"
    usable_device(device)
    name, file = find(what, scale)
    study = read_study(file).only(only)
    study = study.quick() if quick else study
    given["folder"] = folder = folder or Path("runs") / (f"{name}-quick" if quick else name)
    options = {"scale": scale, "only": only, **given}
    imported = [f"--import={module}" for module in plugin_modules()]
    again = [
        "hqlt",
        *imported,
        "reproduce",
        what,
        *(f"--{key}={value}" for key, value in options.items() if value is not None),
    ]
    resume = shlex.join([*again, *["--quick"] * quick])
    run_study(
        study, folder, again=resume, workers=workers, device=device, console=Console(), quick=quick, export=export
    )


def find(what: str, scale: str) -> tuple[str, Path]:
    """A study's name and its file."""
    if what.endswith((".yaml", ".yml")):
        return Path(what).stem, Path(what)
    studies = known_studies()
    check_choice("what", what, sorted({*ALIASES, *(name.rpartition("-")[0] for name in studies)} - {""}))
    name = f"{ALIASES.get(what, what)}-{scale}"
    if name not in studies:
        raise ValueError(f"scale: expected one that {what} has, got {scale!r}; there are {', '.join(studies)}")
    return name, studies[name]
