"""A run from its folder to its report: go on or begin, train, keep, tell."""

from __future__ import annotations

import dataclasses
import json
import platform
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from hqlt._version import version
from hqlt.agent.collect import Stopped
from hqlt.disk import write_whole
from hqlt.errors import reason
from hqlt.run_folder import COMMANDS, kind_of, run_folder
from hqlt.signals import stopping
from hqlt.train.agent.checkpoints import AgentCheckpoints
from hqlt.train.agent.settings import AgentSettings
from hqlt.train.agent.trainer import AgentTrainer, Update
from hqlt.train.live import LiveLine, Speed
from hqlt.train.metrics import Metrics, Trackers

WEIGHTS = "agent.safetensors"
LOSSES = ("loss", "policy", "value", "critic", "actor", "temperature", "gradient")
"""Of either algorithm, as metrics.jsonl names them."""


def run(settings: AgentSettings, folder: Path | None = None, device: str = "cpu") -> None:
    """Train as the settings say into the folder, going on from its newest checkpoint if there is one.

    Ctrl-C and SIGTERM end with status 130 or 143 before the next step of an environment, and with a checkpoint where
    training can go on from there exactly; a second one ends at once. Leaves config.json, metrics.jsonl, checkpoints/,
    and at the end agent.safetensors (the best weights), results.json, curves.png, the film of an episode, README.md and
    report.html. A loss that was no finite number at the end is reported with status 1.
    """
    from hqlt.report.agent import leave_agent_report  # now: a package that it misses would be the end of all

    folder = folder or Path("runs") / f"{settings.world.replace('/', '-')}-{settings.memory}"
    console = Console(highlight=False, soft_wrap=True)
    trainer = AgentTrainer(settings, device)  # before the folder is made: it refuses what cannot be trained
    with run_folder(folder, "agent"):
        checkpoints = AgentCheckpoints(folder / "checkpoints", settings.keep)
        resumed = checkpoints.resume(trainer)
        told = told_of(trainer, device)
        write_whole(folder / "config.json", json.dumps(told, indent=1).encode())
        console.print(
            f"{settings.algorithm.upper()} in {settings.copies} × {settings.world}, {settings.memory} memory, "
            f"{trainer.size:,} parameters → {folder}" + (f", going on after step {trainer.steps:,}" if resumed else "")
        )
        with stopping() as trainer.stopped:
            try:
                follow(trainer, checkpoints, folder, console)
                tested = trainer.test()
                keep_agent(trainer, folder, told)
                leave_agent_report(trainer, tested, folder, told, console)
            except Stopped:
                newest = checkpoints.newest()
                console.print(f"stopped; the same command goes on from {newest.name if newest else 'the beginning'}")
                sys.exit(128 + trainer.stopped[0])
        refuse_divergence(trainer, folder)


def follow(trainer: AgentTrainer, checkpoints: AgentCheckpoints, folder: Path, console: Console) -> None:
    """Train, report each update, save the trainer at each evaluation, and where Stopped is raised if it can resume."""
    settings, begun, speed = trainer.settings, time.monotonic(), Speed()
    reported = trainer.steps - (trainer.unscored is not None)  # its line comes with the evaluation that is due
    metrics = Metrics(folder / "metrics.jsonl", reported)
    trackers = Trackers(folder, dataclasses.asdict(settings), trainer.steps)
    try:
        with LiveLine(console, settings.steps, trainer.steps) as line:
            for told in trainer.updates():
                metrics.write(told.as_line())
                trackers.write(told.as_line())
                line.show(told.step, words_of(told, speed.at(told.step)), news_of(told))
                if told.evaluated_return is not None:
                    checkpoints.save(trainer)
    except Stopped:
        if trainer.resumable:
            checkpoints.save(trainer)
        raise
    finally:
        metrics.close()
        trackers.close()
    console.print(f"{time.monotonic() - begun:.0f} s in this start")


def refuse_divergence(trainer: AgentTrainer, folder: Path) -> None:
    """Raises ValueError where the last line of metrics.jsonl that has losses has one that was no finite number."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last: dict[str, Any] = next((line for line in reversed(lines) if "gradient" in line), {})
    if unknown := [name for name, value in last.items() if value is None and name in LOSSES]:
        raise ValueError(
            f"{folder}: training diverged: {', '.join(unknown)} was no finite number at step {last['step']:,}, and "
            f"{last['left_out']:,} updates were skipped; the report is of the weights of step {trainer.best_step:,}. "
            f"Lower --{trainer.settings.algorithm}.learning_rate"
        )


def words_of(told: Update, speed: float) -> list[str]:
    """Return, success, what the losses are, steps a second."""
    words = [] if told.mean_return is None else [f"return {told.mean_return:.2f}"]
    if told.success is not None:
        words.append(f"success {100 * told.success:.0f}%")
    words += [
        f"{name} {told.losses[name]:.3f}" for name in ("loss", "critic", "actor", "entropy") if name in told.losses
    ]
    if told.left_out:
        words.append(f"{told.left_out} updates left out")
    return [*words, f"{speed:,.0f} steps/s"]


def news_of(told: Update) -> str | None:
    if told.evaluated_return is None:
        return None
    success = told.evaluated_success
    return f"greedy: return {told.evaluated_return:.2f}" + (
        "" if success is None else f", success {100 * success:.0f}%"
    )


def told_of(trainer: AgentTrainer, device: str) -> dict[str, Any]:
    """What made this run, as JSON."""
    return {
        "command": shlex.join(["hqlt", *sys.argv[1:]]),
        "settings": dataclasses.asdict(trainer.settings),
        "parameters": trainer.size,
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu",
        "hqlt": version,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def keep_agent(trainer: AgentTrainer, folder: Path, told: dict[str, Any] | None = None) -> None:
    """Write what `load_agent` takes: config.json with the settings, and the weights as they are, last and at once."""
    folder.mkdir(parents=True, exist_ok=True)
    told = told or {"settings": dataclasses.asdict(trainer.settings)}
    write_whole(folder / "config.json", json.dumps(told, indent=1).encode())
    write_whole(folder / WEIGHTS, save(trainer.agent.state_dict()))


def load_agent(folder: Path, device: str = "cpu") -> AgentTrainer:
    """A finished run's agent with its best weights, and the environments that it lives in.

    folder: of `hqlt rl train`, or models/NAME of a study. Raises ValueError where it holds no agent.
    """
    from hqlt.agent import PPOSettings, SACSettings

    kind = kind_of(folder)
    if kind not in (None, "agent"):
        raise ValueError(
            f"{folder}: expected a run of {COMMANDS['agent']}, found one of {COMMANDS[kind]}; of a study of agents "
            f"give models/NAME in its folder"
        )
    try:
        kept = json.loads((folder / "config.json").read_text())["settings"]
        kept["ppo"] = PPOSettings(**kept["ppo"] | {"heads": tuple(kept["ppo"]["heads"])})
        kept["sac"] = SACSettings(**kept["sac"] | {"heads": tuple(kept["sac"]["heads"])})
        trainer = AgentTrainer(AgentSettings(**kept), device)
        trainer.best = load_file(folder / WEIGHTS)
        trainer.agent.load_state_dict(trainer.best)
    except (OSError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{folder}: expected the folder of a finished `hqlt rl train`: {reason(error)}") from error
    return trainer
