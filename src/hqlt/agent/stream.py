"""Parallel environments with one interface for all autoreset modes, and checks at every step."""

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
"""Maximum length of an episode, unless the environment declares a larger one."""

Result = TypeVar("Result")


class Step(NamedTuple):
    """Result of one action in each of n environments. Observations are arrays, or dictionaries or tuples of arrays."""

    successor: Tree
    """[n, ...] observation after the action; for an ended episode its last observation."""
    observation: Tree
    """[n, ...] observation from which the next action is chosen."""
    first: NDArray[np.bool_]
    """[n] True where `observation` is the first of an episode."""
    reward: NDArray[np.float32]
    """[n]."""
    terminated: NDArray[np.bool_]
    """[n] True where the episode terminated: nothing follows."""
    truncated: NDArray[np.bool_]
    """[n] True where the episode was truncated: returns are bootstrapped beyond its end."""
    live: NDArray[np.bool_]
    """[n] True where the action took effect; False where the environment only reset itself."""
    success: NDArray[np.float32]
    """[n] success of the ended episodes by their info, 0 or 1; NaN if not reported or not ended."""

    @property
    def ended(self) -> NDArray[np.bool_]:
        return self.terminated | self.truncated


class Stream:
    """A `gymnasium.vector.VectorEnv` whose steps look the same in all three autoreset modes.

    NEXT_STEP    an ended env returns its last observation; its next action only resets it (`live` is False)
    SAME_STEP    an ended env returns the next episode's first observation; its last one is in infos["final_obs"]
    DISABLED     ended envs are reset here, immediately

    Every step is checked. Errors name the environment, its index and the step of its episode.

    Args:
        envs: n parallel environments with Discrete actions.

    Raises:
        ValueError: when an environment raises an exception; an observation does not belong to its space; an observation
            or a reward is NaN or infinite; an action is out of range; or an episode takes more than MAX_EPISODE_STEPS
            steps, or than the environment's own `max_episode_steps` if that is larger.
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
        """Start an episode in every environment; returns the first observations [n, ...]."""
        self._resetting = np.zeros(self.num_envs, dtype=bool)
        self._length = np.zeros(self.num_envs, dtype=np.int64)
        return self._checked(self._call(self.envs.reset, seed=seed)[0], "observation")

    def step(self, actions: NDArray[np.int64]) -> Step:
        """Take one action per environment, int [n], counted from 0."""
        self._check_actions(actions)
        live = ~self._resetting
        self._length += live
        received, reward, terminated, truncated, infos = self._call(self.envs.step, actions + int(self._actions.start))
        observation = self._checked(received, "observation")
        terminated = self._column(terminated, np.bool_, "terminated") & live
        truncated = self._column(truncated, np.bool_, "truncated") & live
        rewards = np.where(live, self._column(reward, np.float32, "reward"), np.float32(0))
        if not np.isfinite(rewards).all():
            bad = int(np.flatnonzero(~np.isfinite(rewards))[0])
            self._fail(f"reward: expected a finite number, got {np.asarray(reward)[bad]}", bad)
        ended = terminated | truncated
        self._check_lengths(ended)
        successor, first, final_infos = observation, ended, infos
        match self.mode:
            case AutoresetMode.NEXT_STEP:
                first, self._resetting = self._resetting, ended
            case AutoresetMode.SAME_STEP if ended.any():
                successor = self._with_final_observations(observation, infos, ended)
                final_infos = infos.get("final_info", {})
            case AutoresetMode.DISABLED if ended.any():
                observation = self._reset_ended(observation, ended)
        self._length[ended] = 0
        return Step(
            successor, observation, first, rewards, terminated, truncated, live, self._success(final_infos, ended)
        )  # fmt: skip

    def _with_final_observations(self, observation: Tree, infos: dict[str, Any], ended: NDArray[np.bool_]) -> Tree:
        """Replace the observations of ended episodes by their last ones."""
        if "final_obs" not in infos:
            self._fail(
                "infos: expected 'final_obs' where an episode ended, as AutoresetMode.SAME_STEP requires, found none"
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
        """Reset the ended environments; returns the observations of all."""
        mask = ended.copy()
        again = self._checked(self._call(self.envs.reset, options={"reset_mask": mask})[0], "observation")

        def check_unchanged(before: NDArray[Any], after: NDArray[Any]) -> None:
            if (before[~ended] != after[~ended]).any():
                self._fail(
                    "reset(options={'reset_mask': …}): expected environments outside the mask to stay unchanged, got "
                    "another observation; use AutoresetMode.NEXT_STEP or SAME_STEP"
                )

        tree_map(check_unchanged, observation, again)
        return again

    def _success(self, infos: dict[str, Any], ended: NDArray[np.bool_]) -> NDArray[np.float32]:
        """infos["success"] of the ended episodes that report it; NaN for the others."""
        success = np.full(len(ended), np.nan, dtype=np.float32)
        if "success" in infos:
            reported = ended & infos.get("_success", True)
            try:
                success[reported] = np.asarray(infos["success"])[reported].astype(np.float32)
            except (TypeError, ValueError):
                self._fail(f"info['success']: expected booleans or numbers, got {infos['success']}")
        return success

    def _call(self, call: Callable[..., Result], *arguments: Any, **options: Any) -> Result:
        """Call the environments; their exceptions become a ValueError with the place in the source."""
        try:
            return call(*arguments, **options)
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            raise ValueError(
                f"{self.name}: {call.__name__}() raised {type(error).__name__}: {error} "
                f"({place.filename}, line {place.lineno})"
            ) from error

    def _checked(self, observation: Any, name: str) -> Tree:
        try:
            return checked_observation(self.envs.single_observation_space, observation, self.num_envs, name)
        except InvalidObservation as error:
            self._fail(str(error), error.env)

    def _column(self, values: Any, dtype: type[np.generic], name: str) -> NDArray[Any]:
        """One value per environment."""
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
                f"expected an episode to end within {self.max_episode_steps:,} steps, got a longer one; set a limit by "
                f"gymnasium.make(…, max_episode_steps=1000), on the command line --options.max_episode_steps=1000, or "
                f"by gymnasium.wrappers.TimeLimit",
                int(np.flatnonzero(late)[0]),
            )

    def _fail(self, message: str, env: int | None = None) -> NoReturn:
        place = "" if env is None else f", env {env}, step {self._length[env]} of its episode"
        raise ValueError(f"{self.name}{place}: {message}")


def check_vector_env(envs: Any) -> VectorEnv:
    """Return `envs`; raises ValueError with advice if it is not a VectorEnv, such as a single environment."""
    if isinstance(envs, VectorEnv):
        return envs
    spec = getattr(envs, "spec", None)
    raise ValueError(
        f"envs: expected a gymnasium.vector.VectorEnv, got {envs!r}; make parallel environments with "
        f"gymnasium.make_vec({spec.id if spec else 'ID'!r}, num_envs=8), or from your own class with "
        f"gymnasium.vector.SyncVectorEnv([MyEnv] * 8)"
    )


def autoreset_mode(envs: VectorEnv) -> AutoresetMode:
    """Return the autoreset mode; raises ValueError if the environments do not declare one."""
    mode = envs.metadata.get("autoreset_mode")
    try:
        return AutoresetMode(mode)
    except ValueError:
        raise ValueError(
            f"envs: expected a VectorEnv with metadata['autoreset_mode'], which says how episodes end, got {mode!r} in "
            f"{envs}; set it to the gymnasium.vector.AutoresetMode of the environment"
        ) from None


def env_name(envs: VectorEnv) -> str:
    """Return the gymnasium id of the environments, or the name of their class."""
    first = _first(envs)
    return first.spec.id if first.spec else type(first.unwrapped).__name__


def max_episode_steps(envs: VectorEnv) -> int:
    """Return MAX_EPISODE_STEPS, or the limit declared by the environments' spec or `episode_length` if larger."""
    spec = _first(envs).spec
    return max(MAX_EPISODE_STEPS, (spec and spec.max_episode_steps) or 0, getattr(envs.unwrapped, "episode_length", 0))


def _first(envs: VectorEnv) -> VectorEnv | gymnasium.Env[Any, Any]:
    """Return the first of several environments that are stepped one by one, otherwise the VectorEnv itself."""
    return envs if envs.spec else getattr(envs.unwrapped, "envs", [envs])[0]
