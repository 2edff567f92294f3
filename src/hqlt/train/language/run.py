"""A run from its folder to its report: go on or begin, train, keep, tell."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import math
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from hqlt.data import TokenFiles, prepare
from hqlt.model import HQLTConfig, preset
from hqlt.run_folder import run_folder
from hqlt.signals import stopping
from hqlt.task.task import SPLITS
from hqlt.train.language.cost import flops_per_token, peak_flops
from hqlt.train.language.ranks import Ranks, join
from hqlt.train.language.settings import TrainSettings
from hqlt.train.language.text import prepare_file, sample_of
from hqlt.train.language.trainer import Trainer, Update
from hqlt.train.live import LiveLine, Speed, memory_in_use
from hqlt.train.metrics import Metrics, Trackers

DEFAULT_DATA = "python-library"
PATIENCE = 50
"""Updates in a row with gradients that are not finite, after which training ends."""


def run(settings: TrainSettings, folder: Path | None = None, device: str | None = None) -> None:
    """Train as the settings say into the folder, resuming from its newest checkpoint if there is one.

    SIGTERM and Ctrl-C save after the update under way and end with status 143 or 130. Leaves config.json,
    metrics.jsonl, checkpoints/, and at the end model/, results.json, curves.png, README.md and report.html.

    Raises ValueError or OSError, before anything is trained, for settings, data, a device or a folder that do not
    serve; and where training diverged.
    """
    importlib.import_module("hqlt.report.training")  # now: a package that it misses would be the end of all
    preset(settings.preset, **settings.model)
    data = Path(settings.data).expanduser()
    if settings.data != DEFAULT_DATA and not data.exists():
        raise ValueError(
            f"data: expected a text file, a folder that `hqlt data prepare` wrote, or {DEFAULT_DATA}, found nothing at "
            f"{data.absolute()}"
        )
    folder = folder or Path("runs") / f"{settings.preset}-{data.stem if data.is_file() else data.name}"
    with join(settings, device) as ranks, run_folder(folder, "language") if ranks.first else contextlib.nullcontext():
        console = Console(highlight=False, soft_wrap=True, quiet=not ranks.first)
        tokens = data_of(settings, folder, ranks, console)
        trainer = Trainer(settings, config_of(settings, tokens), tokens, folder, ranks)
        step = trainer.resume() or 0
        told = told_of(settings, trainer)
        if ranks.first:
            (folder / "config.json").write_text(json.dumps(told, indent=1))
        console.print(
            f"{settings.preset}: {trainer.size:,} parameters, {len(trainer.splits['train']):,} tokens, "
            f"{ranks.count} process{'es' * (ranks.count > 1)} on {ranks.device.type} → {folder}"
            + (f", resuming after update {step}" if step else ""),
            markup=False,
        )
        for split in [split for split in SPLITS if split not in trainer.splits]:
            console.print(f"the data hold no {split} text: nothing is scored on it")
        with stopping() as stopped:
            finished = follow(trainer, folder, step, stopped, console)
            if not finished:
                trainer.save()
                trainer.checkpoints.wait()
                console.print(f"stopped and saved after update {trainer.step}; the same command resumes")
                sys.exit(128 + (stopped or [signal.SIGTERM])[0])  # none here: another process got it
        finish(trainer, folder, told, console)


def finish(trainer: Trainer, folder: Path, told: dict[str, Any], console: Console) -> None:
    """Score the trained model, write it into the run's folder, and leave a report with a sample of its text."""
    from hqlt.report.training import leave_training_report

    results = {
        "validation_bits_per_byte": trainer.bits_per_byte("validation"),
        "test_bits_per_byte": trainer.bits_per_byte("test"),
        "updates": trainer.step,
        "updates_left_out": trainer.skipped,
    }
    refuse_diverged(trainer, trainer.loss, results["validation_bits_per_byte"])
    trainer.export(folder / "model")
    if trainer.ranks.first:
        files = trainer.splits.get("validation", trainer.splits["train"])
        sample = sample_of(folder / "model", files, trainer.settings.preset, str(trainer.ranks.device))
        leave_training_report(folder, told, results, sample, console)


def follow(trainer: Trainer, folder: Path, step: int, stopped: list[int], console: Console) -> bool:
    """Train, and tell each update; → False where a signal came between. Raises ValueError once training diverged."""
    skipped_before, in_a_row = trainer.skipped, 0
    with telling(trainer, folder, step, console) as tell:
        for told in trainer.updates():
            tell(told)
            in_a_row = in_a_row + 1 if told.skipped > skipped_before else 0
            skipped_before = told.skipped
            if in_a_row == PATIENCE:
                refuse_diverged(trainer, None, math.nan)
            if any_of(trainer.ranks, stopped) and told.step < trainer.settings.steps:
                return False
    return True


def refuse_diverged(trainer: Trainer, loss: float | None, validation: float | None) -> None:
    """Raises ValueError where all updates were skipped, or the score (the loss, without validation) is not finite."""
    score = loss if validation is None else validation
    if trainer.skipped < trainer.step and (score is None or math.isfinite(score)):
        return
    raise ValueError(
        f"training diverged: {trainer.skipped} of {trainer.step} updates were skipped, because their gradients were "
        f"not finite, and the loss no longer is; give a smaller --learning-rate than "
        f"{trainer.settings.learning_rate:g} or a longer --warmup, and another --folder"
    )


def config_of(settings: TrainSettings, tokens: Path) -> HQLTConfig:
    """The preset with its changes, and with as many tokens as the data's tokenizer has unless a number was given."""
    return preset(settings.preset, **{"vocab_size": TokenFiles(tokens, "train").vocab_size, **settings.model})


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
    words = [f"loss {told.loss:.3f} nats/token", f"{speed:,.0f} tokens/s"]
    if share is not None:
        words.append(f"{100 * share:.0f}% of peak")
    words += [f"gradient {told.gradient_norm:.2f}", f"{memory / 2**20:,.0f} MiB"]
    if told.skipped:
        words.insert(1, f"{told.skipped} updates skipped")
    return words


def news_of(told: Update) -> str | None:
    return None if told.validation is None else f"validation {told.validation:.4f} bits/byte"


def any_of(ranks: Ranks, stopped: list[int]) -> bool:
    """Whether a signal reached any process."""
    return ranks.sum([float(bool(stopped))])[0] > 0


def data_of(settings: TrainSettings, folder: Path, ranks: Ranks, console: Console) -> Path:
    """The folder of tokens. Those of a file and of the default are made where missing, by the first process."""
    data = Path(settings.data).expanduser()
    if settings.data == DEFAULT_DATA:
        tokens = Path("runs/data") / f"{DEFAULT_DATA}-bytes"
    elif data.is_dir():
        return data
    else:
        tokens = folder / "data"
    if ranks.first:
        with console.status(f"preparing {settings.data}"):
            prepare(DEFAULT_DATA, tokens) if settings.data == DEFAULT_DATA else prepare_file(data, folder)
    ranks.wait()
    return tokens


def told_of(settings: TrainSettings, trainer: Trainer) -> dict[str, Any]:
    """What made this run, as JSON."""
    import torch

    from hqlt._version import version

    files = trainer.splits["train"]
    return {
        "command": shlex.join(["hqlt", *sys.argv[1:]]),
        "settings": dataclasses.asdict(settings),
        "model": trainer.config.to_diff_dict(),
        "parameters": trainer.size,
        "data": {"folder": str(files.folder), "digest": files.digest, "bytes_per_token": files.bytes / len(files)},
        "processes": trainer.ranks.count,
        "device": torch.cuda.get_device_name() if trainer.ranks.device.type == "cuda" else "cpu",
        "hqlt": version,
        "torch": torch.__version__,
    }
