"""The base class of every algorithm: acting, collecting, learning, checkpoints."""

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
    """Report of one collection and the updates that followed it."""

    steps: int
    """Environment steps so far, summed over all parallel environments."""
    played: Evaluation
    """The training episodes that ended since the last report; may be empty."""
    losses: dict[str, float]
    """Means over the updates since the last report; empty if there were none."""


class Collected(NamedTuple):
    """Result of `Agent.collect`."""

    experience: Any
    """The argument of `Agent.learn`."""
    outcomes: Sequence[Outcome]
    """Outcomes of the episodes that ended."""
    steps: int
    """Environment steps taken, summed over all parallel environments."""


class Agent(nn.Module):
    """Base class of algorithms. A subclass defines these, and `hqlt.register("algorithm", NAME)` makes it available:

        Settings             a dataclass of its options, each with a default
        build(width)         create the heads from `self.settings` and `self.actions` → the optimizer
        logits(features)     the policy: [..., d] → [..., a]
        collect(envs, …)     play → Collected
        learn(experience)    update the weights → what to report

    An algorithm that must checkpoint more than weights, optimizer and generator, such as a replay buffer, also defines
    `carried_state` and `load_carried_state`.

    Args:
        envs: parallel environments, used only for their observation and action spaces.
        memory: the sequence model of `build_memory`, or one of your own.
        settings: an instance of `Settings`; None: the defaults.
        encoder: an encoder of your own; None: the one that `build_encoder` makes.
        seed: seeds the policy's actions and the environments that the agent trains in.
    """

    Settings: ClassVar[type[Any]]
    run_defaults: ClassVar[Mapping[str, Any]] = {}
    """Settings for which `hqlt rl train` has other defaults."""
    quick_run_defaults: ClassVar[Mapping[str, Any]] = {}
    """Settings that make a quick, poor run: for `hqlt reproduce --quick`."""
    settings: Any
    seed: Tensor
    """Seed from which those of the training environments are derived."""
    steps: Tensor
    """Environment steps so far, summed over all parallel environments."""
    left_out: Tensor
    """Number of updates skipped because the gradient was not finite."""

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
        observations, actions = check_vector_env(envs).single_observation_space, envs.single_action_space
        check_observation_space(observations)
        self.actions = int(check_discrete(actions).n)
        self.core = Core(encoder or build_encoder(observations, actions, memory.hidden_size), memory)
        self.generator = torch.Generator().manual_seed(seed)
        self.settings = self.Settings() if settings is None else settings
        for name, count in (("seed", seed), ("steps", 0), ("left_out", 0)):
            self.register_buffer(name, torch.tensor(count))
        self.optimiser = self.build(memory.hidden_size)

    def build(self, width: int) -> torch.optim.Optimizer:
        """Create the heads on features of this width; returns the optimizer of all parameters."""
        raise NotImplementedError

    def logits(self, features: Hidden) -> Tensor:
        """Return the policy's logits [..., a] from features [..., d]."""
        raise NotImplementedError

    def collect(self, envs: VectorEnv, *, stopped: Sequence[int] = ()) -> Collected:
        """Play until there is enough to learn from.

        Args:
            envs: the parallel environments.
            stopped: as in `play`.

        Raises:
            Stopped: when a stop was requested.
        """
        raise NotImplementedError

    def learn(self, experience: Any) -> dict[str, float]:
        """Update the weights.

        Args:
            experience: of `Collected`.

        Returns:
            Mean losses by name, and the gradient norm as "gradient"; {} if there was no update.
        """
        raise NotImplementedError

    def carried_state(self) -> dict[str, Tensor]:
        """Return what is carried from one collection to the next, as tensors."""
        return {}

    def load_carried_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore the result of `carried_state`."""

    def train_in(self, envs: VectorEnv, steps: int, *, stopped: Sequence[int] = ()) -> Iterator[Progress]:
        """Alternate collecting and learning until `steps` environment steps have been taken in total.

        A checkpoint may be taken at every report, and after Stopped was raised: the agent is then as it was before the
        collection. A restored agent continues exactly as the original would have, in every environment whose
        randomness is determined by `reset(seed=…)`.

        Args:
            envs: the parallel environments.
            steps: total number of environment steps, including those of earlier calls.
            stopped: as in `play`.

        Returns:
            An iterator of one report per collection.
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
        """Derive a seed for the environments, below 2³¹, from the agent's own seed and a counter alone.

        Agents with neighboring seeds get unrelated environments.
        """
        return int(np.random.SeedSequence([int(self.seed), int(count)]).generate_state(1)[0] >> 1)

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.steps.device

    def init_state(self, rows: int) -> State:
        """Return an empty memory for each row."""
        return self.core.init_state(rows)

    @torch.no_grad()
    def act(self, inputs: Inputs, state: State, *, greedy: bool = False) -> tuple[Tensor, State]:
        """Choose an action for each of b rows.

        Args:
            inputs: of one step.
            state: the memory before the step.
            greedy: take the most probable action instead of sampling.

        Returns:
            actions (int64 [b]), and the memory after the step.

        Raises:
            ValueError: when the logits are not finite: training has diverged.
        """
        features, state = self.core.step(inputs.to(self.device), state)
        logits = self.logits(features)
        if not logits.isfinite().all():
            raise ValueError(
                f"agent: expected finite logits, got NaN or infinities at step {int(self.steps)}: training has "
                f"diverged; take a smaller learning_rate"
            )
        return (logits.argmax(dim=-1) if greedy else self.draw(logits)), state

    def draw(self, logits: Tensor) -> Tensor:
        """Sample actions [b] from logits [b, a], by the agent's own generator."""
        return torch.multinomial(logits.softmax(dim=-1).cpu(), 1, generator=self.generator)[:, 0].to(logits.device)

    def update_weights(self, loss: Tensor, max_grad_norm: float | None) -> float:
        """Take one optimizer step, skipped if the gradient is not finite.

        Args:
            loss: a scalar.
            max_grad_norm: maximum gradient norm; larger gradients are scaled down. None: no limit.

        Returns:
            The gradient norm before scaling.
        """
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters(), math.inf if max_grad_norm is None else max_grad_norm)
        if norm.isfinite():
            self.optimiser.step()
        else:
            self.left_out += 1
        return norm.item()

    def checkpoint(self) -> dict[str, Tensor]:
        """Return the complete state as a flat dictionary of tensors, for safetensors.torch.save_file."""
        state = self.optimiser.state_dict()["state"]
        moments = {f"optimiser.{i}.{name}": tensor for i, entry in state.items() for name, tensor in entry.items()}
        carried = {f"carried.{name}": tensor for name, tensor in self.carried_state().items()}
        return {**self.state_dict(prefix="agent."), **moments, **carried, "generator": self.generator.get_state()}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Resume from the checkpoint of an agent with the same architecture and settings.

        Args:
            tensors: the result of `checkpoint`.

        Raises:
            RuntimeError: when weights do not fit, as from `load_state_dict`.
            KeyError: when a tensor is missing.
        """
        parts: dict[str, dict[str, Tensor]] = {"agent": {}, "optimiser": {}, "carried": {}}
        for key, tensor in tensors.items():
            part, _, name = key.partition(".")
            if part in parts:
                parts[part][name] = tensor
        moments = dict[int, dict[str, Tensor]]()
        for key, tensor in parts["optimiser"].items():
            weight, _, name = key.partition(".")
            moments.setdefault(int(weight), {})[name] = tensor.clone()
        self.load_state_dict(parts["agent"])
        self.optimiser.load_state_dict({**self.optimiser.state_dict(), "state": moments})
        self.generator.set_state(tensors["generator"].cpu())
        self.load_carried_state(parts["carried"])


def means(reports: list[dict[str, float]]) -> dict[str, float]:
    """Average each entry over the reports; {} if there are none."""
    return {name: sum(one[name] for one in reports) / len(reports) for name in reports[0]} if reports else {}
