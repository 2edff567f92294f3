"""The loop: collect, learn, evaluate. One run is one trainer, and its checkpoint is all that it depends on."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import gymnasium
import torch
from gymnasium.vector import VectorEnv
from numpy.typing import NDArray
from torch import Tensor

from hqlt.agent import PPO, SAC, build_memory, evaluate
from hqlt.agent.agent import Agent, Progress
from hqlt.agent.collect import Evaluation
from hqlt.agent.worlds import make_worlds
from hqlt.device import usable_device
from hqlt.train.agent.settings import TEST_SEED, VALIDATION_SEED, AgentSettings
from hqlt.train.metrics import known

BEST = "best."


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

    def as_line(self) -> dict[str, Any]:
        """Flat, for metrics.jsonl and trackers."""
        told = self._asdict()
        return told | told.pop("losses")


class AgentTrainer:
    """An agent, the environments it lives in, and the best that it has been.

    Between two evaluations PPO's episodes go on; at each, all copies begin anew. So a run that goes on from the
    checkpoint made there is, bit for bit, the one that was never stopped, in any environment whose chance
    `reset(seed=…)` decides. SAC goes on exactly from any Update.

    Raises ValueError for an environment that agents here cannot live in.
    """

    def __init__(self, settings: AgentSettings, device: str = "cpu") -> None:
        self.settings = settings
        self.stopped: Sequence[int] = ()
        """Looked at before each step; once there is anything in it, what plays raises Stopped."""
        place = usable_device(device)
        torch.manual_seed(settings.seed)
        self.envs = self.worlds(settings.copies, settings.seed)
        try:
            memory = build_memory(settings.memory, **settings.model)
        except (TypeError, ValueError) as error:
            raise ValueError(f"model: {error}") from None
        if settings.algorithm == "ppo":
            self.agent: Agent = PPO(self.envs, memory, settings.ppo, seed=settings.seed)
        else:
            self.agent = SAC(self.envs, memory, settings.sac, seed=settings.seed)
        torch.nn.Module.to(self.agent, place)
        self.size = sum(parameter.numel() for parameter in self.agent.parameters())
        self.unscored: Update | None = None
        """What is to be reported once the evaluation that is due is done."""
        self.best: dict[str, Tensor] = {}
        """Weights of the best evaluation so far."""
        self.best_step = 0
        self.best_score: tuple[float, float] = (-math.inf, -math.inf)

    @property
    def steps(self) -> int:
        return int(self.agent.steps)

    @property
    def finished(self) -> bool:
        return self.steps >= self.settings.steps

    def updates(self) -> Iterator[Update]:
        """Train until the settings' steps are done; an evaluation ends each stretch of `evaluate_every` steps.

        Raises Stopped where `stopped` says so; where the trainer is then `resumable`, what goes on from a checkpoint of
        it is what would have come.
        """
        settings, ended = self.settings, 0
        if self.unscored is not None:
            yield self.scored(self.unscored)
        while not self.finished:
            until = (self.steps // settings.evaluate_every + 1) * settings.evaluate_every
            until = min(until, settings.steps)
            for progress in self.agent.train_in(self.envs, until, stopped=self.stopped):
                told = update_of(progress, int(self.agent.left_out))
                ended += told.episodes
                if progress.steps >= until:
                    if not ended and until < settings.steps:  # the last stretch may be short
                        raise ValueError(
                            f"evaluate_every: expected more than {settings.copies} copies × the longest episode, so "
                            f"that episodes end, got {settings.evaluate_every}: by step {progress.steps} none had"
                        )
                    told = self.scored(told)
                yield told

    def scored(self, told: Update) -> Update:
        """The same with the evaluation that is due."""
        self.unscored = told
        scored = self.score(self.settings.episodes, VALIDATION_SEED)
        self.keep_the_best(scored)
        self.unscored = None
        return told._replace(evaluated_return=scored.mean_return, evaluated_success=known(scored.success))

    @property
    def resumable(self) -> bool:
        """Whether training goes on exactly from a checkpoint of now."""
        return self.agent.goes_on_between_rounds or self.unscored is not None

    def score(self, episodes: int, seed: int, **options: Any) -> Evaluation:
        """Greedy episodes in the same world, or in one with other options."""
        with contextlib.closing(self.worlds(min(episodes, 64), seed, **options)) as envs:
            return evaluate(self.agent, envs, episodes, seed=seed, stopped=self.stopped)

    def worlds(self, copies: int, seed: int, **options: Any) -> VectorEnv:
        """The settings' world, with other options where given.

        Raises ValueError for options that it does not take, and whatever else keeps it from being made.
        """
        try:
            return make_worlds(self.settings.world, copies, seed, **{**self.settings.options, **options})
        except ImportError:
            raise
        except Exception as error:  # what other people's environments raise
            kind = "" if isinstance(error, (ValueError, gymnasium.error.Error)) else f"{type(error).__name__}: "
            raise ValueError(f"{self.settings.world}: {kind}{error}") from error

    def keep_the_best(self, scored: Evaluation) -> None:
        """By success, then by return; the later of equals, which has learned for longer."""
        score = (known(scored.success) or 0.0, scored.mean_return)
        if score >= self.best_score:
            self.best_step, self.best_score = self.steps, score
            self.best = {name: weight.clone() for name, weight in self.agent.state_dict().items()}

    def test(self, episodes: int | None = None, **options: Any) -> Evaluation:
        """Episodes that were never scored before, by the best weights, which are loaded for it."""
        if not self.best:  # stopped before the first evaluation, and not to go on
            self.keep_the_best(self.score(self.settings.episodes, VALIDATION_SEED))
        self.agent.load_state_dict(self.best)
        return self.score(episodes or self.settings.episodes, TEST_SEED, **options)

    def tensors(self) -> dict[str, Tensor]:
        """For a checkpoint, with `arrays` and `told`."""
        return self.agent.checkpoint() | {BEST + name: weight for name, weight in self.best.items()}

    def arrays(self) -> dict[str, NDArray[Any]] | None:
        """The replay's; None: there is none."""
        return self.agent.replay.state_dict() if isinstance(self.agent, SAC) else None

    def told(self) -> dict[str, Any]:
        return {
            "step": self.steps,
            "best_step": self.best_step,
            "best_score": self.best_score if self.best else None,
            "unscored": self.unscored and self.unscored._asdict(),
        }

    def restore(
        self, tensors: Mapping[str, Tensor], arrays: Mapping[str, NDArray[Any]] | None, told: Mapping[str, Any]
    ) -> None:
        self.agent.restore({name: tensor for name, tensor in tensors.items() if not name.startswith(BEST)})
        if isinstance(self.agent, SAC):
            if arrays is None:
                raise ValueError("expected the replay, found none")
            self.agent.replay.load_state_dict(arrays)
        unscored = told.get("unscored")
        self.unscored = unscored and Update(**unscored)
        if told["best_score"] is not None:
            success, mean_return = told["best_score"]
            self.best_step, self.best_score = told["best_step"], (success, mean_return)
            self.best = {name.removeprefix(BEST): t for name, t in tensors.items() if name.startswith(BEST)}


def update_of(progress: Progress, left_out: int) -> Update:
    played = progress.played
    return Update(
        progress.steps,
        len(played.outcomes),
        known(played.mean_return),
        known(played.mean_length),
        known(played.success),
        progress.losses,
        left_out,
    )
