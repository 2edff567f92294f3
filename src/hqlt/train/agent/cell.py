"""A cell of a study: one agent trained in one environment."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hqlt.evaluate import Score
from hqlt.ranges import COUNT, check_ranges
from hqlt.train.agent.run import load_agent, save_agent
from hqlt.train.agent.settings import AgentSettings
from hqlt.train.agent.trainer import AgentTrainer, Update
from hqlt.train.fit import Fit, Progress
from hqlt.train.grid import Cell, Event, Result, load_result
from hqlt.train.metrics import finite_or_none


@dataclass(frozen=True, kw_only=True)
class AgentBudget:
    """Training and evaluation budget, the same for all agents of a comparison."""

    steps: int
    """Environment steps, summed over all parallel environments."""
    algorithm: str = "ppo"
    """Name of the algorithm."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Hyperparameters: fields of the algorithm's Settings."""
    num_envs: int = 64
    """Number of parallel environments."""
    evaluations: int = 20
    """Number of evaluations, at equal intervals."""
    episodes: int = 20
    """Greedy episodes per evaluation, the same ones each time."""
    test_episodes: int = 100
    """Other episodes, in which the best agent of the evaluations is tested once."""
    along: dict[str, list[int]] = field(default_factory=dict)
    """One argument of the environment and values at which the best agent is also tested: {distractor: [10, 100]}."""

    def __post_init__(self) -> None:
        check_ranges(self, steps=COUNT, num_envs=COUNT, evaluations=COUNT, episodes=COUNT, test_episodes=COUNT)
        if len(self.along) > 1:
            raise ValueError(f"along: expected at most one argument of the environment, got {', '.join(self.along)}")


@dataclass(frozen=True, kw_only=True)
class AgentCell(Cell):
    """One agent of a study; its score is the success rate.

    `config` holds the arguments of `hqlt.agent.build_memory`, its name as `memory`.
    """

    unit = "steps"
    metric = "success"

    budget: AgentBudget
    """Training and evaluation budget."""

    @property
    def coordinate_name(self) -> str | None:
        """Argument of the environment along which the agent is tested."""
        return next(iter(self.budget.along), None)

    @property
    def settings(self) -> AgentSettings:
        """Settings of the tested agent; raises ValueError or TypeError if it cannot be built."""
        budget, model = self.budget, {**self.config, **self.switched}
        return AgentSettings(
            env=self.task,
            options=self.task_options,
            memory=model.pop("memory"),
            model=model,
            algorithm=budget.algorithm,
            hyperparameters=budget.settings,
            num_envs=budget.num_envs,
            steps=budget.steps,
            seed=self.seed,
            evaluate_every=max(budget.steps // budget.evaluations, 1),
            episodes=budget.episodes,
        )

    def run(self, folder: Path, device: str = "cpu") -> Iterator[Event | Result]:
        """Train and test the agent; a cell that was interrupted resumes exactly from its last evaluation."""
        trained, history = self.trained, list[Progress]()
        assert isinstance(trained, AgentCell)
        done = load_result(folder, trained) if self.trained_as else None
        checkpoints = folder / "checkpoints" / self.name
        if done is not None:
            trainer, history = load_agent(folder / "models" / trained.name, device), done.history
        else:
            trainer = AgentTrainer(trained.settings, device, checkpoints)
            yield from self._train(trainer, history)
        best = done.fit[:2] if done else (trainer.best_step, Score("success", trainer.best_score[0], []))
        if self.switched:
            weights, trainer = trainer.best, AgentTrainer(self.settings, device)
            trainer.best = weights
        tested = trainer.test(self.budget.test_episodes).success
        save_agent(trainer, folder / "models" / self.name)
        curve = [
            (float(value), trainer.test(self.budget.test_episodes, **{name: value}).success)
            for name, values in self.budget.along.items()
            for value in values
        ]
        shutil.rmtree(checkpoints, ignore_errors=True)
        fit = Fit(*best, Score("success", tested, curve))
        yield Result(self, trainer.size, history[-1].seconds, fit, history)

    def _train(self, trainer: AgentTrainer, history: list[Progress]) -> Iterator[Event]:
        trainer.extra_state = {"history": []}
        trainer.resume()
        history += [Progress(*entry) for entry in trainer.extra_state["history"]]
        begun = time.perf_counter() - (history[-1].seconds if history else 0.0)
        for update in trainer.train():
            event = Event(self, progress_of(update, time.perf_counter() - begun))
            if event.in_history:
                history.append(event.progress)
            trainer.extra_state["history"] = list(history)
            yield event


def progress_of(update: Update, seconds: float) -> Progress:
    """Convert an update into the progress of a cell."""
    return Progress(
        step=update.step,
        loss=finite_or_none(update.losses.get("loss", update.losses.get("critic", 0.0))) or 0.0,
        gradient_norm=finite_or_none(update.losses.get("gradient", 0.0)) or 0.0,
        seconds=seconds,
        tokens=update.step,
        validation=update.evaluated_success,
        skipped=update.left_out,
    )
