"""The stages of benchmarks/gpu.sh: python -m hqlt.bench.gpu_stages STAGE FOLDER [--rehearse] [--rounds=7]

Each stage runs in its own process and writes FOLDER/STAGE.json, so that a stage that fails does not affect the others.

A rehearsal runs the same code without a GPU: interpreted kernels (TRITON_INTERPRET=1), tiny sizes, float32. It measures
nothing: all times and rates in its results are null, and its files are named rehearsal-STAGE.json.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from hqlt import native
from hqlt.bench import gpu
from hqlt.bench.gpu import CAPTION, GPU, Target
from hqlt.bench.race import Meter, table_of

Answer = dict[str, Any]
NO_CLOCK = Meter(lambda work: (work(), math.nan)[1], lambda work: (work(), math.nan)[1])
REHEARSAL = Target("cpu", torch.float32, NO_CLOCK)
PACKAGES = ("triton", "fla-core", "flash-attn", "transformers", "numpy", "jsonargparse")


def setting() -> Answer:
    """The machine and versions that all results hold for."""
    here: Answer = {"python": platform.python_version(), "machine": platform.machine(), "processors": os.cpu_count()}
    here["torch"] = torch.__version__  # includes the build, unlike the package's metadata
    installed = {found.name: found.version for found in importlib.metadata.distributions()}
    here |= {name: installed.get(name) for name in PACKAGES}
    here["native library"] = native.why_not() or "built"
    if importlib.util.find_spec("triton"):
        from hqlt.bench.gpu_kernels import assembler

        here["assembler"] = assembler()
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        here |= {"GPU": card.name, "compute capability": f"{card.major}.{card.minor}", "CUDA": torch.version.cuda}
        here |= {"multiprocessors": card.multi_processor_count, "memory GB": round(card.total_memory / 1e9, 1)}
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
            here["driver"] = done.stdout.strip()
    return here


def right(target: Target, folder: Path, rounds: int) -> Answer:
    """Compare the kernels with the reference in every dtype. Results of a second assembler are added to the first's."""
    from hqlt.bench import gpu_kernels

    before = folder / file_of("right", target)
    assembled = json.loads(before.read_text())["by assembler"] if before.exists() else {}
    return {"by assembler": assembled | {gpu_kernels.assembler(): gpu_kernels.check(target)}}


def memcheck(target: Target, folder: Path, rounds: int) -> Answer:
    """One small call per dtype, to be run under compute-sanitizer."""
    from hqlt.bench.gpu_kernels import SHAPES, TINY, compare

    shape, dtypes = (SHAPES[1], (torch.bfloat16, torch.float32)) if target is GPU else (TINY, (torch.float32,))
    return {str(dtype): compare(shape, dtype, target.device, repeats=0) for dtype in dtypes}


def warm_peer(target: Target, folder: Path, rounds: int) -> Answer:
    """Compile fla's many autotuning variants, in the background, before the race."""
    leaves = gpu.inputs(*(gpu.SHAPE if target is GPU else (1, 64, 1, 16)), dtype=target.dtype, device=target.device)
    begun = time.monotonic()
    gpu.one_by_one(*leaves, attention=lambda q, k, v: v).float().sum().backward()
    return {"seconds": time.monotonic() - begun}


def sweep(target: Target, folder: Path, rounds: int) -> Answer:
    """Check and time launch options of each kernel: warps, stages and blocks."""
    from hqlt.bench.gpu_kernels import Shape, sweep

    shape = Shape(*gpu.SHAPE, 128) if target is GPU else Shape(1, 33, 1, 4, 20, window=3)
    return {"results": sweep(target, shape, rounds, quick=target is not GPU)}


def demo(target: Target, folder: Path, rounds: int) -> Answer:
    """Train the models of `hqlt demo` on the card; report their scores and times."""
    from hqlt.study import known_studies, read_study
    from hqlt.train.grid import as_json, run_grid

    study = read_study(known_studies()["demo"])
    if target is not GPU:
        study = study.only("parity").quick()
    with tempfile.TemporaryDirectory() as scratch:
        workers = min(os.cpu_count() or 1, 8)
        results = run_grid(study.cells(), Path(scratch), workers, lambda event: None, target.device)
    kept = ("cell", "parameters", "test", *(["seconds"] if target is GPU else []))
    return {"results": [{name: as_json(result)[name] for name in kept} for result in results]}


STAGES: dict[str, Callable[[Target, Path, int], Answer]] = {
    "card": lambda target, folder, rounds: gpu.rates(target),
    "right": right,
    "memcheck": memcheck,
    "warm_peer": warm_peer,
    "race": lambda target, folder, rounds: {"results": gpu.run(rounds, target is not GPU, "memories", target)},
    "train": lambda target, folder, rounds: {"results": gpu.run(rounds, target is not GPU, "train", target)},
    "sweep": sweep,
    "demo": demo,
}
LOG_ONLY = ("memcheck", "warm_peer")
"""Stages whose results are only logged."""


def file_of(stage: str, target: Target) -> str:
    """The name of a stage's results file."""
    return f"{'' if target is GPU else 'rehearsal-'}{stage}.json"


def without_nan(x: Any) -> Any:
    """x with non-finite numbers replaced by None, because JSON has none."""
    if isinstance(x, dict):
        return {name: without_nan(value) for name, value in x.items()}
    if isinstance(x, list | tuple):
        return [without_nan(value) for value in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("folder", type=Path, help="folder for STAGE.json")
    parser.add_argument("--rehearse", action="store_true", help="run without a GPU: tiny, interpreted, not timed")
    parser.add_argument("--rounds", type=int, default=7, help="number of measurements of each contestant")
    options = parser.parse_args(arguments)
    target = REHEARSAL if options.rehearse else GPU
    if target is GPU and not torch.cuda.is_available():
        raise SystemExit(
            f"{options.stage}: no GPU: expected one that torch {torch.__version__} can use; or pass --rehearse"
        )
    if options.rehearse and os.environ.get("TRITON_INTERPRET") != "1":
        raise SystemExit("--rehearse: expected TRITON_INTERPRET=1 in the environment, to run the kernels on a CPU")
    torch.manual_seed(0)
    answer: Answer = {"setting": setting()}
    if options.rehearse:
        answer["rehearsal"] = "no GPU: tiny, interpreted, not timed; a check of the scripts, not a measurement"
    answer |= STAGES[options.stage](target, options.folder, 1 if options.rehearse else options.rounds)
    if options.stage in LOG_ONLY:
        print(json.dumps(without_nan(answer), default=str))
        return
    options.folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(without_nan(answer), indent=1, ensure_ascii=False, default=str)
    (options.folder / file_of(options.stage, target)).write_text(text + "\n")
    if options.stage in ("race", "train"):
        title = f"{options.stage}, {answer['setting'].get('GPU', 'REHEARSAL: no GPU, nothing was measured')}"
        Console(width=160).print(table_of(title, answer["results"], CAPTION))


if __name__ == "__main__":
    main()
