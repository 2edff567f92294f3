"""What is seen, done and earned, as one vector a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import ArrayLike
from torch import Tensor, nn

from hqlt.agent.observation import Space, Tree, check_observation_space, subspaces

CUSTOM_ENCODER = "PPO(…, encoder=Encoder(observation=YOUR_MODULE, observation_width=…, actions=…, hidden_size=…))"


class ImageEncoder(nn.Module):
    """Convolutions of kernel 2 and stride 1 over uint8 images, then a linear map; pixels as x / 255.

    Images are channels, height, width; those with their channels last, as gymnasium's own, are turned around.
    Source: the paper's visual match, after Ni et al. 2023: 8 and 16 channels, 100 features.
    """

    def __init__(self, shape: tuple[int, int, int], width: int, channels: Sequence[int] = (8, 16)) -> None:
        super().__init__()
        self.shape, self.width = shape, width
        self.channels_last = shape[-1] <= 4 < shape[0]
        first, height, across = (shape[-1], *shape[:2]) if self.channels_last else shape
        inner = (height - len(channels)) * (across - len(channels))
        if inner <= 0 or min(height, across) <= len(channels):
            raise ValueError(
                f"expected images of more than {len(channels)}×{len(channels)} pixels, got shape {list(shape)}; "
                f"give an encoder of your own: {CUSTOM_ENCODER}"
            )
        layers: list[nn.Module] = []
        for before, after in zip((first, *channels), channels, strict=False):
            layers += [nn.Conv2d(before, after, kernel_size=2), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels[-1] * inner, width), nn.ReLU())

    def forward(self, image: Tensor) -> Tensor:
        """[..., channels, height, width] → [..., width]."""
        check_shape(image, self.shape)
        if self.channels_last:
            image = image.movedim(-1, -3)
        weight = next(self.parameters())
        out: Tensor = self.layers(image.flatten(0, -4).to(weight.dtype) / 255)
        return out.unflatten(0, image.shape[:-3])


class VectorEncoder(nn.Module):
    """ReLU(W x + b) of all of an observation's numbers."""

    def __init__(self, shape: tuple[int, ...], width: int) -> None:
        super().__init__()
        self.shape, self.width = shape, width
        self.linear = nn.Linear(int(np.prod(shape)), width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.linear(flattened(x, self.shape).to(self.linear.weight.dtype)))


class SymbolEncoder(nn.Module):
    """One learned vector a symbol; of several numbers the sum of one for each, from a table of its own.

    symbols, start: how many symbols each number may be, and the first of them.
    """

    offsets: Tensor
    """[k] what makes symbols of different numbers, and of different starts, different rows of one table."""

    def __init__(self, symbols: ArrayLike, start: ArrayLike, width: int) -> None:
        super().__init__()
        counts = np.asarray(symbols)
        self.shape, self.width = counts.shape, width
        self.embedding = nn.Embedding(int(counts.sum()), width)
        offsets = counts.cumsum() - counts.ravel() - np.asarray(start).ravel()
        self.register_buffer("offsets", torch.from_numpy(offsets.astype(np.int64)), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.embedding(flattened(x, self.shape).long() + self.offsets).sum(dim=-2)


class EntriesEncoder(nn.Module):
    """The entries of a dictionary or tuple, each by an encoder of its own, side by side."""

    def __init__(self, encoders: Mapping[Any, nn.Module]) -> None:
        super().__init__()
        self.keys = list(encoders)
        self.encoders = nn.ModuleList(encoders.values())
        self.width = sum(output_width(encoder) for encoder in self.encoders)

    def forward(self, x: Tree) -> Tensor:
        return torch.cat([encoder(x[key]) for key, encoder in zip(self.keys, self.encoders, strict=True)], dim=-1)


def output_width(encoder: nn.Module) -> int:
    """Of what an encoder of observations puts out."""
    return int(encoder.width)  # type: ignore[arg-type]


def flattened(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """[..., *shape] → [..., numbers]."""
    check_shape(x, shape)
    return x.flatten(x.dim() - len(shape)) if shape else x[..., None]


def check_shape(x: Tensor, shape: tuple[int, ...]) -> None:
    if x.shape[x.dim() - len(shape) :] != shape:
        raise ValueError(
            f"observation: expected shape [..., {', '.join(map(str, shape))}], as in the environments that the encoder "
            f"was built for, got {list(x.shape)}"
        )


def observation_encoder(space: Space, width: int, name: str = "observation_space") -> nn.Module:
    """uint8 images by convolutions, other boxes and MultiBinary by a linear map, Discrete and MultiDiscrete by
    embeddings; the entries of Dict and Tuple side by side, each of this width.

    Raises ValueError that names the entry for which there is no encoder.
    """
    check_observation_space(space, name)
    parts = subspaces(space)
    if parts is not None:
        return EntriesEncoder(
            {key: observation_encoder(part, width, f"{name}[{key!r}]") for key, part in parts.items()}
        )
    match space:
        case spaces.Box(dtype=np.uint8, shape=(first, second, third)):
            try:
                return ImageEncoder((first, second, third), width)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        case spaces.Discrete(n=symbols, start=start) | spaces.MultiDiscrete(nvec=symbols, start=start):
            return SymbolEncoder(symbols, start, width)
        case _:
            return VectorEncoder(tuple(space.shape or ()), width)


class Encoder(nn.Module):
    """W [observation; previous action; previous reward] + b: [..., d].

    At the first step of an episode there is no previous action (−1), which has a vector of its own.

    observation: a module from observations [..., *shape] to [..., observation_width]; where an observation is a
    dictionary or a tuple, it is called with a dictionary or a tuple of tensors.

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

    def forward(self, observation: Tree, previous_action: Tensor, previous_reward: Tensor) -> Tensor:
        parts = self.observation(observation), self.action(previous_action), self.reward(previous_reward)
        return self.out(torch.cat(parts, dim=-1))


def build_encoder(observation_space: Space, action_space: Space, hidden_size: int) -> Encoder:
    """The encoder for these spaces, of one copy of the environment.

    Raises ValueError for observations for which there is no encoder, and for actions that are not Discrete.
    """
    encoder = observation_encoder(observation_space, hidden_size)
    return Encoder(encoder, output_width(encoder), int(check_discrete(action_space).n), hidden_size)


def check_discrete(space: Space) -> spaces.Discrete:
    """The space of actions, refused if it is not Discrete."""
    if not isinstance(space, spaces.Discrete):
        raise ValueError(
            f"action_space: expected Discrete, of one copy (envs.single_action_space), got {space}; "
            f"gymnasium.wrappers.TransformAction makes others discrete"
        )
    return space
