"""A run from its folder to its report: go on or begin, train, keep, tell."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from hqlt.data import prepare
from hqlt.model import HQLTConfig, preset
from hqlt.run_folder import run_folder
from hqlt.signals import stopping
from hqlt.task.task import SPLITS
from hqlt.train.language.cost import flops_per_token, peak_flops
from hqlt.train.language.ranks import Ranks, join
from hqlt.train.language.settings import TrainSettings
from hqlt.train.language.trainer import Trainer, Update
from hqlt.train.live import LiveLine, Speed, memory_in_use
from hqlt.train.metrics import Metrics, Trackers

DEFAULT_DATA = "python-library"


def run(settings: TrainSettings, folder: Path | None = None, device: str | None = None) -> None:
    """Train as the settings say into the folder, going on from its newest checkpoint if there is one.

    SIGTERM and Ctrl-C save after the update under way and end with status 143 or 130. Leaves config.json,
    metrics.jsonl, checkpoints/, and at the end model/, results.json, curves.png, README.md and report.html.
    """
    from hqlt.report.training import leave_training_report  # now: a package that it misses would be the end of all

    config = preset(settings.preset, **settings.model)
    folder = folder or Path("runs") / f"{settings.preset}-{Path(settings.data).name}"
    with join(settings, device) as ranks, run_folder(folder, "language") if ranks.first else contextlib.nullcontext():
        console = Console(highlight=False, soft_wrap=True, quiet=not ranks.first)
        trainer = Trainer(settings, config, data_of(settings, ranks, console), folder, ranks)
        step = trainer.resume() or 0
        if ranks.first:
            (folder / "config.json").write_text(json.dumps(told_of(settings, config, trainer), indent=1))
        console.print(
            f"{settings.preset}: {trainer.size:,} parameters, {len(trainer.splits['train']):,} tokens, "
            f"{ranks.count} process{'es' * (ranks.count > 1)} on {ranks.device.type} → {folder}"
            + (f", going on after update {step}" if step else "")
        )
        for split in [split for split in SPLITS if split not in trainer.splits]:
            console.print(f"the data hold no {split} text: nothing is scored on it")
        with stopping() as stopped:
            finished = follow(trainer, folder, step, stopped, console)
            if not finished:
                trainer.save()
                trainer.checkpoints.wait()
                console.print(f"stopped and saved after update {trainer.step}; the same command goes on")
                sys.exit(128 + stopped[0])
        trainer.export(folder / "model")
        results = {
            "validation_bits_per_byte": trainer.bits_per_byte("validation"),
            "test_bits_per_byte": trainer.bits_per_byte("test"),
            "updates": trainer.step,
            "updates_left_out": trainer.skipped,
        }
        if ranks.first:
            leave_training_report(folder, told_of(settings, config, trainer), results, console)


def follow(trainer: Trainer, folder: Path, step: int, stopped: list[int], console: Console) -> bool:
    """Train, and tell each update; → False where a signal came between."""
    with telling(trainer, folder, step, console) as tell:
        for told in trainer.updates():
            tell(told)
            if any_of(trainer.ranks, stopped) and told.step < trainer.settings.steps:
                return False
    return True


@contextlib.contextmanager
def telling(trainer: Trainer, folder: Path, step: int, console: Console) -> Iterator[Callable[[Update], None]]:
    """What the first process does with each update: the live line, metrics.jsonl, trackers. The others keep silent."""
    if not trainer.ranks.first:
        yield lambda told: None
        return
    settings = trainer.settings
    peak = peak_flops(trainer.ranks.device)
    flops = flops_per_token(trainer.config, settings.length)
    metrics = Metrics(folder / "metrics.jsonl", step)
    trackers = Trackers(folder, dataclasses.asdict(settings), step)
    begun = time.monotonic()
    speed_of = Speed()
    with LiveLine(console, settings.steps, step) as line:

        def tell(told: Update) -> None:
            speed = speed_of.at(told.tokens)
            share = speed * flops / (peak * trainer.ranks.count) if peak else None
            line.show(told.step, words_of(told, speed, share, memory_in_use(trainer.ranks.device)), news_of(told))
            metrics.write(told._asdict())
            trackers.write(told._asdict() | {"tokens_per_second": speed})

        try:
            yield tell
        finally:
            metrics.close()
            trackers.close()
    console.print(f"{time.monotonic() - begun:.0f} s in this start")


def words_of(told: Update, speed: float, share: float | None, memory: int) -> list[str]:
    """Loss, speed, share of the processors' peak, gradient, memory."""
    words = [f"loss {told.loss:.3f}", f"{speed:,.0f} tokens/s"]
    if share is not None:
        words.append(f"{100 * share:.0f}% of peak")
    words += [f"gradient {told.gradient_norm:.2f}", f"{memory / 2**20:,.0f} MiB"]
    if told.skipped:
        words.append(f"{told.skipped} updates left out")
    return words


def news_of(told: Update) -> str | None:
    return None if told.validation is None else f"validation {told.validation:.4f} bits/byte"


def any_of(ranks: Ranks, stopped: list[int]) -> bool:
    """Whether a signal reached any process."""
    return ranks.sum([float(bool(stopped))])[0] > 0


def data_of(settings: TrainSettings, ranks: Ranks, console: Console) -> Path:
    """The folder of tokens. The default is made where it is missing, by the first process."""
    if settings.data != DEFAULT_DATA:
        return Path(settings.data)
    folder = Path("runs/data") / f"{DEFAULT_DATA}-bytes"
    if ranks.first:
        with console.status("preparing the standard library's source"):
            prepare(DEFAULT_DATA, folder)
    ranks.wait()
    return folder


def told_of(settings: TrainSettings, config: HQLTConfig, trainer: Trainer) -> dict[str, Any]:
    """What made this run, as JSON."""
    import torch

    from hqlt._version import version

    files = trainer.splits["train"]
    return {
        "command": shlex.join(["hqlt", *sys.argv[1:]]),
        "settings": dataclasses.asdict(settings),
        "model": config.to_diff_dict(),
        "parameters": trainer.size,
        "data": {"folder": str(files.folder), "digest": files.digest, "bytes_per_token": files.bytes / len(files)},
        "processes": trainer.ranks.count,
        "device": torch.cuda.get_device_name() if trainer.ranks.device.type == "cuda" else "cpu",
        "hqlt": version,
        "torch": torch.__version__,
    }
