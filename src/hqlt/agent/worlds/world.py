"""Base class of the environments, n in parallel; and the wrapper that makes a single one a gymnasium.Env."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar, TypeAlias

import gymnasium
import numpy as np
from gymnasium.error import ResetNeeded
from gymnasium.spaces import Discrete
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from hqlt.agent.worlds.streams import Indices, RandomStreams
from hqlt.ranges import COUNT, check_range

Observations: TypeAlias = NDArray[Any]
"""[n, …], one per environment."""
Rewards: TypeAlias = NDArray[np.float64]
Flags: TypeAlias = NDArray[np.bool_]
Step: TypeAlias = tuple[Observations, Rewards, Flags, Flags, dict[str, Any]]

ACTIONS = ("up", "down", "left", "right")
"""Names of actions 0, 1, 2, 3."""


class World(VectorEnv[Observations, NDArray[Any], NDArray[Any]]):
    """Base class: n parallel environments, each with its own time, random numbers and resets.

    A subclass implements `_begin`, `_move`, `_observations` and, for frames, `_frames`, all for many environments at
    once.

    An episode has a fixed number of steps and ends by termination, as in Ni et al. 2023. The step after the last one is
    a reset (`AutoresetMode.NEXT_STEP`, gymnasium's default): it ignores the action, gives no reward, and returns the
    next episode's first observation. `reset(options={"reset_mask": bool [n]})` resets only where True.

    `reset(seed=s)` seeds environment i with s + i, as gymnasium's SyncVectorEnv does. Its episodes do not depend on the
    number of environments. A reset without seed continues each environment's own random numbers.

    When an episode ends, info["success"] is whether it succeeded, and info["_success"] where that is valid.

    Args:
        num_envs: n.
        observation: observation space of a single environment.
        episode_length: steps of an episode.
        render_mode: "rgb_array" for frames.
    """

    metadata: dict[str, Any] = {  # noqa: RUF012  as gymnasium declares it
        "autoreset_mode": AutoresetMode.NEXT_STEP,
        "render_modes": ["rgb_array"],
        "render_fps": 10,
    }

    def __init__(
        self, num_envs: int, observation: gymnasium.Space[Any], episode_length: int, render_mode: str | None
    ) -> None:
        check_range("num_envs", num_envs, COUNT)
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise ValueError(f"render_mode: expected None or 'rgb_array', got {render_mode!r}")
        self.num_envs, self.episode_length, self.render_mode = num_envs, episode_length, render_mode
        self.single_observation_space = observation
        self.observation_space = batch_space(observation, num_envs)
        self.single_action_space = Discrete(len(ACTIONS))
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._all: Indices = np.arange(num_envs)
        self._streams = RandomStreams(num_envs)
        self._begun = False
        self._time = np.zeros(num_envs, np.int32)
        self._ended = np.zeros(num_envs, np.bool_)
        self._success = np.zeros(num_envs, np.bool_)

    @abstractmethod
    def _begin(self, env_ids: Indices) -> None:
        """Start an episode in these environments, with random numbers from their streams."""

    @abstractmethod
    def _move(self, actions: NDArray[np.intp]) -> Rewards:
        """Take one step in all environments, with `_time` already increased; set `_success`; returns rewards [n]."""

    @abstractmethod
    def _observations(self) -> Observations:
        """Return the current observations, as new arrays."""

    @abstractmethod
    def _frames(self) -> NDArray[np.uint8]:
        """Return frames [n, height, width, 3] for people, who see more than the agent."""

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observations, dict[str, Any]]:
        super().reset(seed=seed)
        mask = (options or {}).get("reset_mask")
        env_ids = self._all if mask is None else self._where(mask)
        if not self._begun:
            self._streams.seed(self._all, int(self.np_random.integers(2**63)))
            self._restart(self._all)
            self._begun = True
        if seed is not None:
            self._streams.seed(env_ids, seed)
        self._restart(env_ids)
        return self._observations(), {}

    def step(self, actions: NDArray[Any]) -> Step:
        if not self._begun:
            raise ResetNeeded("expected reset() before the first step()")
        actions = self._checked(actions)
        again, self._time = self._ended, self._time + 1
        rewards = self._move(actions)
        self._ended = self._time == self.episode_length
        infos = {"success": self._success & self._ended, "_success": self._ended.copy()} if self._ended.any() else {}
        if again.any():
            rewards[again] = 0
            self._restart(np.flatnonzero(again))
        return self._observations(), rewards, self._ended.copy(), np.zeros(self.num_envs, np.bool_), infos

    def render(self) -> tuple[NDArray[np.uint8], ...] | None:
        """Return one frame per environment; cells that are not observed are darker."""
        return None if self.render_mode is None else tuple(self._frames())

    def _restart(self, env_ids: Indices) -> None:
        self._time[env_ids] = 0
        self._ended[env_ids] = self._success[env_ids] = False
        self._begin(env_ids)

    def _checked(self, actions: NDArray[Any]) -> NDArray[np.intp]:
        actions = np.asarray(actions)
        if actions.shape != (self.num_envs,) or actions.dtype.kind not in "iu":
            raise ValueError(f"actions: expected {self.num_envs} whole numbers, got {actions.dtype} {actions.shape}")
        if actions.min() < 0 or actions.max() >= len(ACTIONS):
            raise ValueError(f"actions: expected 0 … {len(ACTIONS) - 1} ({', '.join(ACTIONS)}), got {actions}")
        return actions.astype(np.intp, copy=False)

    def _where(self, mask: Flags) -> Indices:
        if np.shape(mask) != (self.num_envs,) or np.asarray(mask).dtype != np.bool_ or not np.any(mask):
            raise ValueError(f"reset_mask: expected bool [{self.num_envs}], True at least once, got {mask}")
        return np.flatnonzero(mask)


class SingleEnv(gymnasium.Env[Observations, Any]):
    """A single environment as a gymnasium.Env, running the same code with n = 1."""

    World: ClassVar[type[World]]
    metadata: dict[str, Any] = {"render_modes": World.metadata["render_modes"], "render_fps": 10}  # noqa: RUF012

    def __init__(self, **options: Any) -> None:
        self.world = self.World(num_envs=1, **options)
        self.observation_space, self.action_space = self.world.single_observation_space, self.world.single_action_space
        self.render_mode = self.world.render_mode
        self.running = False

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observations, dict[str, Any]]:
        super().reset(seed=seed)
        self.running = True
        return self.world.reset(seed=seed)[0][0], {}

    def step(self, action: Any) -> tuple[Observations, float, bool, bool, dict[str, Any]]:
        if not self.running:
            raise ResetNeeded("expected reset() before the first step() and after an episode's end")
        observations, rewards, ended, _, infos = self.world.step(np.array([action]))
        self.running = not ended[0]
        info = {"success": bool(infos["success"][0])} if infos else {}
        return observations[0], float(rewards[0]), bool(ended[0]), False, info

    def render(self) -> NDArray[np.uint8] | None:
        frames = self.world.render()
        return frames and frames[0]  # type: ignore[return-value]
