"""The loop: collect, learn, evaluate. One run is one trainer, and its checkpoint is all that it depends on."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium
import torch
from gymnasium.vector import VectorEnv
from torch import Tensor

from hqlt.agent import Progress, build_memory, evaluate
from hqlt.agent.collect import Evaluation
from hqlt.agent.worlds import make_worlds
from hqlt.device import usable_device
from hqlt.train.agent.settings import TEST_SEED, VALIDATION_SEED, AgentSettings
from hqlt.train.checkpoints import Checkpoints
from hqlt.train.metrics import finite_or_none
from hqlt.train.run import Trainer

BEST = "best."
FREE = ("steps", "keep_checkpoints")
"""Settings that may change when a run is resumed."""


class Update(NamedTuple):
    """What is told after some steps of play, and the learning from them."""

    step: int
    """Steps of the environment so far, of all copies."""
    episodes: int
    """That ended since the last time."""
    mean_return: float | None
    """Of these; None: there were none."""
    mean_length: float | None
    success: float | None
    """None also where the environment does not tell."""
    losses: dict[str, float]
    """Means over the updates since the last time, "gradient" being the norm; empty: there were none."""
    left_out: int
    """Updates left out so far, because a gradient was not finite."""
    evaluated_return: float | None = None
    """Of greedy episodes, where they were played."""
    evaluated_success: float | None = None

    @property
    def units(self) -> int:
        return self.step

    def as_line(self) -> dict[str, Any]:
        """Flat, for metrics.jsonl and trackers."""
        told = self._asdict()
        return told | told.pop("losses")


class AgentTrainer(Trainer[Update]):
    """An agent, the environments it lives in, and the best that it has been.

    At each evaluation of an algorithm whose episodes go on, all copies begin anew. A run that is resumed is, bit for
    bit, the one that was never stopped, in any environment whose chance `reset(seed=…)` decides.

    folder: of its checkpoints. Raises ValueError for an environment that agents here cannot live in.
    """

    kind, unit = "agent", "steps"

    def __init__(self, settings: AgentSettings, device: str = "cpu", folder: Path = Path("checkpoints")) -> None:
        self.settings, self.device = settings, usable_device(device)
        torch.manual_seed(settings.seed)
        self.envs = self.make_envs(settings.num_envs, settings.seed)
        try:
            memory = build_memory(settings.memory, **settings.model)
        except (TypeError, ValueError) as error:
            raise ValueError(f"model: {error}") from None
        self.agent = settings.agent(self.envs, memory, settings.hyperparameters, seed=settings.seed)
        torch.nn.Module.to(self.agent, self.device)
        self.size = sum(parameter.numel() for parameter in self.agent.parameters())
        self.checkpoints, self.extra_state = Checkpoints(folder, settings.keep_checkpoints), {}
        self.ended = 0
        """Episodes since the last evaluation."""
        self.unscored: Update | None = None
        """What is to be reported once the evaluation that is due is done."""
        self.best: dict[str, Tensor] = {}
        """Weights of the best evaluation so far."""
        self.best_step = 0
        self.best_score: tuple[float, float] = (-math.inf, -math.inf)

    @property
    def step(self) -> int:
        return int(self.agent.steps)

    @property
    def last_logged_step(self) -> int:
        return self.step - (self.unscored is not None)  # its line comes with the evaluation that is due

    def updates(self) -> Iterator[Update]:
        """Train until the settings' steps are done; an evaluation ends each stretch of `evaluate_every` steps."""
        settings = self.settings
        if self.unscored is not None:
            yield self.scored(self.unscored)
        while self.step < settings.steps:
            until = (self.step // settings.evaluate_every + 1) * settings.evaluate_every
            until = min(until, settings.steps)
            for progress in self.agent.train_in(self.envs, until, stopped=self.signals):
                told = update_of(progress, int(self.agent.left_out))
                self.ended += told.episodes
                if progress.steps >= until:
                    if not self.ended and until < settings.steps:  # the last stretch may be short
                        raise ValueError(
                            f"evaluate_every: expected more than {settings.num_envs} copies × the longest episode, so "
                            f"that episodes end, got {settings.evaluate_every}: by step {progress.steps} none had"
                        )
                    told = self.scored(told)
                yield told

    def scored(self, told: Update) -> Update:
        """The same with the evaluation that is due."""
        self.unscored = told
        scored = self.score(self.settings.episodes, VALIDATION_SEED)
        self.update_best(scored)
        self.unscored, self.ended = None, 0
        return told._replace(evaluated_return=scored.mean_return, evaluated_success=finite_or_none(scored.success))

    def due(self, told: Update) -> bool:
        return told.evaluated_return is not None

    def score(self, episodes: int, seed: int, **options: Any) -> Evaluation:
        """Greedy episodes in the same world, or in one with other options."""
        with contextlib.closing(self.make_envs(min(episodes, 64), seed, **options)) as envs:
            return evaluate(self.agent, envs, episodes, seed=seed, stopped=self.signals)

    def make_envs(self, copies: int, seed: int, **options: Any) -> VectorEnv:
        """The settings' world, with other options where given.

        Raises ValueError for options that it does not take, and whatever else keeps it from being made.
        """
        try:
            return make_worlds(self.settings.env, copies, seed, **{**self.settings.options, **options})
        except ImportError:
            raise
        except Exception as error:  # what other people's environments raise
            kind = "" if isinstance(error, (ValueError, gymnasium.error.Error)) else f"{type(error).__name__}: "
            raise ValueError(f"{self.settings.env}: {kind}{error}") from error

    def update_best(self, scored: Evaluation) -> None:
        """By success, then by return; the later of equals, which has learned for longer."""
        score = (finite_or_none(scored.success) or 0.0, scored.mean_return)
        if score >= self.best_score:
            self.best_step, self.best_score = self.step, score
            self.best = {name: weight.clone() for name, weight in self.agent.state_dict().items()}

    def test(self, episodes: int | None = None, **options: Any) -> Evaluation:
        """Episodes that were never scored before, by the best weights, which are loaded for it."""
        if not self.best:  # stopped before the first evaluation, and not to go on
            self.update_best(self.score(self.settings.episodes, VALIDATION_SEED))
        self.agent.load_state_dict(self.best)
        return self.score(episodes or self.settings.episodes, TEST_SEED, **options)

    def tensors(self) -> dict[str, Tensor]:
        return self.agent.checkpoint() | {BEST + name: weight for name, weight in self.best.items()}

    def metadata(self) -> dict[str, Any]:
        return {
            "ended": self.ended,
            "best_step": self.best_step,
            "best_score": list(self.best_score) if self.best else None,
            "unscored": self.unscored and self.unscored._asdict(),
        }

    def identity(self) -> dict[str, Any]:
        return {name: value for name, value in self.settings.as_json().items() if name not in FREE}

    def restore(self, place: Path, told: Mapping[str, Any]) -> None:
        tensors = self.checkpoints.load(place)
        self.agent.restore({name: tensor for name, tensor in tensors.items() if not name.startswith(BEST)})
        self.ended = told["ended"]
        self.unscored = told["unscored"] and Update(**told["unscored"])
        if told["best_score"] is not None:
            success, mean_return = told["best_score"]
            self.best_step, self.best_score = told["best_step"], (success, mean_return)
            self.best = {name.removeprefix(BEST): t for name, t in tensors.items() if name.startswith(BEST)}

    def title(self) -> str:
        settings = self.settings
        return (
            f"{settings.algorithm.upper()} in {settings.num_envs} × {settings.env}, {settings.memory} memory, "
            f"{self.size:,} parameters"
        )

    def description(self) -> dict[str, Any]:
        return {"settings": self.settings.as_json()}

    def status(self, told: Update, speed: float) -> list[str]:
        """Return, success, what the losses are, steps a second."""
        words = [] if told.mean_return is None else [f"return {told.mean_return:.2f}"]
        if told.success is not None:
            words.append(f"success {100 * told.success:.0f}%")
        words += [f"{name} {loss:.3f}" for name, loss in told.losses.items() if name in SHOWN]
        if told.left_out:
            words.append(f"{told.left_out} updates skipped")
        return [*words, f"{speed:,.0f} steps/s"]

    def message(self, told: Update) -> str | None:
        if told.evaluated_return is None:
            return None
        success = told.evaluated_success
        return f"greedy: return {told.evaluated_return:.2f}" + (
            "" if success is None else f", success {100 * success:.0f}%"
        )


SHOWN = ("loss", "critic", "actor", "entropy")
"""Of the losses, in the live line."""


def update_of(progress: Progress, left_out: int) -> Update:
    played = progress.played
    return Update(
        progress.steps,
        len(played.outcomes),
        finite_or_none(played.mean_return),
        finite_or_none(played.mean_length),
        finite_or_none(played.success),
        progress.losses,
        left_out,
    )
