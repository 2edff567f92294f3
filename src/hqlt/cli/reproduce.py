"""`hqlt reproduce`: run a study of the paper, or one of your own, as a grid of cells."""

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
    """Train and score every model of a study with every seed, and compare the results with the paper's.

    "expressivity" (or "table-2") reproduces the paper's table of what each model can compute; "suite" adds other
    tasks; "ablations" varies windows, mixers and convolutions; "language" compares language models;
    "language-ablations" changes one part at a time; "recall" measures recall by window size. At the paper's scale, the
    last three are commands for many GPUs: they are printed with an estimate of the hours, and run if there are GPUs.

    A YAML file runs a study of your own. Cells (one model, experiment and seed) run in parallel processes. A finished
    cell is never run again: the same command resumes a study that was stopped.

    Args:
        what: name of a study, or a YAML file.
        scale: "laptop" runs on two CPU cores; "paper" is the paper's own setting, for a GPU.
        only: one experiment of the study, such as "parity"; for commands for many GPUs, the name of one run.
        folder: folder for all results; default: runs/STUDY-SCALE.
        workers: number of parallel processes, with one thread each; default: the number of cores.
        device: device for training, shared by all workers, such as "cuda"; default: cpu.
        quick: use budgets too small to learn, to check that everything runs.
        export: folder for a copy of the results that are worth committing, such as results/expressivity.
    """
    run_options = {"folder": folder, "workers": workers, "device": device, "export": export}
    if scale == "paper" and what in TABLES:
        if refused := [
            f"--{name}" for name, value in {**run_options, "quick": quick or None}.items() if value is not None
        ]:
            raise SystemExit(
                f"{', '.join(refused)}: expected no option but --only with {what} at the paper's scale, whose commands "
                f"use all GPUs and folders of their own under runs/"
            )
        print_and_run(what, only, Console(highlight=False))
        return
    run_options["device"] = device = device or "cpu"
    usable_device(device)
    name, file = find(what, scale)
    study = read_study(file).only(only)
    study = study.quick() if quick else study
    run_options["folder"] = folder = folder or Path("runs") / (f"{name}-quick" if quick else name)
    options = {"scale": scale, "only": only, **run_options}
    imported = [f"--import={module}" for module in plugin_modules()]
    command = [
        *["hqlt", *imported, "reproduce", what],
        *(f"--{key}={value}" for key, value in options.items() if value is not None),
        *["--quick"] * quick,
    ]
    run_study(
        study,
        folder,
        resume_command=shlex.join(command),
        workers=workers,
        device=device,
        console=Console(),
        quick=quick,
        export=export,
    )


def find(what: str, scale: str) -> tuple[str, Path]:
    """Find a study's file by its name and scale, and return both."""
    if what.endswith((".yaml", ".yml")):
        return Path(what).stem, Path(what)
    studies = known_studies()
    check_choice("what", what, sorted({*ALIASES, *(name.rpartition("-")[0] for name in studies)} - {""}))
    name = f"{ALIASES.get(what, what)}-{scale}"
    if name not in studies:
        raise ValueError(f"scale: expected one that {what} has, got {scale!r}; studies are {', '.join(studies)}")
    return name, studies[name]
