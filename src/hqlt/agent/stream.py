"""Environments side by side as streams of steps, whatever they do when an episode ends, and checked at every step."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn, TypeVar

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from numpy.typing import NDArray
from torch.utils._pytree import tree_map

from hqlt.agent.encoder import check_discrete
from hqlt.agent.observation import InvalidObservation, Tree, checked_observation

MAX_EPISODE_STEPS = 100_000
"""Steps within which an episode must end, unless the environment says that it may take more."""

Result = TypeVar("Result")


class Step(NamedTuple):
    """What one action in each of n environments led to. Observations are arrays, or a dictionary or tuple of them."""

    successor: Tree
    """[n, ...] what is seen after the action: the last observation of an episode that ended."""
    observation: Tree
    """[n, ...] what the next action is chosen from."""
    first: NDArray[np.bool_]
    """[n] that observation begins an episode."""
    reward: NDArray[np.float32]
    terminated: NDArray[np.bool_]
    truncated: NDArray[np.bool_]
    """[n] the episode was cut short: what would have come still counts."""
    live: NDArray[np.bool_]
    """[n] the action was played; False where an environment only began its next episode."""
    success: NDArray[np.float32]
    """[n] what an ended episode's info says of its success, 0 or 1; NaN where it says nothing or has not ended."""

    @property
    def ended(self) -> NDArray[np.bool_]:
        return self.terminated | self.truncated


class Stream:
    """A `gymnasium.vector.VectorEnv` in which the three autoreset modes look alike.

    NEXT_STEP    an ended env shows its last observation, and its next action only begins the next episode (live False)
    SAME_STEP    an ended env shows the next episode's first observation at once; its last is in infos["final_obs"]
    DISABLED     ended envs are reset here, at once

    Raises ValueError, which names the environment, which of the n it was and the step of its episode, for an exception
    in the environment; an observation that is not of its space; NaN or infinities in observations and rewards; an
    action that is none of the environment's; and an episode that does not end within MAX_EPISODE_STEPS steps, or within the
    environment's own `max_episode_steps` where that is more.
    """

    def __init__(self, envs: VectorEnv) -> None:
        self.envs = check_vector_env(envs)
        self.name = env_name(envs)
        self.mode = autoreset_mode(envs)
        self.num_envs: int = envs.num_envs
        self.max_episode_steps = max_episode_steps(envs)
        self._actions = check_discrete(envs.single_action_space)
        self._resetting = np.zeros(self.num_envs, dtype=bool)
        self._length = np.zeros(self.num_envs, dtype=np.int64)

    def reset(self, seed: int | None = None) -> Tree:
        """Begin an episode in every environment → [n, ...]."""
        self._resetting = np.zeros(self.num_envs, dtype=bool)
        self._length = np.zeros(self.num_envs, dtype=np.int64)
        return self._checked(self._call(self.envs.reset, seed=seed)[0], "observation")

    def step(self, actions: NDArray[np.int64]) -> Step:
        """actions: [n], from 0."""
        self._check_actions(actions)
        live = ~self._resetting
        self._length += live
        seen, reward, terminated, truncated, infos = self._call(self.envs.step, actions + int(self._actions.start))
        observation = self._checked(seen, "observation")
        terminated = self._column(terminated, np.bool_, "terminated") & live
        truncated = self._column(truncated, np.bool_, "truncated") & live
        rewards = np.where(live, self._column(reward, np.float32, "reward"), np.float32(0))
        if not np.isfinite(rewards).all():
            bad = int(np.flatnonzero(~np.isfinite(rewards))[0])
            self._fail(f"reward: expected a finite number, got {np.asarray(reward)[bad]}", bad)
        ended = terminated | truncated
        self._check_lengths(ended)
        successor, first, told = observation, ended, infos
        match self.mode:
            case AutoresetMode.NEXT_STEP:
                first, self._resetting = self._resetting, ended
            case AutoresetMode.SAME_STEP if ended.any():
                successor = self._with_final_observations(observation, infos, ended)
                told = infos.get("final_info", {})
            case AutoresetMode.DISABLED if ended.any():
                observation = self._reset_ended(observation, ended)
        self._length[ended] = 0
        return Step(
            successor, observation, first, rewards, terminated, truncated, live, self._success(told, ended)
        )  # fmt: skip

    def _with_final_observations(self, observation: Tree, infos: dict[str, Any], ended: NDArray[np.bool_]) -> Tree:
        """The observations, with the last ones of the episodes that ended in their place."""
        if "final_obs" not in infos:
            self._fail(
                "infos: expected 'final_obs' where an episode ended, as AutoresetMode.SAME_STEP has it, found none"
            )
        successor = tree_map(np.copy, observation)
        space = self.envs.single_observation_space
        for row in np.flatnonzero(ended).tolist():
            last = tree_map(
                lambda part: np.asarray(part)[None],
                infos["final_obs"][row],
                is_leaf=lambda part: isinstance(part, list),
            )
            try:
                last = checked_observation(space, last, 1, "final_obs")
            except InvalidObservation as error:
                self._fail(str(error), row)
            tree_map(lambda into, part, row=row: into.__setitem__(row, part[0]), successor, last)
        return successor

    def _reset_ended(self, observation: Tree, ended: NDArray[np.bool_]) -> Tree:
        """What all see after the ended ones alone were reset."""
        mask = ended.copy()
        again = self._checked(self._call(self.envs.reset, options={"reset_mask": mask})[0], "observation")

        def kept(before: NDArray[Any], after: NDArray[Any]) -> None:
            if (before[~ended] != after[~ended]).any():
                self._fail(
                    "reset(options={'reset_mask': …}): expected the environments outside the mask to stay as they are, "
                    "found another observation; use AutoresetMode.NEXT_STEP or SAME_STEP"
                )

        tree_map(kept, observation, again)
        return again

    def _success(self, infos: dict[str, Any], ended: NDArray[np.bool_]) -> NDArray[np.float32]:
        """infos["success"] of the episodes that ended and have it, NaN for the others."""
        success = np.full(len(ended), np.nan, dtype=np.float32)
        if "success" in infos:
            told = ended & infos.get("_success", True)
            try:
                success[told] = np.asarray(infos["success"])[told].astype(np.float32)
            except (TypeError, ValueError):
                self._fail(f"info['success']: expected booleans or numbers, got {infos['success']}")
        return success

    def _call(self, call: Callable[..., Result], *arguments: Any, **options: Any) -> Result:
        """What the environments return; what they raise, in a sentence."""
        try:
            return call(*arguments, **options)
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            raise ValueError(
                f"{self.name}: {call.__name__}() raised {type(error).__name__}: {error} "
                f"({place.filename}, line {place.lineno})"
            ) from error

    def _checked(self, seen: Any, name: str) -> Tree:
        try:
            return checked_observation(self.envs.single_observation_space, seen, self.num_envs, name)
        except InvalidObservation as error:
            self._fail(str(error), error.env)

    def _column(self, values: Any, dtype: type[np.generic], name: str) -> NDArray[Any]:
        """One value an environment."""
        try:
            with np.errstate(over="ignore"):
                column = np.asarray(values).astype(dtype)
        except (TypeError, ValueError):
            self._fail(f"{name}: expected numbers, got {values!r}")
        if column.shape != (self.num_envs,):
            self._fail(f"{name}: expected shape [{self.num_envs}], got {list(column.shape)}")
        return column

    def _check_actions(self, actions: NDArray[np.int64]) -> None:
        n = int(self._actions.n)
        if actions.shape != (self.num_envs,) or actions.dtype.kind not in "iu":
            self._fail(f"actions: expected {self.num_envs} whole numbers, got {actions.dtype} {list(actions.shape)}")
        if actions.min() < 0 or actions.max() >= n:
            bad = int(np.flatnonzero((actions < 0) | (actions >= n))[0])
            self._fail(f"action: expected 0 … {n - 1}, got {actions[bad]}", bad)

    def _check_lengths(self, ended: NDArray[np.bool_]) -> None:
        if (
            self._length.max() >= self.max_episode_steps
            and (late := (self._length >= self.max_episode_steps) & ~ended).any()
        ):
            self._fail(
                f"expected an episode to end within {self.max_episode_steps:,} steps, and this one did not. Set its longest "
                f"length: gymnasium.make(…, max_episode_steps=1000), on the command line "
                f"--options.max_episode_steps=1000, or gymnasium.wrappers.TimeLimit",
                int(np.flatnonzero(late)[0]),
            )

    def _fail(self, message: str, env: int | None = None) -> NoReturn:
        place = "" if env is None else f", env {env}, step {self._length[env]} of its episode"
        raise ValueError(f"{self.name}{place}: {message}")


def check_vector_env(envs: Any) -> VectorEnv:
    """The same, refused with advice where it is no VectorEnv, but a single environment or anything else."""
    if isinstance(envs, VectorEnv):
        return envs
    spec = getattr(envs, "spec", None)
    raise ValueError(
        f"envs: expected a gymnasium.vector.VectorEnv, got {envs!r}; make several at once with "
        f"gymnasium.make_vec({spec.id if spec else 'ID'!r}, num_envs=8), or of a class of your own with "
        f"gymnasium.vector.SyncVectorEnv([MyEnv] * 8)"
    )


def autoreset_mode(envs: VectorEnv) -> AutoresetMode:
    """Raises ValueError where the environments do not say their mode."""
    mode = envs.metadata.get("autoreset_mode")
    try:
        return AutoresetMode(mode)
    except ValueError:
        raise ValueError(
            f"envs: expected a VectorEnv with metadata['autoreset_mode'], by which ends of episodes are read, got "
            f"{mode!r} in {envs}; set it to the gymnasium.vector.AutoresetMode that the environment has"
        ) from None


def env_name(envs: VectorEnv) -> str:
    """The id of the environments in gymnasium, or the name of their class."""
    first = _first(envs)
    return first.spec.id if first.spec else type(first.unwrapped).__name__


def max_episode_steps(envs: VectorEnv) -> int:
    """MAX_EPISODE_STEPS, or what the environments say by their spec or `episode_length` where it is more."""
    spec = _first(envs).spec
    return max(MAX_EPISODE_STEPS, (spec and spec.max_episode_steps) or 0, getattr(envs.unwrapped, "episode_length", 0))


def _first(envs: VectorEnv) -> VectorEnv | gymnasium.Env[Any, Any]:
    """Of several environments stepped one by one the first, otherwise all."""
    return envs if envs.spec else getattr(envs.unwrapped, "envs", [envs])[0]
