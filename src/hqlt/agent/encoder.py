"""Encoders: from observation, previous action and previous reward to one vector per step."""

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
    """Convolutions with kernel 2 and stride 1 over uint8 images scaled to [0, 1], then a linear layer.

    Args:
        shape: of an image: channels, height, width, or height, width, channels, as gymnasium's own are.
        width: number of features.
        channels: output channels of each convolution.

    Raises:
        ValueError: when the image is too small for the convolutions.

    Source:
        The paper's visual match, after Ni et al. 2023: 8 and 16 channels, 100 features.
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
                f"pass your own encoder: {CUSTOM_ENCODER}"
            )
        layers: list[nn.Module] = []
        for before, after in zip((first, *channels), channels, strict=False):
            layers += [nn.Conv2d(before, after, kernel_size=2), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels[-1] * inner, width), nn.ReLU())

    def forward(self, image: Tensor) -> Tensor:
        """Encode images [..., channels, height, width] as [..., width]."""
        check_shape(image, self.shape)
        if self.channels_last:
            image = image.movedim(-1, -3)
        weight = next(self.parameters())
        out: Tensor = self.layers(image.flatten(0, -4).to(weight.dtype) / 255)
        return out.unflatten(0, image.shape[:-3])


class VectorEncoder(nn.Module):
    """ReLU(W x + b), where x holds all numbers of an observation."""

    def __init__(self, shape: tuple[int, ...], width: int) -> None:
        super().__init__()
        self.shape, self.width = shape, width
        self.linear = nn.Linear(int(np.prod(shape)), width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.linear(flattened(x, self.shape).to(self.linear.weight.dtype)))


class SymbolEncoder(nn.Module):
    """One learned embedding per discrete value; an observation of several numbers gives the sum of their embeddings.

    Args:
        symbols: number of values that each number can take.
        start: smallest value of each number.
        width: size of an embedding.
    """

    offsets: Tensor
    """[k] added to the numbers to give their rows in the shared embedding table."""

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
    """The entries of a dictionary or tuple, each encoded by its own encoder and concatenated."""

    def __init__(self, encoders: Mapping[Any, nn.Module]) -> None:
        super().__init__()
        self.keys = list(encoders)
        self.encoders = nn.ModuleList(encoders.values())
        self.width = sum(output_width(encoder) for encoder in self.encoders)

    def forward(self, x: Tree) -> Tensor:
        return torch.cat([encoder(x[key]) for key, encoder in zip(self.keys, self.encoders, strict=True)], dim=-1)


def output_width(encoder: nn.Module) -> int:
    """Return the number of features of an observation encoder."""
    return int(encoder.width)  # type: ignore[arg-type]


def flattened(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Reshape [..., *shape] to [..., n]."""
    check_shape(x, shape)
    return x.flatten(x.dim() - len(shape)) if shape else x[..., None]


def check_shape(x: Tensor, shape: tuple[int, ...]) -> None:
    if x.shape[x.dim() - len(shape) :] != shape:
        raise ValueError(
            f"observation: expected shape [..., {', '.join(map(str, shape))}], as in the environments for which the "
            f"encoder was built, got {list(x.shape)}"
        )


def observation_encoder(space: Space, width: int, name: str = "observation_space") -> nn.Module:
    """Build the encoder of a space: convolutions for uint8 images, a linear layer for other boxes and MultiBinary,
    embeddings for Discrete and MultiDiscrete. The entries of Dict and Tuple are concatenated, each of this width.

    Raises:
        ValueError: when there is no encoder for an entry, which is named.
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

    "No previous action" (−1, at the first step of an episode) has its own embedding.

    Args:
        observation: a module from observations [..., *shape] to [..., observation_width]. Observations that are
            dictionaries or tuples are passed as dictionaries or tuples of tensors.
        observation_width: number of features that this module returns.
        actions: number of actions.
        hidden_size (d): width of the output.
        width: size of the embeddings of action and reward.

    Source:
        Ni et al. 2023, "When Do Transformers Shine in RL?", appendix.

    Example:
        >>> import torch
        >>> from hqlt.agent import Encoder
        >>> encoder = Encoder(torch.nn.Linear(3, 8), observation_width=8, actions=4, hidden_size=16)
        >>> encoder(torch.zeros(2, 5, 3), torch.zeros(2, 5, dtype=torch.long), torch.zeros(2, 5)).shape
        torch.Size([2, 5, 16])
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
    """Build the default encoder for an environment.

    Args:
        observation_space: of a single environment; Dict and Tuple may be nested.
        action_space: of a single environment, Discrete.
        hidden_size (d): width of the output.

    Returns:
        The encoder; its `observation` is the part that encodes observations.

    Raises:
        ValueError: when there is no encoder for the observations, or actions are not Discrete.

    Example:
        >>> from gymnasium.spaces import Box, Discrete
        >>> from hqlt.agent import build_encoder
        >>> build_encoder(Box(0, 255, (3, 5, 5), "uint8"), Discrete(4), hidden_size=32).observation.width
        32
    """
    encoder = observation_encoder(observation_space, hidden_size)
    return Encoder(encoder, output_width(encoder), int(check_discrete(action_space).n), hidden_size)


def check_discrete(space: Space) -> spaces.Discrete:
    """Return the action space; raises ValueError if it is not Discrete."""
    if not isinstance(space, spaces.Discrete):
        raise ValueError(
            f"action_space: expected Discrete (that of a single environment: envs.single_action_space), got {space}; "
            f"gymnasium.wrappers.TransformAction can make others discrete"
        )
    return space
