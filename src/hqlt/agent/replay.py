"""A replay buffer of complete episodes."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten, treespec_dumps, treespec_loads

from hqlt.agent.episode import Batch, Episode
from hqlt.agent.observation import Tree


class Replay:
    """Replay buffer of the latest complete episodes, sampled uniformly with replacement.

    After `load_state_dict` it samples exactly what the original would have sampled.

    Args:
        capacity (steps): maximum total length; the oldest episodes are removed first.
        seed: of the buffer's own random generator.

    Example:
        >>> from hqlt.agent import Replay, build_memory, make_worlds, play, SAC
        >>> envs, replay = make_worlds("TMazePassive", 4, seed=0, corridor=3), Replay(capacity=1000)
        >>> for episode in play(SAC(envs, build_memory("none", hidden_size=8)), envs, 4):
        ...     replay.add(episode)
        >>> replay.sample(2).rewards.shape
        torch.Size([2, 4])
    """

    def __init__(self, capacity: int, seed: int = 0) -> None:
        self.capacity = capacity
        self.episodes: deque[Episode] = deque()
        self.steps = 0
        self.generator = np.random.default_rng(seed)

    def __len__(self) -> int:
        return len(self.episodes)

    def add(self, episode: Episode) -> None:
        """Add an episode; raises ValueError if it has no steps or exceeds the capacity."""
        if not 0 < episode.length <= self.capacity:
            raise ValueError(f"episode: expected 1 to {self.capacity} steps (the capacity), got {episode.length}")
        self.episodes.append(episode)
        self.steps += episode.length
        while self.steps > self.capacity:
            self.steps -= self.episodes.popleft().length

    def sample(self, episodes: int) -> Batch:
        """Draw a batch of episodes; raises ValueError if the buffer is empty."""
        if not self.episodes:
            raise ValueError("replay: expected episodes to draw from, got none; add some first")
        return Batch.from_episodes(
            [self.episodes[i] for i in self.generator.integers(len(self.episodes), size=episodes)]
        )

    def state_dict(self) -> dict[str, NDArray[Any]]:
        """Return everything as arrays, for numpy.savez or safetensors.numpy.save_file."""
        bits = json.dumps(self.generator.bit_generator.state).encode()
        arrays: dict[str, NDArray[Any]] = {
            "generator": np.frombuffer(bits, dtype=np.uint8).copy(),
            "lengths": np.array([episode.length for episode in self.episodes], dtype=np.int64),
            "terminated": np.array([episode.terminated for episode in self.episodes], dtype=bool),
            "success": np.array([episode.success for episode in self.episodes], dtype=np.float32),
        }
        if self.episodes:
            for name in ("actions", "rewards"):
                arrays[name] = np.concatenate([getattr(episode, name) for episode in self.episodes])
            observations = [episode.observations for episode in self.episodes]
            leaves, structure = tree_flatten(tree_map(lambda *parts: np.concatenate(parts), *observations))
            arrays |= {leaf_name(i): leaf for i, leaf in enumerate(leaves)}
            arrays["structure"] = np.frombuffer(treespec_dumps(structure).encode(), dtype=np.uint8).copy()
        return arrays

    def load_state_dict(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Replace the contents by those of a `state_dict`."""
        self.generator.bit_generator.state = json.loads(bytes(arrays["generator"]))
        self.episodes.clear()
        self.steps = 0
        everything: Tree = ()
        if len(arrays["lengths"]):
            structure = treespec_loads(bytes(arrays["structure"]).decode())
            leaves = [arrays[leaf_name(i)] for i in range(structure.num_leaves)]
            everything = tree_unflatten(leaves, structure)
        ends = arrays["lengths"].cumsum()
        for i, (end, n) in enumerate(zip(ends.tolist(), arrays["lengths"].tolist(), strict=True)):
            # i episodes precede this one, each with one more observation than steps
            its_own = slice(end - n + i, end + i + 1)
            observations = tree_map(lambda leaf, own=its_own: leaf[own].copy(), everything)
            actions, rewards = (arrays[name][end - n : end].copy() for name in ("actions", "rewards"))
            self.add(
                Episode(observations, actions, rewards, bool(arrays["terminated"][i]), float(arrays["success"][i]))
            )


def leaf_name(i: int) -> str:
    """Return the key of the i-th array of a nested observation; a plain observation has number 0."""
    return f"observations.{i}" if i else "observations"
