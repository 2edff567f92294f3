"""What the training of an agent is: an environment, a memory, an algorithm and a number of steps."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from hqlt.agent.memory_model import MODELS
from hqlt.agent.ppo import PPOSettings
from hqlt.agent.sac import SACSettings
from hqlt.agent.settings import COUNT, SEED, all_in_range
from hqlt.registry import one_of

VALIDATION_SEED, TEST_SEED = 2**32, 2**33
"""Of the episodes that are scored; copy i adds i. Those of training lie below 2³¹."""


@dataclass(frozen=True, kw_only=True)
class AgentSettings:
    """The defaults solve a T-maze in a minute: one bit, remembered along a corridor that a window cannot see."""

    world: str = "TMazePassive"
    """TMazePassive, TMazeActive, KeyToDoor, VisualMatch, or an id that gymnasium knows (MODULE:ID imports it first)."""
    options: dict[str, Any] = field(default_factory=dict)
    """The world's arguments: --options.corridor=50."""
    memory: str = "synchronous"
    """transformer, deltanet, synchronous, delayed-streaming, delayed-chunk, lstm, or none."""
    model: dict[str, Any] = field(default_factory=lambda: {"hidden_size": 32, "num_layers": 1, "window": 4})
    """Arguments of hqlt.agent.build_memory: --model.window=16."""
    algorithm: Literal["ppo", "sac"] = "ppo"
    """ppo for many copies, sac for few and for all that can be learned from an episode."""
    ppo: PPOSettings = field(default_factory=lambda: PPOSettings(learning_rate=5e-4, rollout=64, advantages="centred"))
    """If algorithm is ppo: --ppo.rollout=128."""
    sac: SACSettings = field(default_factory=lambda: SACSettings(batch_episodes=16))
    """If algorithm is sac: --sac.temperature=0.05."""
    copies: int = 64
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
    keep: int = 2
    """How many checkpoints stay, the newest."""

    def __post_init__(self) -> None:
        all_in_range(self, copies=COUNT, steps=COUNT, seed=SEED)
        all_in_range(self, evaluate_every=COUNT, episodes=COUNT, keep=COUNT)
        one_of("memory", self.memory, MODELS)
        one_of("algorithm", self.algorithm, ("ppo", "sac"))
