"""What the agents here share: a core, a way to act, and to be put aside and gone on with exactly."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from torch import Tensor, nn

from hqlt.agent.collect import Evaluation
from hqlt.agent.core import Core, Inputs
from hqlt.agent.encoder import Encoder, build_encoder, discrete
from hqlt.agent.memory_model import MemoryModel, State
from hqlt.agent.observation import readable
from hqlt.agent.stream import vector_envs
from hqlt.shapes import Hidden


class Progress(NamedTuple):
    """What can be told after collecting and learning from it."""

    steps: int
    """Steps of the environment so far, of all copies."""
    played: Evaluation
    """The episodes that ended since the last time; may be none."""
    losses: dict[str, float]
    """Means over the updates since the last time; empty if there were none."""


class Agent(nn.Module):
    """An encoder and a memory, and heads on top of them."""

    seed: Tensor
    """What the environments that it trains in are seeded from."""
    steps: Tensor
    """Steps of the environment so far, of all copies."""
    left_out: Tensor
    """Updates whose gradient was not finite, which were not made."""
    optimiser: torch.optim.Optimizer
    goes_on_between_rounds: ClassVar[bool]
    """Whether a checkpoint may be taken at any Progress, and not only at the end of `train_in`, to go on exactly."""

    def __init__(self, envs: VectorEnv, memory: MemoryModel, encoder: Encoder | None, seed: int) -> None:
        super().__init__()
        seen, acted = vector_envs(envs).single_observation_space, envs.single_action_space
        readable(seen)
        self.actions = int(discrete(acted).n)
        self.core = Core(encoder or build_encoder(seen, acted, memory.hidden_size), memory)
        self.generator = torch.Generator().manual_seed(seed)
        self.register_buffer("seed", torch.tensor(seed))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.register_buffer("left_out", torch.zeros((), dtype=torch.long))

    def logits(self, features: Hidden) -> Tensor:
        """[..., d] → [..., a]."""
        raise NotImplementedError

    def train_in(self, envs: VectorEnv, steps: int, *, stopped: Sequence[int] = ()) -> Iterator[Progress]:
        """Collect and learn until `steps` steps of the environment are done, in all, and report now and then.

        stopped: looked at before each step, as by `play`.
        """
        raise NotImplementedError

    def seed_of(self, count: Tensor) -> int:
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

    def descend(self, loss: Tensor, clip: float | None) -> float:
        """One step of the optimiser, left out where the gradient is not finite → its norm, before it was clipped."""
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters(), math.inf if clip is None else clip)
        if norm.isfinite():
            self.optimiser.step()
        else:
            self.left_out += 1
        return norm.item()

    def checkpoint(self) -> dict[str, Tensor]:
        """Weights, the optimiser's averages and the generator, as tensors: for safetensors.torch.save_file."""
        state = self.optimiser.state_dict()["state"]
        averages = {
            f"optimiser.{i}.{name}": tensor for i, of_weight in state.items() for name, tensor in of_weight.items()
        }
        return {**self.state_dict(prefix="agent."), **averages, "generator": self.generator.get_state()}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from a checkpoint of an agent built alike.

        Raises RuntimeError for weights that do not fit, as load_state_dict does.
        """
        weights, averages = dict[str, Tensor](), dict[int, dict[str, Tensor]]()
        for key, tensor in tensors.items():
            part, _, name = key.partition(".")
            if part == "agent":
                weights[name] = tensor
            elif part == "optimiser":
                weight, _, name = name.partition(".")
                averages.setdefault(int(weight), {})[name] = tensor.clone()
        self.load_state_dict(weights)
        self.optimiser.load_state_dict({**self.optimiser.state_dict(), "state": averages})
        self.generator.set_state(tensors["generator"].cpu())


def means(told: list[dict[str, float]]) -> dict[str, float]:
    """The mean of each number told."""
    return {name: sum(one[name] for one in told) / len(told) for name in told[0]} if told else {}
