"""What is seen, done and earned, as one vector a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn


class ImageEncoder(nn.Module):
    """Convolutions of kernel 2 and stride 1 over uint8 images, then a linear map; pixels as x / 255.

    Images are channels, height, width; those with their channels last, as gymnasium's own, are turned around.
    Source: the paper's visual match, after Ni et al. 2023: 8 and 16 channels, 100 features.
    """

    def __init__(self, shape: tuple[int, int, int], width: int, channels: Sequence[int] = (8, 16)) -> None:
        super().__init__()
        self.channels_last = shape[-1] <= 4 < shape[0]
        first, height, across = (shape[-1], *shape[:2]) if self.channels_last else shape
        inner = (height - len(channels)) * (across - len(channels))
        if inner <= 0 or min(height, across) <= len(channels):
            raise ValueError(
                f"observation_space: expected images of more than {len(channels)}×{len(channels)} pixels, got shape "
                f"{list(shape)}; give an encoder of your own to Encoder(observation=…)"
            )
        layers: list[nn.Module] = []
        for before, after in zip((first, *channels), channels, strict=False):
            layers += [nn.Conv2d(before, after, kernel_size=2), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels[-1] * inner, width), nn.ReLU())

    def forward(self, image: Tensor) -> Tensor:
        """[..., channels, height, width] → [..., width]."""
        if self.channels_last:
            image = image.movedim(-1, -3)
        weight = next(self.parameters())
        out: Tensor = self.layers(image.flatten(0, -4).to(weight.dtype) / 255)
        return out.unflatten(0, image.shape[:-3])


class VectorEncoder(nn.Module):
    """ReLU(W x + b) of all of an observation's numbers."""

    def __init__(self, shape: tuple[int, ...], width: int) -> None:
        super().__init__()
        self.axes = len(shape)
        self.linear = nn.Linear(int(np.prod(shape)), width)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(x.dim() - self.axes) if self.axes else x[..., None]
        return torch.relu(self.linear(flat.to(self.linear.weight.dtype)))


class SymbolEncoder(nn.Module):
    """One learned vector a symbol, of those from `start` on."""

    def __init__(self, symbols: int, start: int, width: int) -> None:
        super().__init__()
        self.start = start
        self.embedding = nn.Embedding(symbols, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.embedding(x.long() - self.start)


def observation_encoder(space: spaces.Space[Any], width: int) -> nn.Module:
    """uint8 images by convolutions, other boxes by a linear map, Discrete by embeddings."""
    match space:
        case spaces.Box(dtype=np.uint8, shape=(first, second, third)):
            return ImageEncoder((first, second, third), width)
        case spaces.Box(shape=shape):
            return VectorEncoder(shape, width)
        case spaces.Discrete(n=n, start=start):
            return SymbolEncoder(int(n), int(start), width)
        case _:
            raise ValueError(
                f"observation_space: expected Box or Discrete, got {space}; make it a Box with "
                f"gymnasium.wrappers.FlattenObservation, or give an encoder of your own to Encoder(observation=…)"
            )


class Encoder(nn.Module):
    """W [observation; previous action; previous reward] + b: [..., d].

    At the first step of an episode there is no previous action (−1), which has a vector of its own.

    observation: a module from observations [..., *shape] to [..., observation_width].

    Source: Ni et al. 2023, "When Do Transformers Shine in RL?", appendix.
    """

    def __init__(
        self, observation: nn.Module, observation_width: int, actions: int, hidden_size: int, width: int = 16
    ) -> None:
        super().__init__()
        self.observation = observation
        self.action = SymbolEncoder(actions + 1, -1, width)
        self.reward = VectorEncoder((), width)
        self.out = nn.Linear(observation_width + 2 * width, hidden_size)

    def forward(self, observation: Tensor, previous_action: Tensor, previous_reward: Tensor) -> Tensor:
        parts = self.observation(observation), self.action(previous_action), self.reward(previous_reward)
        return self.out(torch.cat(parts, dim=-1))


def build_encoder(observation_space: spaces.Space[Any], action_space: spaces.Space[Any], hidden_size: int) -> Encoder:
    """The encoder for these spaces, of one copy of the environment.

    Raises ValueError for actions that are not Discrete.
    """
    return Encoder(
        observation_encoder(observation_space, hidden_size), hidden_size, int(discrete(action_space).n), hidden_size
    )


def discrete(space: spaces.Space[Any]) -> spaces.Discrete:
    """The space of actions, refused if it is not Discrete."""
    if not isinstance(space, spaces.Discrete):
        raise ValueError(
            f"action_space: expected Discrete, of one copy (envs.single_action_space), got {space}; "
            f"gymnasium.wrappers.TransformAction makes others discrete"
        )
    return space
