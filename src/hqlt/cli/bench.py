"""`hqlt bench`: speed compared with other implementations, as a table and as JSON."""

from __future__ import annotations

import importlib
import json as json_format
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console

from hqlt import native
from hqlt.bench.race import table_of
from hqlt.disk import check_writable, write_atomic
from hqlt.registry import check_choice

CAPTION = "float32; ×: speedup over the first row; %: share of the measured ceiling"


def bench(
    what: Literal["ops", "layer", "step", "train", "gpu", "worlds", "threads", "serve", "decode"],
    threads: int = 2,
    rounds: int = 7,
    only: str | None = None,
    json: Path | None = None,
    quick: bool = False,
) -> None:
    """Benchmark this package against other implementations on this machine, and print a table.

    Results are compared for equality before anything is timed. Contestants take turns, and times are medians. The table
    also shows the peak memory, and the share of the machine's measured ceiling that each reaches by its count of
    operations (or bytes).

    Args:
        what: On the CPU: "ops", single operations; "layer", one layer; "step", one token; "train", one training step;
            "decode", one token after a long context. "gpu": the core of a synchronous layer, and a training step of
            hqlt-340m, on a GPU. "worlds": steps of the partially observable environments, in one thread. "threads": a
            training step on an idle and on a busy machine, by OpenMP wait policy. "serve": latency and throughput of
            `hqlt serve`, and memory of idle sessions.
        threads: Number of threads of PyTorch and of the native kernels.
        rounds: Number of measurements of each contestant.
        only: Run one part of the benchmark, such as "delta" of ops, "synchronous" of step, or "VisualMatch" of worlds.
        json: File for the results; runs/bench/WHAT.json by default.
        quick: Use tiny sizes, to check that everything runs. The times are meaningless.
    """
    module = importlib.import_module(f"hqlt.bench.{what}")
    file = json or Path("runs/bench") / f"{what}.json"
    check_options(module.ONLY, threads, rounds, only)
    check_writable(file)
    setting = module.setting() if hasattr(module, "setting") else setting_of_cpu(threads)
    setting |= getattr(module, "SETTING", {})
    before = torch.get_num_threads()
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    try:
        results = module.run(rounds, quick, only)
    finally:
        torch.set_num_threads(before)
    title = f"hqlt bench {what}: " + ", ".join(f"{name} {value}" for name, value in setting.items())
    console = Console()
    if not console.is_terminal:  # rich does not know the width of a log
        console.width = 160
    console.print(table_of(title, results, getattr(module, "CAPTION", CAPTION)))
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, (json_format.dumps({"setting": setting, "results": results}, indent=1) + "\n").encode())


def check_options(parts: Sequence[str], threads: int, rounds: int, only: str | None) -> None:
    """Check the options of a benchmark.

    Raises:
        ValueError: If an option is out of range.
    """
    cores = max(os.cpu_count() or 1, 2)
    if not 1 <= threads <= cores:
        raise ValueError(f"threads: expected 1 to {cores}, got {threads}")
    if rounds < 1:
        raise ValueError(f"rounds: expected at least 1, got {rounds}")
    if only is not None:
        check_choice("only", only, parts)


def setting_of_cpu(threads: int) -> dict[str, Any]:
    """The machine and versions that the results hold for."""
    return {
        "processor": platform.processor() or platform.machine(),
        "threads": threads,
        "clock": "the processor's" if threads == 1 else "the wall's",
        "torch": torch.__version__,
        "instruction set": native.instruction_set(),
    }
