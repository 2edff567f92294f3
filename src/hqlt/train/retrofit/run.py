"""`hqlt retrofit`: from a converted model to one with a bounded memory, and its folder."""

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
from hqlt.evaluate.probes import probe, probed
from hqlt.language.checkpoint import weight_files
from hqlt.language.folder import find_model, load_model, quiet_transformers, read_config, tokenizer_of
from hqlt.model import HQLTForCausalLM
from hqlt.model.pretrained.retrofit import NO_RULE, config_for, refuse_other_than_full, retrofitted
from hqlt.signals import stop_if_asked
from hqlt.train.language.run import DEFAULT_DATA
from hqlt.train.language.text import prepare_file
from hqlt.train.retrofit.layers import Choice, choose, errors_in, errors_of_window
from hqlt.train.retrofit.settings import RetrofitSettings
from hqlt.train.retrofit.trainer import RetrofitTrainer
from hqlt.train.run import run as run_of


def run(settings: RetrofitSettings, model: Path, folder: Path, device: str | None = None) -> None:
    """Retrofit as the settings say into the folder, resuming from its newest checkpoint if there is one.

    A first Ctrl-C or SIGTERM is obeyed after the update under way. Leaves config.json, layers.json, metrics.jsonl,
    checkpoints/, and at the end model/, results.json, curves.png, README.md and report.html.

    Raises ValueError or OSError, before anything is trained, for what cannot be; and where training diverged.
    """
    from hqlt.report.retrofit import leave_retrofit_report  # now: a package that it misses would be the end of all

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
    choose(settings, config, errors=[0.0] * config.num_hidden_layers)  # refuses what it would refuse later

    def build(console: Console) -> RetrofitTrainer:
        tokens = data_of(settings, model, folder, console)
        teacher = teacher_of(model, place)
        source = digest_of(model)
        choice = chosen(settings, teacher, source, tokens, folder, console)
        return RetrofitTrainer(settings, teacher, source, choice, tokens, folder)

    def finish(trainer: RetrofitTrainer, folder: Path, told: dict[str, Any], console: Console) -> None:
        trainer.refuse_diverged()
        keep(trainer, model, folder)
        told |= {
            "scores": trainer.extra_state["scores"],
            "tokens": trainer.tokens(),
            "updates_skipped": trainer.skipped,
        }
        rows = rows_of(trainer, console)
        if rows:
            title = f"{find_model(model).name} with a bounded memory"
            leave_retrofit_report(folder, rows, told, console, title=title, introduction=trainer.title() + ".")
        else:
            write_atomic(folder / "results.json", json.dumps({"run": told, "rows": []}, indent=1).encode())
        console.print(f"written to {folder / 'model'}", markup=False)

    run_of("retrofit", folder, build, finish)


def teacher_of(model: Path, device: torch.device) -> HQLTForCausalLM:
    """The model in float32: what is trained is so, and it shares the rest."""
    teacher = load_model(model, device)
    nn.Module.float(teacher)
    return teacher


def digest_of(model: Path) -> str:
    """Names a model's weights."""
    whole = hashlib.sha256()
    for path in weight_files(find_model(model)):
        with path.open("rb") as file:
            whole.update(hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()


def data_of(settings: RetrofitSettings, model: Path, folder: Path, console: Console) -> Path:
    """The folder of tokens: the given one, or of a text, made where missing.

    Raises ValueError for tokens of another tokenizer than the model's.
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
            f"by `hqlt data prepare SOURCE FOLDER --tokenizer {name}`"
        )
    return data


def chosen(
    settings: RetrofitSettings, teacher: HQLTForCausalLM, source: str, tokens: Path, folder: Path, console: Console
) -> Choice:
    """Stage 0, or what an earlier start found."""
    files = TokenFiles(tokens, "train")
    windows = Windows(files, settings.distill.length, settings.seed)
    asked = ("window", "sinks", "measure_tokens", "seed", "precision")
    measured = {"source": source, "data": files.digest, "length": windows.length}
    measured |= {name: getattr(settings, name) for name in asked}
    with console.status(f"stage 0: what a window of {settings.window} changes in each layer"):
        errors = errors_in(folder, measured, lambda: errors_of_window(settings, teacher, windows))
    config: Any = teacher.config
    choice = choose(settings, config, errors)
    each = ", ".join(f"{layer}: {100 * error:.0f}%" for layer, error in enumerate(errors))
    console.print(f"stage 0: squared error of each layer's attention with window and sinks alone: {each}", markup=False)
    return choice


def rows_of(trainer: RetrofitTrainer, console: Console) -> list[dict[str, Any]]:
    """Probes on held-out text: of the original, of window and sinks alone in all layers, of the result with and
    without its FW-memories."""
    from hqlt.report.retrofit import ORIGINAL, WINDOW

    if trainer.held_out is None:
        return []
    teacher, settings = trainer.teacher, trainer.settings
    config: Any = teacher.config
    alone = retrofitted(teacher, config_for(config, window=settings.window, sinks=settings.sinks, rule=NO_RULE))
    named = "window + sinks, trained" if settings.rule == NO_RULE else settings.rule
    rows: list[dict[str, Any]] = []
    for name, model in ((ORIGINAL, teacher), (WINDOW, alone), (named, trainer.student)):
        stop_if_asked(trainer.signals)
        with console.status(f"probing {name}"), trainer.autocast():
            if model is trainer.student:
                rows += probed(name, model, trainer.held_out.inputs)
            else:
                rows.append({"name": name, "probe": probe(model, trainer.held_out.inputs)})
    return [row | {"tokens": trainer.tokens()} if row["name"] == named else row for row in rows]


def keep(trainer: RetrofitTrainer, model: Path, folder: Path) -> None:
    """Write the model, its low-rank changes merged, as any other: with tokenizer, chat template, code and card."""
    from hqlt.language.export import save

    if trainer.lora is not None:
        trainer.lora.merge()
        trainer.lora = None
    source = find_model(model)
    (folder / "model").mkdir(exist_ok=True)
    with quiet_transformers():
        save(trainer.student.eval(), tokenizer_of(model, read_config(model).vocab_size), str(source), folder / "model")
