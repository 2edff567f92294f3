"""`hqlt rl`: agents with a memory, trained and watched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hqlt.cli import Command
from hqlt.cli.retention_options import RetentionOptions
from hqlt.disk import check_writable
from hqlt.registry import find, load_plugins, names
from hqlt.train.agent.settings import AgentSettings, option_prefix


def train(folder: Path | None = None, device: str = "cpu", wandb: bool = False, **settings: Any) -> None:
    """Train an agent with a memory. The same command resumes where an earlier one stopped, exactly.

    Without options: a T-maze, whose corridor is longer than the memory's window. Any argument of the world can be given
    by `--options.NAME`, of the memory by `--model.NAME`, of an algorithm by `--ppo.NAME`, `--sac.NAME` and the like.

    Args:
        folder: where everything goes; runs/WORLD-MEMORY by default.
        device: cpu or cuda. Small models are fastest on one core.
        wandb: also report to Weights & Biases (package wandb; WANDB_MODE=offline writes to FOLDER/wandb only).
            TensorBoard and trackio are used if they are installed.
    """
    from hqlt.train.agent.run import run

    chosen = take_hyperparameters(settings)
    run(AgentSettings(**settings, hyperparameters=chosen), folder, device, wandb)


def hyperparameters() -> dict[str, Any]:
    """By algorithm: what its options begin with in a run."""
    load_plugins()
    kinds = {option_prefix(name): find("algorithm", name) for name in names("algorithm")}
    return {name: kind.Settings(**kind.run_defaults) for name, kind in kinds.items()}


def take_hyperparameters(settings: dict[str, Any]) -> Any:
    """Of the chosen algorithm; those of all are taken out of the settings."""
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
    """Let a trained agent play greedy episodes, and film one.

    Args:
        folder: of a finished `hqlt rl train`, or models/NAME of a study of agents.
        episodes: how many.
        options: the world's arguments that differ from training, such as '{"corridor": 100}'.
        film: a folder for episode.png and episode.gif.
        seed: of the episodes.
    """
    import dataclasses

    from rich.console import Console

    from hqlt.ranges import COUNT, SEED, check_range
    from hqlt.train.agent.run import load_agent

    console = Console(highlight=False, soft_wrap=True)
    check_range("--episodes", episodes, COUNT)
    check_range("--seed", seed, SEED)
    if film is not None:
        from hqlt.report import episode  # and the folder is looked at: nothing is played in vain

        check_writable(film, folder=True)
    retention, trainer = RetentionOptions(**retention_options), load_agent(folder)
    retention.enable_retention(trainer.agent, console)
    trainer.settings = dataclasses.replace(trainer.settings, options={**trainer.settings.options, **(options or {})})
    played = trainer.score(episodes, seed)
    success = "" if played.success != played.success else f", success {100 * played.success:.0f}%"
    console.print(
        f"{len(played.outcomes)} episodes: return {played.mean_return:.2f}{success}, {played.mean_length:.0f} steps"
    )
    if film is not None:
        filmed = episode.film(trainer, seed)
        film.mkdir(parents=True, exist_ok=True)
        episode.write_film(filmed, film)
        console.print(f"film: {film}")


rl: Command = {"train": train, "play": play}
