"""One run of `hqlt retrofit`: from a converted model to a folder with a retrofitted one."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from hqlt.data import TokenFiles, Windows, load_tokenizer, prepare
from hqlt.device import usable_device
from hqlt.disk import write_atomic
from hqlt.errors import require
from hqlt.evaluate.probes import probe, probe_rows
from hqlt.language.checkpoint import weight_files
from hqlt.language.folder import find_model, load_model, quiet_transformers, read_config, tokenizer_of
from hqlt.model import HQLTForCausalLM
from hqlt.model.pretrained.retrofit import NO_RULE, config_for, refuse_other_than_full, retrofitted
from hqlt.signals import stop_if_asked
from hqlt.train.language.run import DEFAULT_DATA
from hqlt.train.language.text import prepare_file
from hqlt.train.retrofit.layers import (
    LayerChoice,
    choose_layers,
    costs_of_window,
    load_or_measure_costs,
    needs_costs,
)
from hqlt.train.retrofit.settings import RetrofitSettings
from hqlt.train.retrofit.trainer import RetrofitTrainer
from hqlt.train.run import run as run_of


def run(settings: RetrofitSettings, model: Path, folder: Path, device: str | None = None, wandb: bool = False) -> None:
    """Retrofit a model, resuming from the newest checkpoint in the folder if there is one.

    Writes config.json, layers.json, metrics.jsonl and checkpoints/, and at the end model/, results.json, curves.png,
    README.md and report.html. On Ctrl-C or SIGTERM, the run stops after the current update and saves a checkpoint.

    Args:
        settings: what to build and how to train it.
        model: folder of the original model.
        folder: output folder.
        device: device to train on. Default: cuda if available.
        wandb: whether to report to Weights & Biases.

    Raises:
        ValueError: before training, for invalid settings, model or data; and when training diverges.
        OSError: when a file cannot be read or written.
    """
    from hqlt.report.retrofit import write_retrofit_report  # imported first, so that a missing package is found now

    config, place = read_config(model), usable_device(device)
    refuse_other_than_full(config)
    if settings.lora_rank and (settings.distill.tokens or settings.tune.tokens):
        require("peft")
    data = Path(settings.data).expanduser()
    if settings.data != DEFAULT_DATA and not data.exists():
        raise ValueError(
            f"data: expected a text file, a folder that `hqlt data prepare` wrote, or {DEFAULT_DATA}, found nothing at "
            f"{data.absolute()}"
        )
    choose_layers(settings, config, costs=[0.0] * config.num_hidden_layers)  # raises errors before any work

    def build(console: Console) -> RetrofitTrainer:
        tokens = data_of(settings, model, folder, console)
        teacher = teacher_of(model, place)
        source = digest_of(model)
        choice = run_stage_0(settings, teacher, source, tokens, folder, console)
        return RetrofitTrainer(settings, teacher, source, choice, tokens, folder)

    def finish(trainer: RetrofitTrainer, folder: Path, run_info: dict[str, Any], console: Console) -> None:
        trainer.refuse_diverged()
        save_model(trainer, model, folder)
        run_info |= {
            "scores": trainer.extra_state["scores"],
            "tokens": trainer.tokens(),
            "updates_skipped": trainer.skipped,
        }
        rows = rows_of(trainer, console)
        if rows:
            title = f"{find_model(model).name} with a bounded memory"
            write_retrofit_report(folder, rows, run_info, console, title=title, introduction=trainer.title() + ".")
        else:
            write_atomic(folder / "results.json", json.dumps({"run": run_info, "rows": []}, indent=1).encode())
        console.print(f"saved to {folder / 'model'}", markup=False)

    run_of("retrofit", folder, build, finish, wandb=wandb)


def teacher_of(model: Path, device: torch.device) -> HQLTForCausalLM:
    """Load the original model in float32, because the student shares its tensors."""
    teacher = load_model(model, device)
    nn.Module.float(teacher)
    return teacher


def digest_of(model: Path) -> str:
    """SHA-256 of a model's weight files."""
    whole = hashlib.sha256()
    for path in weight_files(find_model(model)):
        with path.open("rb") as file:
            whole.update(hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()


def data_of(settings: RetrofitSettings, model: Path, folder: Path, console: Console) -> Path:
    """The folder of tokens: the given one, or one prepared from a text.

    Raises:
        ValueError: when the tokens are those of another tokenizer than the model's.
    """
    tokenizer = tokenizer_of(model, read_config(model).vocab_size)
    name = tokenizer.name if tokenizer.name == "bytes" else find_model(model)
    data = Path(settings.data).expanduser()
    if not data.is_dir():
        with console.status(f"preparing {settings.data}"):
            if settings.data == DEFAULT_DATA:
                prepare(DEFAULT_DATA, folder / "data", tokenizer=name)
            else:
                prepare_file(data, folder, name)
        return folder / "data"
    found, expected = TokenFiles(data, "train").manifest.tokenizer, load_tokenizer(name)
    if found["digest"] != expected.digest:
        raise ValueError(
            f"data: expected tokens of the model's own tokenizer, got those of {found['name']} in {data}; prepare them "
            f"with `hqlt data prepare SOURCE FOLDER --tokenizer {name}`"
        )
    return data


def run_stage_0(
    settings: RetrofitSettings, teacher: HQLTForCausalLM, source: str, tokens: Path, folder: Path, console: Console
) -> LayerChoice:
    """Choose the full layers; measure what the window costs in each layer if that decides, and is not known yet."""
    config: Any = teacher.config
    if not needs_costs(settings, config.num_hidden_layers):
        return choose_layers(settings, config, [])
    files = TokenFiles(tokens, "train")
    windows = Windows(files, settings.distill.length, settings.seed)
    relevant = ("window", "sinks", "measure_tokens", "seed", "precision", "full_choice")
    conditions = {"source": source, "data": files.digest, "length": windows.length}
    conditions |= {name: getattr(settings, name) for name in relevant}
    with console.status(f"stage 0: measuring what a window of {settings.window} costs in each layer"):
        costs = load_or_measure_costs(folder, conditions, lambda: costs_of_window(settings, teacher, windows))
    unit = "nats of recall" if settings.full_choice == "recall" else "relative squared error"
    each = ", ".join(f"{layer}: {cost:.2f}" for layer, cost in enumerate(costs))
    console.print(f"stage 0: cost of window and sinks in each layer, {unit}: {each}", markup=False)
    return choose_layers(settings, config, costs)


def rows_of(trainer: RetrofitTrainer, console: Console) -> list[dict[str, Any]]:
    """Probe results on held-out text: the original, window and sinks only in all layers, and the retrofitted model with
    and without its FW-memories."""
    from hqlt.report.retrofit import ORIGINAL, WINDOW

    if trainer.held_out is None:
        return []
    teacher, settings = trainer.teacher, trainer.settings
    config: Any = teacher.config
    windowed = retrofitted(teacher, config_for(config, window=settings.window, sinks=settings.sinks, rule=NO_RULE))
    label = "window + sinks, trained" if settings.rule == NO_RULE else settings.rule
    rows: list[dict[str, Any]] = []
    for name, model in ((ORIGINAL, teacher), (WINDOW, windowed), (label, trainer.student)):
        stop_if_asked(trainer.signals)
        with console.status(f"probing {name}"), trainer.autocast():
            if model is trainer.student:
                rows += probe_rows(name, model, trainer.held_out.inputs)
            else:
                rows.append({"name": name, "probe": probe(model, trainer.held_out.inputs)})
    return [row | {"tokens": trainer.tokens()} if row["name"] == label else row for row in rows]


def save_model(trainer: RetrofitTrainer, model: Path, folder: Path) -> None:
    """Merge the LoRA weights and save the model with tokenizer, chat template, code and card."""
    from hqlt.language.export import save

    if trainer.lora is not None:
        trainer.lora.merge()
        trainer.lora = None
    source = find_model(model)
    (folder / "model").mkdir(exist_ok=True)
    with quiet_transformers():
        save(trainer.student.eval(), tokenizer_of(model, read_config(model).vocab_size), str(source), folder / "model")
