"""Copies of an environment as streams of steps, whatever they do when an episode ends."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from numpy.typing import NDArray

from hqlt.agent.encoder import discrete


class Step(NamedTuple):
    """What one action in each of n copies led to."""

    successor: NDArray[Any]
    """[n, ...] what is seen after the action: the last observation of an episode that ended."""
    observation: NDArray[Any]
    """[n, ...] what the next action is chosen from."""
    first: NDArray[np.bool_]
    """[n] that observation begins an episode."""
    reward: NDArray[np.float32]
    terminated: NDArray[np.bool_]
    truncated: NDArray[np.bool_]
    """[n] the episode was cut short: what would have come still counts."""
    live: NDArray[np.bool_]
    """[n] the action was played; False where a copy only began its next episode."""
    success: NDArray[np.float32]
    """[n] what an ended episode's info says of its success, 0 or 1; NaN where it says nothing or has not ended."""

    @property
    def ended(self) -> NDArray[np.bool_]:
        return self.terminated | self.truncated


class Stream:
    """A `gymnasium.vector.VectorEnv` in which the three autoreset modes look alike.

    NEXT_STEP    an ended copy shows its last observation, and its next action only begins the next episode (live False)
    SAME_STEP    an ended copy shows the next episode's first observation at once; its last is in infos["final_obs"]
    DISABLED     ended copies are reset here, at once
    """

    def __init__(self, envs: VectorEnv) -> None:
        mode = envs.metadata.get("autoreset_mode")
        if mode is None:
            raise ValueError(
                f"envs: expected a VectorEnv with metadata['autoreset_mode'], by which ends of episodes are read, "
                f"got none in {envs}; set it to the gymnasium.vector.AutoresetMode that the environment has"
            )
        self.envs = envs
        self.mode = AutoresetMode(mode)
        self.copies: int = envs.num_envs
        self._first_action = int(discrete(envs.single_action_space).start)
        self._beginning = np.zeros(self.copies, dtype=bool)

    def reset(self, seed: int | None = None) -> NDArray[Any]:
        """Begin an episode in every copy → [n, ...]."""
        self._beginning = np.zeros(self.copies, dtype=bool)
        return np.array(self.envs.reset(seed=seed)[0])

    def step(self, actions: NDArray[np.int64]) -> Step:
        """actions: [n], from 0."""
        seen, reward, terminated, truncated, infos = self.envs.step(actions + self._first_action)
        observation = np.array(seen)  # a copy: environments may reuse their arrays
        live = ~self._beginning
        terminated, truncated = terminated & live, truncated & live
        ended = terminated | truncated
        successor, first, told = observation, ended, infos
        match self.mode:
            case AutoresetMode.NEXT_STEP:
                first, self._beginning = self._beginning, ended
            case AutoresetMode.SAME_STEP if ended.any():
                successor = observation.copy()
                successor[ended] = np.stack(list(infos["final_obs"][ended]))
                told = infos.get("final_info", {})
            case AutoresetMode.DISABLED if ended.any():
                observation = np.array(self.envs.reset(options={"reset_mask": ended})[0])
        return Step(
            successor,
            observation,
            first,
            np.where(live, reward, 0).astype(np.float32),
            terminated,
            truncated,
            live,
            success_of(told, ended),
        )


def success_of(infos: dict[str, Any], ended: NDArray[np.bool_]) -> NDArray[np.float32]:
    """infos["success"] of the copies that ended and told it, NaN for the others."""
    success = np.full(len(ended), np.nan, dtype=np.float32)
    if "success" in infos:
        told = ended & infos.get("_success", True)
        success[told] = np.asarray(infos["success"])[told].astype(np.float32)
    return success
