"""`hqlt rl`: train agents with a memory, and let them play."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hqlt.cli import Command
from hqlt.cli.retention_options import RetentionOptions
from hqlt.disk import check_writable
from hqlt.registry import find, load_plugins, names
from hqlt.train.agent.settings import AgentSettings, option_prefix


def train(folder: Path | None = None, device: str = "cpu", wandb: bool = False, **settings: Any) -> None:
    """Train an agent with a memory. Running the same command again resumes an interrupted run exactly.

    The default is a T-maze whose corridor is longer than the memory's window. Arguments of the environment are given as
    `--options.NAME`, of the memory as `--model.NAME`, of the algorithm as `--ppo.NAME`, `--sac.NAME` and so on.

    Args:
        folder: folder of the run; runs/ENV-MEMORY by default.
        device: cpu or cuda. Small models are fastest on one CPU core.
        wandb: also report to Weights & Biases (package wandb; WANDB_MODE=offline writes to FOLDER/wandb only).
            TensorBoard and trackio are used if they are installed.
    """
    from hqlt.train.agent.run import run

    chosen = take_hyperparameters(settings)
    run(AgentSettings(**settings, hyperparameters=chosen), folder, device, wandb)


def hyperparameters() -> dict[str, Any]:
    """Return the default hyperparameters of each algorithm."""
    load_plugins()
    kinds = {option_prefix(name): find("algorithm", name) for name in names("algorithm")}
    return {name: kind.Settings(**kind.run_defaults) for name, kind in kinds.items()}


def take_hyperparameters(settings: dict[str, Any]) -> Any:
    """Remove the hyperparameters of all algorithms from the settings; returns those of the chosen one."""
    taken = {name: settings.pop(name, None) for name in hyperparameters()}
    return taken[option_prefix(settings["algorithm"])] if settings["algorithm"] in names("algorithm") else None


train.__dict__["more_options"] = hyperparameters


def play(
    folder: Path,
    episodes: int = 20,
    options: dict[str, Any] | None = None,
    film: Path | None = None,
    seed: int = 0,
    **retention_options: Any,
) -> None:
    """Let a trained agent play greedy episodes, and optionally film one.

    Args:
        folder: folder of a finished `hqlt rl train`, or models/NAME in the folder of a study of agents.
        episodes: number of episodes.
        options: arguments of the environment that differ from training, such as '{"corridor": 100}'.
        film: folder to which episode.png and episode.gif are written.
        seed: seed of the episodes.
    """
    import dataclasses

    from rich.console import Console

    from hqlt.ranges import COUNT, SEED, check_range
    from hqlt.train.agent.run import load_agent

    console = Console(highlight=False, soft_wrap=True)
    check_range("--episodes", episodes, COUNT)
    check_range("--seed", seed, SEED)
    if film is not None:
        from hqlt.report import episode  # check packages and folder before playing

        check_writable(film, folder=True)
    retention, trainer = RetentionOptions(**retention_options), load_agent(folder)
    retention.enable_retention(trainer.agent, console)
    trainer.settings = dataclasses.replace(trainer.settings, options={**trainer.settings.options, **(options or {})})
    result = trainer.evaluate(episodes, seed)
    success = "" if result.success != result.success else f", success {100 * result.success:.0f}%"
    console.print(
        f"{len(result.outcomes)} episodes: return {result.mean_return:.2f}{success}, {result.mean_length:.0f} steps"
    )
    if film is not None:
        filmed = episode.film(trainer, seed)
        film.mkdir(parents=True, exist_ok=True)
        episode.write_film(filmed, film)
        console.print(f"film: {film}")


rl: Command = {"train": train, "play": play}
