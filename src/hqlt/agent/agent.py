"""What every algorithm is: a core and heads that act, a way to collect, a way to learn, and all of it as tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from torch import Tensor, nn

from hqlt.agent.collect import Evaluation
from hqlt.agent.core import Core, Inputs
from hqlt.agent.encoder import Encoder, build_encoder, check_discrete
from hqlt.agent.episode import Outcome
from hqlt.agent.memory_model import MemoryModel, State
from hqlt.agent.observation import check_observation_space
from hqlt.agent.stream import check_vector_env
from hqlt.shapes import Hidden
from hqlt.signals import Stopped


class Progress(NamedTuple):
    """What can be told after collecting and learning from it."""

    steps: int
    """Steps of the environment so far, of all copies."""
    played: Evaluation
    """The episodes that ended since the last time; may be none."""
    losses: dict[str, float]
    """Means over the updates since the last time; empty if there were none."""


class Collected(NamedTuple):
    """What was played, as `Agent.collect` leaves it."""

    experience: Any
    """What `Agent.learn` takes."""
    outcomes: Sequence[Outcome]
    """Of the episodes that ended."""
    steps: int
    """That the environments took, of all copies."""


class Agent(nn.Module):
    """An algorithm. A subclass with five names is one, and `hqlt.register("algorithm", NAME)` lets it be chosen:

        Settings             a dataclass of its options, each with a default
        build(width)         make the heads, from `self.settings` and `self.actions` → the optimiser
        logits(features)     the policy: [..., d] → [..., a]
        collect(envs, …)     play → Collected
        learn(experience)    the updates that this calls for → what to report of them

    One with more to keep than weights, optimiser and generator has `carried` and `carry` as well.

    envs: of any number of copies, for their spaces alone. settings: an instance of Settings; None: its defaults.
    encoder: another one than `build_encoder` makes.
    """

    Settings: ClassVar[type[Any]]
    run_defaults: ClassVar[Mapping[str, Any]] = {}
    """Settings that `hqlt rl train` begins with in place of their defaults."""
    quick_run_defaults: ClassVar[Mapping[str, Any]] = {}
    """Settings with which it learns little, soon: for a look at a study."""
    settings: Any
    seed: Tensor
    """What the environments that it trains in are seeded from."""
    steps: Tensor
    """Steps of the environment so far, of all copies."""
    left_out: Tensor
    """Updates whose gradient was not finite, which were not made."""

    def __init__(
        self,
        envs: VectorEnv,
        memory: MemoryModel,
        settings: Any = None,
        *,
        encoder: Encoder | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        seen, acted = check_vector_env(envs).single_observation_space, envs.single_action_space
        check_observation_space(seen)
        self.actions = int(check_discrete(acted).n)
        self.core = Core(encoder or build_encoder(seen, acted, memory.hidden_size), memory)
        self.generator = torch.Generator().manual_seed(seed)
        self.settings = self.Settings() if settings is None else settings
        for name, count in (("seed", seed), ("steps", 0), ("left_out", 0)):
            self.register_buffer(name, torch.tensor(count))
        self.optimiser = self.build(memory.hidden_size)

    def build(self, width: int) -> torch.optim.Optimizer:
        raise NotImplementedError

    def logits(self, features: Hidden) -> Tensor:
        raise NotImplementedError

    def collect(self, envs: VectorEnv, *, stopped: Sequence[int] = ()) -> Collected:
        """stopped: looked at before each step, as by `play`; raises Stopped."""
        raise NotImplementedError

    def learn(self, experience: Any) -> dict[str, float]:
        """→ means of losses and the like, by name; "gradient" is the norm. Empty: there was no update."""
        raise NotImplementedError

    def carried_state(self) -> dict[str, Tensor]:
        """What is carried from one collection to the next."""
        return {}

    def load_carried_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Take what `carried` gave."""

    def train_in(self, envs: VectorEnv, steps: int, *, stopped: Sequence[int] = ()) -> Iterator[Progress]:
        """Collect and learn until `steps` steps of the environment are done, in all, and report each time.

        A checkpoint may be taken at any Progress. It may be taken too where Stopped is raised: the agent is then what
        it was before it collected. An agent that is restored from it does here what this one would have done, in any
        environment whose chance `reset(seed=…)` decides.
        """
        while self.steps < steps:
            before = self.generator.get_state()
            try:
                collected = self.collect(envs, stopped=stopped)
            except Stopped:
                self.generator.set_state(before)
                raise
            self.steps += collected.steps
            losses = self.learn(collected.experience)
            yield Progress(int(self.steps), Evaluation(tuple(collected.outcomes)), losses)

    def derive_seed(self, count: Tensor) -> int:
        """A seed for environments that follows from the agent's own and a count, and from nothing else.

        Below 2³¹, and for each seed and count another one; agents of neighbouring seeds do not meet in the same worlds.
        """
        return int(np.random.SeedSequence([int(self.seed), int(count)]).generate_state(1)[0] >> 1)

    @property
    def device(self) -> torch.device:
        return self.steps.device

    def init_state(self, rows: int) -> State:
        return self.core.init_state(rows)

    @torch.no_grad()
    def act(self, inputs: Inputs, state: State, *, greedy: bool = False) -> tuple[Tensor, State]:
        """Inputs of one step of b rows → actions [b]: the most probable ones, or drawn; and the memory after it."""
        features, state = self.core.step(inputs.to(self.device), state)
        logits = self.logits(features)
        if not logits.isfinite().all():
            raise ValueError(
                f"agent: expected finite logits, got NaN or infinities at step {int(self.steps)}: training has "
                f"diverged; take a smaller learning_rate"
            )
        return (logits.argmax(dim=-1) if greedy else self.draw(logits)), state

    def draw(self, logits: Tensor) -> Tensor:
        """a ~ π, by the agent's own generator: [b, a] → [b]."""
        return torch.multinomial(logits.softmax(dim=-1).cpu(), 1, generator=self.generator)[:, 0].to(logits.device)

    def update_weights(self, loss: Tensor, max_grad_norm: float | None) -> float:
        """One step of the optimiser, left out where the gradient is not finite → its norm, before it was clipped."""
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters(), math.inf if max_grad_norm is None else max_grad_norm)
        if norm.isfinite():
            self.optimiser.step()
        else:
            self.left_out += 1
        return norm.item()

    def checkpoint(self) -> dict[str, Tensor]:
        """All that it is, as tensors: for safetensors.torch.save_file."""
        state = self.optimiser.state_dict()["state"]
        averages = {
            f"optimiser.{i}.{name}": tensor for i, of_weight in state.items() for name, tensor in of_weight.items()
        }
        carried = {f"carried.{name}": tensor for name, tensor in self.carried_state().items()}
        return {**self.state_dict(prefix="agent."), **averages, **carried, "generator": self.generator.get_state()}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Resume from a checkpoint of an agent built alike.

        Raises RuntimeError for weights that do not fit, as load_state_dict does, and KeyError for what is missing.
        """
        parts: dict[str, dict[str, Tensor]] = {"agent": {}, "optimiser": {}, "carried": {}}
        for key, tensor in tensors.items():
            part, _, name = key.partition(".")
            if part in parts:
                parts[part][name] = tensor
        averages = dict[int, dict[str, Tensor]]()
        for key, tensor in parts["optimiser"].items():
            weight, _, name = key.partition(".")
            averages.setdefault(int(weight), {})[name] = tensor.clone()
        self.load_state_dict(parts["agent"])
        self.optimiser.load_state_dict({**self.optimiser.state_dict(), "state": averages})
        self.generator.set_state(tensors["generator"].cpu())
        self.load_carried_state(parts["carried"])


def means(told: list[dict[str, float]]) -> dict[str, float]:
    """The mean of each number told."""
    return {name: sum(one[name] for one in told) / len(told) for name in told[0]} if told else {}
