"""What the training of an agent is: an environment, a memory, an algorithm and a number of steps."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hqlt.agent import Agent
from hqlt.agent.memory_model import memory_names
from hqlt.ranges import COUNT, SEED, check_ranges
from hqlt.registry import check_choice, find, names

VALIDATION_SEED, TEST_SEED = 2**32, 2**33
"""Of the episodes that are scored; copy i adds i. Those of training lie below 2³¹."""


@dataclass(frozen=True, kw_only=True)
class AgentSettings:
    """The defaults solve a T-maze in a minute: one bit, remembered along a corridor that a window cannot see."""

    env: str = "TMazePassive"
    """TMazePassive, TMazeActive, KeyToDoor, VisualMatch, or an id that gymnasium knows (MODULE:ID imports it first)."""
    options: dict[str, Any] = field(default_factory=dict)
    """The world's arguments: --options.corridor=50."""
    memory: str = "synchronous"
    """transformer, deltanet, synchronous, delayed-streaming, delayed-chunk, lstm, or none."""
    model: dict[str, Any] = field(default_factory=lambda: {"hidden_size": 32, "num_layers": 1, "window": 4})
    """Arguments of hqlt.agent.build_memory: --model.window=16."""
    algorithm: str = "ppo"
    """ppo for many copies, sac for few and for all that can be learned from an episode; or one that was registered."""
    hyperparameters: Any = None
    """The algorithm's Settings, or a mapping of some of their fields; None: those that it has in runs."""
    num_envs: int = 64
    """Of the environment, played side by side."""
    steps: int = 200_000
    """Of the environment, of all copies together."""
    seed: int = 0
    """Of weights, environments and actions."""
    evaluate_every: int = 20_000
    """Steps from one evaluation, and checkpoint, to the next; there is one at the end in any case. PPO's episodes end
    there: take much more than copies × the longest episode."""
    episodes: int = 20
    """Greedy episodes of an evaluation, always the same; as many others are played once, at the end."""
    keep_checkpoints: int = 2
    """How many checkpoints stay, the newest."""

    def __post_init__(self) -> None:
        check_ranges(self, num_envs=COUNT, steps=COUNT, seed=SEED)
        check_ranges(self, evaluate_every=COUNT, episodes=COUNT, keep_checkpoints=COUNT)
        check_choice("memory", self.memory, memory_names())
        given = self.agent.run_defaults if self.hyperparameters is None else self.hyperparameters
        if isinstance(given, Mapping):
            for name in given:
                check_choice(self.algorithm, name, [field.name for field in dataclasses.fields(self.agent.Settings)])
            given = self.agent.Settings(**given)
        if not isinstance(given, self.agent.Settings):
            raise ValueError(
                f"hyperparameters: expected {self.agent.Settings.__name__}, for {self.algorithm}, got {given!r}"
            )
        object.__setattr__(self, "hyperparameters", given)

    @property
    def agent(self) -> type[Agent]:
        """The class of the algorithm. Raises ValueError for one that nobody registered."""
        kind: type[Agent] = find("algorithm", self.algorithm)
        return kind

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> AgentSettings:
        """From the fields as they are typed: hyperparameters under the name of their algorithm.

        Those of other algorithms are left alone.
        """
        groups = {option_prefix(name) for name in names("algorithm")}
        own = {name: value for name, value in given.items() if name not in groups}
        asked = option_prefix(own.get("algorithm", cls.algorithm))
        return cls(**own, hyperparameters=given.get(asked))

    def as_json(self) -> dict[str, Any]:
        """What `of` takes."""
        fields = dataclasses.asdict(self)
        fields[option_prefix(self.algorithm)] = fields.pop("hyperparameters")
        return dict(json.loads(json.dumps(fields)))


def option_prefix(algorithm: str) -> str:
    """What stands before its hyperparameters where they are typed: --ppo.rollout-steps=64."""
    return algorithm.replace("-", "_")
