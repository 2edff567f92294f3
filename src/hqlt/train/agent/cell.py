"""A cell of a grid that trains an agent in a world."""

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
    """What every agent of a comparison gets alike."""

    steps: int
    """Of the environment, of all copies together."""
    algorithm: str = "ppo"
    settings: dict[str, Any] = field(default_factory=dict)
    """Fields of its Settings."""
    num_envs: int = 64
    """Of the environment, played side by side."""
    evaluations: int = 20
    """How often the agent is scored, evenly over the steps."""
    episodes: int = 20
    """Greedy episodes of a score, always the same."""
    test_episodes: int = 100
    """Others, played once by the agent that was best in the evaluations."""
    along: dict[str, list[int]] = field(default_factory=dict)
    """One argument of the world, and values of it at which the chosen agent is tested too: {distractor: [10, 100]}."""

    def __post_init__(self) -> None:
        check_ranges(self, steps=COUNT, num_envs=COUNT, evaluations=COUNT, episodes=COUNT, test_episodes=COUNT)
        if len(self.along) > 1:
            raise ValueError(f"along: expected at most one argument of the world, got {', '.join(self.along)}")


@dataclass(frozen=True, kw_only=True)
class AgentCell(Cell):
    """config: arguments of `hqlt.agent.build_memory`, with its name as `memory`. Scores are shares of success."""

    unit = "steps"
    metric = "success"

    budget: AgentBudget

    @property
    def coordinate_name(self) -> str | None:
        return next(iter(self.budget.along), None)

    @property
    def settings(self) -> AgentSettings:
        """As it is tested. Raises ValueError or TypeError for what cannot be built."""
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
        """Checkpoints are kept while it runs: a cell that was killed goes on from its last evaluation, exactly."""
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
        history += [Progress(*told) for told in trainer.extra_state["history"]]
        begun = time.perf_counter() - (history[-1].seconds if history else 0.0)
        for told in trainer.train():
            event = Event(self, progress_of(told, time.perf_counter() - begun))
            if event.in_history:
                history.append(event.progress)
            trainer.extra_state["history"] = list(history)
            yield event


def progress_of(told: Update, seconds: float) -> Progress:
    return Progress(
        step=told.step,
        loss=finite_or_none(told.losses.get("loss", told.losses.get("critic", 0.0))) or 0.0,
        gradient_norm=finite_or_none(told.losses.get("gradient", 0.0)) or 0.0,
        seconds=seconds,
        tokens=told.step,
        validation=told.evaluated_success,
        skipped=told.left_out,
    )
