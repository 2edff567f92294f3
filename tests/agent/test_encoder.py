"""What an agent can see."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gymnasium import spaces

from hqlt.agent.encoder import build_encoder

ACTIONS = spaces.Discrete(4)
SEEN = {
    "vector": spaces.Box(-1, 1, (7,), np.float64),
    "number": spaces.Box(-1, 1, (), np.float32),
    "matrix": spaces.Box(-1, 1, (3, 4), np.float32),
    "symbol": spaces.Discrete(5, start=-2),
    "image": spaces.Box(0, 255, (3, 5, 5), np.uint8),
    "image, channels last": spaces.Box(0, 255, (7, 8, 3), np.uint8),
}


@pytest.mark.parametrize("space", SEEN.values(), ids=SEEN)
def test_a_sequence_is_encoded_step_by_step(space):
    encoder = build_encoder(space, ACTIONS, 6)
    space.seed(0)
    seen = torch.from_numpy(np.array([[space.sample() for _ in range(3)] for _ in range(2)]))
    actions, rewards = torch.randint(-1, 4, (2, 3)), torch.randn(2, 3)
    together = encoder(seen, actions, rewards)
    assert together.shape == (2, 3, 6)
    for t in range(3):
        torch.testing.assert_close(encoder(seen[:, t], actions[:, t], rewards[:, t]), together[:, t])
    changed = [encoder(seen, (actions + 2) % 5 - 1, rewards), encoder(seen, actions, rewards + 5)]
    assert all((other != together).any(-1).all() for other in changed)


def test_pixels_and_channels():
    """The paper's: 8 channels, then 16, of kernel 2; (5 − 2)² · 16 numbers to the linear map."""
    layers = build_encoder(SEEN["image"], ACTIONS, 100).observation.layers
    assert [tuple(layer.weight.shape) for layer in layers if hasattr(layer, "weight")] == [
        (8, 3, 2, 2),
        (16, 8, 2, 2),
        (100, 144),
    ]
    encoder = build_encoder(SEEN["image, channels last"], ACTIONS, 4).observation
    image = torch.randint(255, (1, 7, 8, 3), dtype=torch.uint8)
    assert torch.equal(encoder(image), encoder.layers(image.permute(0, 3, 1, 2).float() / 255))


@pytest.mark.parametrize(
    ("seen", "acted", "told"),
    [
        (spaces.Tuple([ACTIONS]), ACTIONS, "FlattenObservation"),
        (spaces.Box(0, 255, (3, 2, 2), np.uint8), ACTIONS, "more than 2×2 pixels"),
        (ACTIONS, spaces.Box(-1, 1, (2,)), "single_action_space"),
    ],
)
def test_other_spaces_are_refused(seen, acted, told):
    with pytest.raises(ValueError, match=told):
        build_encoder(seen, acted, 8)
