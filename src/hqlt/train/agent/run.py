"""`hqlt rl train`: an agent from its settings to its report, and back from its folder."""

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
    """Train as the settings say into the folder, resuming from its newest checkpoint if there is one.

    A first Ctrl-C or SIGTERM is obeyed before the next step of an environment. Leaves config.json, metrics.jsonl,
    checkpoints/, and at the end agent.safetensors (the best weights), results.json, curves.png, the film of an episode,
    README.md and report.html.

    Raises ValueError or OSError, before anything is trained, for what cannot be; and where training diverged.
    """
    from hqlt.report.agent import write_agent_report  # now: a package that it misses would be the end of all

    def finish(trainer: AgentTrainer, folder: Path, told: dict[str, Any], console: Console) -> None:
        tested = trainer.test()
        save_agent(trainer, folder, told)
        write_agent_report(trainer, tested, folder, told, console)
        refuse_divergence(trainer, folder)

    place = folder or Path("runs") / f"{settings.env.replace('/', '-')}-{settings.memory}"
    run_of("agent", place, lambda _: AgentTrainer(settings, device, place / "checkpoints"), finish, wandb=wandb)


def refuse_divergence(trainer: AgentTrainer, folder: Path) -> None:
    """Raises ValueError where the last line of metrics.jsonl that has losses has one that was no finite number."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last: dict[str, Any] = next((line for line in reversed(lines) if "gradient" in line), {})
    others = ("mean_return", "mean_length", "success", "evaluated_return", "evaluated_success")
    if unknown := [name for name, value in last.items() if value is None and name not in others]:
        raise ValueError(
            f"{folder}: training diverged: {', '.join(unknown)} was no finite number at step {last['step']:,}, and "
            f"{last['left_out']:,} updates were skipped; the report is of the weights of step {trainer.best_step:,}. "
            f"Lower --{option_prefix(trainer.settings.algorithm)}.learning_rate"
        )


def save_agent(trainer: AgentTrainer, folder: Path, told: dict[str, Any] | None = None) -> None:
    """Write what `load_agent` takes: config.json with the settings, and the weights as they are, last and at once."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "config.json", json.dumps(told or trainer.description(), indent=1).encode())
    write_atomic(folder / WEIGHTS, save(trainer.agent.state_dict()))


def load_agent(folder: Path, device: str = "cpu") -> AgentTrainer:
    """A finished run's agent with its best weights, and the environments that it lives in.

    folder: of `hqlt rl train`, or models/NAME of a study. Raises ValueError where it holds no agent.
    """
    kind = kind_of(folder)
    if kind not in (None, "agent"):
        raise ValueError(
            f"{folder}: expected a run of {COMMANDS['agent']}, found one of {COMMANDS[kind]}; of a study of agents "
            f"give models/NAME in its folder"
        )
    try:
        kept = json.loads((folder / "config.json").read_text())["settings"]
        trainer = AgentTrainer(AgentSettings.of(kept), device)
        trainer.best = load_file(folder / WEIGHTS)
        trainer.agent.load_state_dict(trainer.best)
    except (OSError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{folder}: expected the folder of a finished `hqlt rl train`: {reason(error)}") from error
    return trainer
