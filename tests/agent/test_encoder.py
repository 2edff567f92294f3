"""Encoders of observations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector.utils import batch_space
from torch.utils._pytree import tree_leaves, tree_map

from hqlt.agent import PPO, SAC, build_memory, evaluate
from hqlt.agent.encoder import Encoder, build_encoder, observation_encoder
from tests.agent.toy_envs import Cue, DictCue, sync_envs

ACTIONS = spaces.Discrete(4)
SPACES = {
    "vector": spaces.Box(-1, 1, (7,), np.float64),
    "number": spaces.Box(-1, 1, (), np.float32),
    "matrix": spaces.Box(-1, 1, (3, 4), np.float32),
    "symbol": spaces.Discrete(5, start=-2),
    "image": spaces.Box(0, 255, (3, 5, 5), np.uint8),
    "image, channels last": spaces.Box(0, 255, (7, 8, 3), np.uint8),
    "symbols": spaces.MultiDiscrete([[2, 3], [4, 2]], start=[[0, 1], [-3, 0]]),
    "flags": spaces.MultiBinary((2, 2)),
}
NESTED = spaces.Dict(
    {
        "image": SPACES["image"],
        "pair": spaces.Tuple([SPACES["vector"], SPACES["symbol"]]),
        "bag": spaces.Dict({"symbols": SPACES["symbols"], "flags": SPACES["flags"]}),
    }
)


def sampled(space, *axes):
    """Observations with these axes before their own."""
    for n in reversed(axes):
        space = batch_space(space, n)
    space.seed(0)
    return tree_map(lambda x: torch.from_numpy(np.asarray(x)), space.sample())


@pytest.mark.parametrize("space", [*SPACES.values(), NESTED], ids=[*SPACES, "nested"])
def test_a_sequence_is_encoded_step_by_step(space):
    encoder = build_encoder(space, ACTIONS, 6)
    seen = sampled(space, 2, 3)
    actions, rewards = torch.randint(-1, 4, (2, 3)), torch.randn(2, 3)
    together = encoder(seen, actions, rewards)
    assert together.shape == (2, 3, 6)
    for t in range(3):
        torch.testing.assert_close(
            encoder(tree_map(lambda x, t=t: x[:, t], seen), actions[:, t], rewards[:, t]), together[:, t]
        )
    changed = [encoder(seen, (actions + 2) % 5 - 1, rewards), encoder(seen, actions, rewards + 5)]
    assert all((other != together).any(-1).all() for other in changed)


def test_every_entry_has_its_own_encoder():
    """Features of the entries are concatenated: changing an entry changes only its part."""
    encoder = observation_encoder(NESTED, 6)
    seen = sampled(NESTED, 5)
    features = encoder(seen)
    assert features.shape == (5, encoder.width) == (5, 5 * 6)
    for i, leaf in enumerate(tree_leaves(seen)):
        before, leaf[:] = leaf.clone(), leaf.flip(0)
        changed = (encoder(seen) != features).any(0).view(5, 6).any(1).tolist()
        leaf[:] = before
        assert changed == [place == i for place in range(5)]


def test_discrete_values_are_summed_embeddings():
    encoder = observation_encoder(SPACES["symbols"], 6)
    assert encoder.embedding.weight.shape == (11, 6)
    got = encoder(torch.tensor([[[1, 3], [-1, 1]]]))
    torch.testing.assert_close(got[0], encoder.embedding.weight[[1, 4, 7, 10]].sum(0))


class Tiny(Cue):
    """The cue as an image of 2 × 2 pixels."""

    def __init__(self):
        super().__init__()
        self.observation_space = spaces.Box(0, 255, (3, 2, 2), np.uint8)

    def reset(self, *, seed=None, options=None):
        (cue, _), info = super().reset(seed=seed)
        return np.full((3, 2, 2), 255 * (cue > 0), np.uint8), info

    def step(self, action):
        _, *rest = super().step(action)
        return np.zeros((3, 2, 2), np.uint8), *rest


class CustomEncoder(torch.nn.Module):
    """A custom encoder, which uses only one entry of a dictionary."""

    def __init__(self, pixels):
        super().__init__()
        self.linear = torch.nn.Linear(pixels, 5)

    def forward(self, observation):
        image = observation["image"] if isinstance(observation, dict) else observation
        return self.linear(image.flatten(-3).float())


@pytest.mark.parametrize("make", [DictCue, Tiny])
@pytest.mark.parametrize("kind", [PPO, SAC])
def test_a_custom_encoder_is_trained(kind, make):
    """As the errors advise: for dictionaries, and for images too small for the convolutions."""
    envs = sync_envs(make, 4)
    memory = build_memory("lstm", hidden_size=8, num_layers=1)
    custom = CustomEncoder(48 if make is DictCue else 12)
    encoder = Encoder(observation=custom, observation_width=5, actions=2, hidden_size=8)
    agent = kind(envs, memory, encoder=encoder)
    before = custom.linear.weight.clone()
    reports = [progress.losses for progress in agent.train_in(envs, 600 if kind is PPO else 200) if progress.losses]
    assert reports and (custom.linear.weight != before).any()
    assert len(evaluate(agent, envs, 3).outcomes) == 3


def test_sizes_of_the_image_encoder():
    """As in the paper: 8 and 16 channels with kernel 2; (5 − 2)² · 16 numbers enter the linear layer."""
    layers = build_encoder(SPACES["image"], ACTIONS, 100).observation.layers
    assert [tuple(layer.weight.shape) for layer in layers if hasattr(layer, "weight")] == [
        (8, 3, 2, 2),
        (16, 8, 2, 2),
        (100, 144),
    ]
    encoder = build_encoder(SPACES["image, channels last"], ACTIONS, 4).observation
    image = torch.randint(255, (1, 7, 8, 3), dtype=torch.uint8)
    assert torch.equal(encoder(image), encoder.layers(image.permute(0, 3, 1, 2).float() / 255))


@pytest.mark.parametrize(
    ("observations", "actions", "message"),
    [
        (spaces.Tuple([ACTIONS, spaces.Text(3)]), ACTIONS, r"observation_space\[1\]: expected Box.*FilterObservation"),
        (
            spaces.Box(0, 255, (3, 2, 2), np.uint8),
            ACTIONS,
            "observation_space: .*more than 2×2 pixels.*encoder=Encoder",
        ),
        (spaces.Dict(a=spaces.Box(0, 255, (3, 2, 2), np.uint8)), ACTIONS, r"observation_space\['a'\]: .*2×2 pixels"),
        (ACTIONS, spaces.Box(-1, 1, (2,)), "single_action_space"),
    ],
)
def test_other_spaces_are_refused(observations, actions, message):
    with pytest.raises(ValueError, match=message):
        build_encoder(observations, actions, 8)


def test_environments_of_other_shapes_are_refused():
    encoder = build_encoder(SPACES["vector"], ACTIONS, 6)
    with pytest.raises(ValueError, match=r"observation: expected shape \[..., 7\], as in the env.*, got \[2, 6\]"):
        encoder(torch.zeros(2, 6), torch.zeros(2, dtype=torch.long), torch.zeros(2))
