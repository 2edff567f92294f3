"""The latest episodes, whole, to be drawn from."""

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
    """The latest episodes, of at most `capacity` steps together; the oldest goes first.

    Episodes are drawn uniformly, with replacement, by a generator of its own: `state_dict` and `load_state_dict` give
    and take all of it as arrays, and what is drawn afterwards is the same.
    """

    def __init__(self, capacity: int, seed: int = 0) -> None:
        self.capacity = capacity
        self.episodes: deque[Episode] = deque()
        self.steps = 0
        self.generator = np.random.default_rng(seed)

    def __len__(self) -> int:
        return len(self.episodes)

    def add(self, episode: Episode) -> None:
        """Raises ValueError for an episode without steps, or longer than the capacity."""
        if not 0 < episode.length <= self.capacity:
            raise ValueError(f"episode: expected 1 to {self.capacity} steps (the capacity), got {episode.length}")
        self.episodes.append(episode)
        self.steps += episode.length
        while self.steps > self.capacity:
            self.steps -= self.episodes.popleft().length

    def sample(self, episodes: int) -> Batch:
        """Raises ValueError where nothing was added."""
        if not self.episodes:
            raise ValueError("replay: expected episodes to draw from, got none; add some first")
        return Batch.from_episodes(
            [self.episodes[i] for i in self.generator.integers(len(self.episodes), size=episodes)]
        )

    def state_dict(self) -> dict[str, NDArray[Any]]:
        """Arrays, for numpy.savez or safetensors.numpy.save_file; no episodes, no "observations"."""
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
            of_each = [episode.observations for episode in self.episodes]
            leaves, structure = tree_flatten(tree_map(lambda *parts: np.concatenate(parts), *of_each))
            arrays |= {leaf_name(i): leaf for i, leaf in enumerate(leaves)}
            arrays["structure"] = np.frombuffer(treespec_dumps(structure).encode(), dtype=np.uint8).copy()
        return arrays

    def load_state_dict(self, arrays: Mapping[str, NDArray[Any]]) -> None:
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
            # i episodes stand before this one, each with one observation more than steps
            its_own = slice(end - n + i, end + i + 1)
            observations = tree_map(lambda leaf, own=its_own: leaf[own].copy(), everything)
            actions, rewards = (arrays[name][end - n : end].copy() for name in ("actions", "rewards"))
            self.add(
                Episode(observations, actions, rewards, bool(arrays["terminated"][i]), float(arrays["success"][i]))
            )


def leaf_name(i: int) -> str:
    """Of the i-th array of a nested observation; a plain one has number 0."""
    return f"observations.{i}" if i else "observations"
