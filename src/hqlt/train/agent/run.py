"""`hqlt rl train`: train an agent into a folder, and load it from there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from hqlt.disk import write_atomic
from hqlt.errors import reason
from hqlt.run_folder import COMMANDS, kind_of
from hqlt.train.agent.settings import AgentSettings, option_prefix
from hqlt.train.agent.trainer import AgentTrainer
from hqlt.train.run import run as run_of

WEIGHTS = "agent.safetensors"


def run(settings: AgentSettings, folder: Path | None = None, device: str = "cpu", wandb: bool = False) -> None:
    """Train an agent, resuming from the folder's newest checkpoint if there is one.

    The first Ctrl-C or SIGTERM stops before the next environment step. The folder receives config.json, metrics.jsonl
    and checkpoints/, and at the end agent.safetensors (the best weights), results.json, curves.png, a film of an
    episode, README.md and report.html.

    Args:
        settings: of the agent and its training.
        folder: None: runs/ENV-MEMORY.
        device: as torch names it.
        wandb: also report to Weights & Biases.

    Raises:
        ValueError: when the settings or the folder cannot be used (before training starts), or when training diverged.
        OSError: when the folder cannot be written to.
    """
    from hqlt.report.agent import write_agent_report  # imported first: a missing package is reported before training

    def finish(trainer: AgentTrainer, folder: Path, run_info: dict[str, Any], console: Console) -> None:
        tested = trainer.test()
        save_agent(trainer, folder, run_info)
        write_agent_report(trainer, tested, folder, run_info, console)
        refuse_divergence(trainer, folder)

    place = folder or Path("runs") / f"{settings.env.replace('/', '-')}-{settings.memory}"
    run_of("agent", place, lambda _: AgentTrainer(settings, device, place / "checkpoints"), finish, wandb=wandb)


def refuse_divergence(trainer: AgentTrainer, folder: Path) -> None:
    """Raise ValueError if the last losses in metrics.jsonl include one that was not finite."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last: dict[str, Any] = next((line for line in reversed(lines) if "gradient" in line), {})
    others = ("mean_return", "mean_length", "success", "evaluated_return", "evaluated_success")
    if unknown := [name for name, value in last.items() if value is None and name not in others]:
        raise ValueError(
            f"{folder}: training diverged: {', '.join(unknown)} was not finite at step {last['step']:,}, and "
            f"{last['left_out']:,} updates were skipped; the report uses the weights of step {trainer.best_step:,}. "
            f"Lower --{option_prefix(trainer.settings.algorithm)}.learning_rate"
        )


def save_agent(trainer: AgentTrainer, folder: Path, run_info: dict[str, Any] | None = None) -> None:
    """Save the settings (config.json) and then the current weights, for `load_agent`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "config.json", json.dumps(run_info or trainer.description(), indent=1).encode())
    write_atomic(folder / WEIGHTS, save(trainer.agent.state_dict()))


def load_agent(folder: Path, device: str = "cpu") -> AgentTrainer:
    """Load the agent of a finished run with its best weights, and its environments.

    Args:
        folder: of `hqlt rl train`, or models/NAME in the folder of a study.
        device: as torch names it.

    Returns:
        The trainer, with `agent` and `envs`.

    Raises:
        ValueError: when the folder holds no finished run of an agent.
    """
    kind = kind_of(folder)
    if kind not in (None, "agent"):
        raise ValueError(
            f"{folder}: expected a run of {COMMANDS['agent']}, found one of {COMMANDS[kind]}; for a study of agents, "
            f"give models/NAME in its folder"
        )
    try:
        saved = json.loads((folder / "config.json").read_text())["settings"]
        trainer = AgentTrainer(AgentSettings.from_dict(saved), device)
        trainer.best = load_file(folder / WEIGHTS)
        trainer.agent.load_state_dict(trainer.best)
    except (OSError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{folder}: expected the folder of a finished `hqlt rl train`: {reason(error)}") from error
    return trainer
