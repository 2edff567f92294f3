"""The run of `hqlt train`: from settings to report."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from rich.console import Console

from hqlt.data import TokenFiles, prepare
from hqlt.model import HQLTConfig, preset
from hqlt.task.task import SPLITS
from hqlt.train.language.ranks import Ranks, join
from hqlt.train.language.settings import TrainSettings
from hqlt.train.language.text import prepare_file, sample_of
from hqlt.train.language.trainer import LanguageTrainer
from hqlt.train.run import run as run_of

DEFAULT_DATA = "python-library"


def run(settings: TrainSettings, folder: Path | None = None, device: str | None = None, wandb: bool = False) -> None:
    """Train in the folder, resuming from its newest checkpoint if there is one.

    The first Ctrl-C or SIGTERM takes effect after the current update. Writes config.json, metrics.jsonl, checkpoints/,
    and at the end model/, results.json, curves.png, README.md and report.html.

    Raises ValueError or OSError for invalid settings, data, device or folder before training starts, and ValueError if
    training diverged.
    """
    importlib.import_module("hqlt.report.training")  # fail now, not after training, if a package is missing
    preset(settings.preset, **settings.model)
    data = Path(settings.data).expanduser()
    if settings.data != DEFAULT_DATA and not data.exists():
        raise ValueError(
            f"data: expected a text file, a folder written by `hqlt data prepare`, or {DEFAULT_DATA}, found nothing at "
            f"{data.absolute()}"
        )
    place = folder or Path("runs") / f"{settings.preset}-{data.stem if data.is_file() else data.name}"
    with join(settings, device) as ranks:

        def build(console: Console) -> LanguageTrainer:
            tokens = data_of(settings, place, ranks, console)
            trainer = LanguageTrainer(settings, config_of(settings, tokens), tokens, place, ranks)
            for split in [split for split in SPLITS if split not in trainer.splits]:
                console.print(f"the data has no {split} split; skipping its evaluation")
            return trainer

        run_of("language", place, build, finish, first=ranks.first, wandb=wandb)


def finish(trainer: LanguageTrainer, folder: Path, info: dict[str, Any], console: Console) -> None:
    """Evaluate the trained model, export it to the run's folder, and write a report with a sample of its text."""
    from hqlt.language.folder import load_model
    from hqlt.report.kept_page import SHOWN, kept_in_text
    from hqlt.report.training import write_training_report

    scores = {}
    for split in ("validation", "test"):
        trainer.stop_if_asked()
        scores[f"{split}_bits_per_byte"] = trainer.bits_per_byte(split)
    results = {**scores, "updates": trainer.step, "updates_left_out": trainer.skipped}
    trainer.refuse_diverged(trainer.loss, scores["validation_bits_per_byte"])
    trainer.stop_if_asked()
    trainer.export(folder / "model")
    trainer.stop_if_asked()
    if trainer.ranks.first:
        files = trainer.splits.get("validation", trainer.splits["train"])
        model = load_model(folder / "model", str(trainer.device))
        sample = sample_of(model, files, trainer.settings.preset)
        kept = kept_in_text(model, files.read(0, min(SHOWN, len(files)))[0].tolist(), files.tokenizer, folder)
        write_training_report(folder, info, results, sample, console, kept)


def config_of(settings: TrainSettings, tokens: Path) -> HQLTConfig:
    """The config of the preset with its overrides; the default vocabulary size is that of the data's tokenizer."""
    return preset(settings.preset, **{"vocab_size": TokenFiles(tokens, "train").vocab_size, **settings.model})


def data_of(settings: TrainSettings, folder: Path, ranks: Ranks, console: Console) -> Path:
    """The data folder. For a text file and for the default data, the first process prepares it if necessary."""
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
