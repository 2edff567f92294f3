"""The training loop of an agent: collect, learn, evaluate. A checkpoint holds everything that it depends on."""

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
CHANGEABLE = ("steps", "keep_checkpoints")
"""Settings that may change when a run is resumed."""


class Update(NamedTuple):
    """Report of one collection and the updates that followed it; a line of metrics.jsonl."""

    step: int
    """Environment steps so far, summed over all parallel environments."""
    episodes: int
    """Training episodes that ended since the last report."""
    mean_return: float | None
    """Mean return of these episodes; None if there were none."""
    mean_length: float | None
    """Mean number of steps of these episodes."""
    success: float | None
    """Success rate of these episodes; None also if the environment does not report success."""
    losses: dict[str, float]
    """Means over the updates since the last report, "gradient" being the norm; empty if there were none."""
    left_out: int
    """Number of updates skipped so far because the gradient was not finite."""
    evaluated_return: float | None = None
    """Mean return of the greedy evaluation, if there was one at this step."""
    evaluated_success: float | None = None
    """Success rate of the greedy evaluation."""

    @property
    def units(self) -> int:
        """Steps, for the speed."""
        return self.step

    def as_line(self) -> dict[str, Any]:
        """Return a flat dictionary, for metrics.jsonl and trackers."""
        line = self._asdict()
        return line | line.pop("losses")


class AgentTrainer(Trainer[Update]):
    """Trains an agent: holds the agent, its environments and the best weights so far.

    PPO restarts all episodes at each evaluation. A resumed run is identical, bit for bit, to one that was never
    interrupted, in every environment whose randomness is determined by `reset(seed=…)`.

    Args:
        settings: of the agent and its training.
        device: as torch names it.
        folder: of the checkpoints.

    Raises:
        ValueError: when the environment, the memory or the algorithm cannot be built from the settings.
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
        self.episodes = 0
        """Number of training episodes since the last evaluation."""
        self.pending: Update | None = None
        """Update to be reported after the evaluation that is due."""
        self.best: dict[str, Tensor] = {}
        """Weights of the best evaluation so far."""
        self.best_step = 0
        self.best_score: tuple[float, float] = (-math.inf, -math.inf)

    @property
    def step(self) -> int:
        return int(self.agent.steps)

    @property
    def last_logged_step(self) -> int:
        return self.step - (self.pending is not None)  # the pending update is logged with its evaluation

    def updates(self) -> Iterator[Update]:
        """Train for the given number of steps, with an evaluation every `evaluate_every` steps."""
        settings = self.settings
        if self.pending is not None:
            yield self.with_evaluation(self.pending)
        while self.step < settings.steps:
            until = (self.step // settings.evaluate_every + 1) * settings.evaluate_every
            until = min(until, settings.steps)
            for progress in self.agent.train_in(self.envs, until, stopped=self.signals):
                update = make_update(progress, int(self.agent.left_out))
                self.episodes += update.episodes
                if progress.steps >= until:
                    if not self.episodes and until < settings.steps:  # the last interval may be shorter
                        raise ValueError(
                            f"evaluate_every: expected more than num_envs ({settings.num_envs}) × the longest episode, "
                            f"got {settings.evaluate_every}: no episode had ended by step {progress.steps}; take a "
                            f"larger one, or fewer environments"
                        )
                    update = self.with_evaluation(update)
                yield update

    def with_evaluation(self, update: Update) -> Update:
        """Evaluate the agent, update the best weights, and add the result to the update."""
        self.pending = update
        evaluation = self.evaluate(self.settings.episodes, VALIDATION_SEED)
        self.update_best(evaluation)
        self.pending, self.episodes = None, 0
        return update._replace(
            evaluated_return=evaluation.mean_return, evaluated_success=finite_or_none(evaluation.success)
        )

    def due(self, update: Update) -> bool:
        """A checkpoint is saved with each evaluation."""
        return update.evaluated_return is not None

    def evaluate(self, episodes: int, seed: int, **options: Any) -> Evaluation:
        """Play greedy episodes in the settings' environment, optionally with other options."""
        with contextlib.closing(self.make_envs(min(episodes, 64), seed, **options)) as envs:
            return evaluate(self.agent, envs, episodes, seed=seed, stopped=self.signals)

    def make_envs(self, n: int, seed: int, **options: Any) -> VectorEnv:
        """Build n environments of the settings, optionally with other options; raises ValueError if that fails."""
        try:
            return make_worlds(self.settings.env, n, seed, **{**self.settings.options, **options})
        except ImportError:
            raise
        except Exception as error:  # environments of other packages may raise anything
            kind = "" if isinstance(error, (ValueError, gymnasium.error.Error)) else f"{type(error).__name__}: "
            raise ValueError(f"{self.settings.env}: {kind}{error}") from error

    def update_best(self, evaluation: Evaluation) -> None:
        """Keep the current weights if they are at least as good, by success and then by return."""
        score = (finite_or_none(evaluation.success) or 0.0, evaluation.mean_return)
        if score >= self.best_score:
            self.best_step, self.best_score = self.step, score
            self.best = {name: weight.clone() for name, weight in self.agent.state_dict().items()}

    def test(self, episodes: int | None = None, **options: Any) -> Evaluation:
        """Load the best weights and play greedy episodes that were not used in evaluations."""
        if not self.best:  # stopped before the first evaluation
            self.update_best(self.evaluate(self.settings.episodes, VALIDATION_SEED))
        self.agent.load_state_dict(self.best)
        return self.evaluate(episodes or self.settings.episodes, TEST_SEED, **options)

    def tensors(self) -> dict[str, Tensor]:
        return self.agent.checkpoint() | {BEST + name: weight for name, weight in self.best.items()}

    def metadata(self) -> dict[str, Any]:
        return {
            "ended": self.episodes,
            "best_step": self.best_step,
            "best_score": list(self.best_score) if self.best else None,
            "unscored": self.pending and self.pending._asdict(),
        }

    def identity(self) -> dict[str, Any]:
        return {name: value for name, value in self.settings.as_json().items() if name not in CHANGEABLE}

    def restore(self, place: Path, metadata: Mapping[str, Any]) -> None:
        tensors = self.checkpoints.load(place)
        self.agent.restore({name: tensor for name, tensor in tensors.items() if not name.startswith(BEST)})
        self.episodes = metadata["ended"]
        self.pending = metadata["unscored"] and Update(**metadata["unscored"])
        if metadata["best_score"] is not None:
            success, mean_return = metadata["best_score"]
            self.best_step, self.best_score = metadata["best_step"], (success, mean_return)
            self.best = {name.removeprefix(BEST): t for name, t in tensors.items() if name.startswith(BEST)}

    def title(self) -> str:
        settings = self.settings
        return (
            f"{settings.algorithm.upper()} in {settings.num_envs} × {settings.env}, {settings.memory} memory, "
            f"{self.size:,} parameters"
        )

    def description(self) -> dict[str, Any]:
        return {"settings": self.settings.as_json()}

    def status(self, update: Update, speed: float) -> list[str]:
        """Return, success, losses, skipped updates and steps per second."""
        words = [] if update.mean_return is None else [f"return {update.mean_return:.2f}"]
        if update.success is not None:
            words.append(f"success {100 * update.success:.0f}%")
        words += [f"{name} {loss:.3f}" for name, loss in update.losses.items() if name in STATUS_LOSSES]
        if update.left_out:
            words.append(f"{update.left_out} updates skipped")
        return [*words, f"{speed:,.0f} steps/s"]

    def message(self, update: Update) -> str | None:
        """Return and success of an evaluation."""
        if update.evaluated_return is None:
            return None
        success = update.evaluated_success
        return f"greedy: return {update.evaluated_return:.2f}" + (
            "" if success is None else f", success {100 * success:.0f}%"
        )


STATUS_LOSSES = ("loss", "critic", "actor", "entropy")
"""Losses that the live line shows."""


def make_update(progress: Progress, left_out: int) -> Update:
    """Convert an agent's progress into an update."""
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
