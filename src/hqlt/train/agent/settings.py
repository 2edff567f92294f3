"""Settings of the training of an agent: environment, memory, algorithm, steps."""

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
"""Seeds of evaluation and test episodes; environment i adds i. Seeds of training episodes are below 2³¹."""


@dataclass(frozen=True, kw_only=True)
class AgentSettings:
    """Settings of a training run. The defaults solve a T-maze, whose corridor exceeds the window, in a minute."""

    env: str = "TMazePassive"
    """TMazePassive, TMazeActive, KeyToDoor, VisualMatch, or a gymnasium id (MODULE:ID imports MODULE first)."""
    options: dict[str, Any] = field(default_factory=dict)
    """Arguments of the environment: --options.corridor=50."""
    memory: str = "synchronous"
    """Memory: transformer, deltanet, synchronous, delayed-streaming, delayed-chunk, lstm, or none."""
    model: dict[str, Any] = field(default_factory=lambda: {"hidden_size": 32, "num_layers": 1, "window": 4})
    """Arguments of the memory (hqlt.agent.build_memory): --model.window=16."""
    algorithm: str = "ppo"
    """Algorithm: ppo for many parallel environments, sac (off-policy) for few, or a registered one."""
    hyperparameters: Any = None
    """The algorithm's Settings, or a mapping of some of their fields; None: the algorithm's `run_defaults`."""
    num_envs: int = 64
    """Number of parallel environments."""
    steps: int = 200_000
    """Environment steps, summed over all parallel environments."""
    seed: int = 0
    """Seed of initial weights, environments and actions."""
    evaluate_every: int = 20_000
    """Steps between evaluations; a checkpoint is saved with each. The last step is always evaluated. PPO restarts all
    episodes at an evaluation, so use much more than num_envs × the longest episode."""
    episodes: int = 20
    """Greedy episodes per evaluation, the same ones each time; as many others are used for the final test."""
    keep_checkpoints: int = 2
    """Number of newest checkpoints to keep."""

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
        """Class of the algorithm; raises ValueError if it is not registered."""
        kind: type[Agent] = find("algorithm", self.algorithm)
        return kind

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> AgentSettings:
        """Build settings from a mapping in which each algorithm's hyperparameters stand under its name.

        The hyperparameters of algorithms other than the chosen one are ignored.
        """
        groups = {option_prefix(name) for name in names("algorithm")}
        own = {name: value for name, value in given.items() if name not in groups}
        chosen = option_prefix(own.get("algorithm", cls.algorithm))
        return cls(**own, hyperparameters=given.get(chosen))

    def as_json(self) -> dict[str, Any]:
        """Return the mapping that `from_dict` takes, JSON compatible."""
        fields = dataclasses.asdict(self)
        fields[option_prefix(self.algorithm)] = fields.pop("hyperparameters")
        return dict(json.loads(json.dumps(fields)))


def option_prefix(algorithm: str) -> str:
    """Return the prefix of an algorithm's options: "ppo" in --ppo.rollout-steps=64."""
    return algorithm.replace("-", "_")
