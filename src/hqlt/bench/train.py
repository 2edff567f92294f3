"""One training step of the tiny model (forward, backward, AdamW), with native, chunked and peer implementations.

With the memories removed, the rest of the model is the lower limit of a step's time. 6 operations per parameter and
token are counted, plus the memories' own, as in `hqlt.bench.ops`.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from hqlt.bench import peers
from hqlt.bench.race import Row, Work, check_equal, matrix_product_rate, race, rows

ONLY = ("256", "512")
"""Tokens per row."""


def run(rounds: int, quick: bool, only: str | None) -> list[Row]:
    ceiling = matrix_product_rate(256 if quick else 1536)
    lengths = [70] if quick else [256, 512]
    chosen = [t for t in lengths if only in (None, str(t))]
    return [row for t in chosen for row in training_race(1 if quick else 8, t, quick, rounds, ceiling)]


def training_race(b: int, t: int, quick: bool, rounds: int, ceiling: float) -> list[Row]:
    from hqlt.model import HQLTForCausalLM, preset

    small = {"hidden_size": 16, "num_heads": 2, "num_hidden_layers": 1, "window": 8} if quick else {}
    model = HQLTForCausalLM(preset("tiny", **small))
    config, tokens = model.config, torch.randint(0, model.config.vocab_size, (b, t))
    settings = peers.MEMORIES | {"memories removed: the limit": peers.no_memories}

    def gradients(name: str) -> list[Tensor]:
        with settings[name]():
            loss = model(tokens, labels=tokens).loss
            return [loss, *torch.autograd.grad(loss, list(model.parameters()))]

    check_equal({name: gradients(name) for name in peers.MEMORIES}, 1e-3)

    def training(name: str) -> Work:
        trained = copy.deepcopy(model)
        optimiser = torch.optim.AdamW(trained.parameters(), lr=1e-4, fused=True)

        def step() -> None:
            with settings[name]():
                optimiser.zero_grad()
                trained(tokens, labels=tokens).loss.backward()
                optimiser.step()

        return step

    window, k = config.window or t, config.hidden_size // config.num_heads
    own = config.num_hidden_layers * config.hidden_size * (20 * k + 14 * window)
    count = b * t * (6.0 * sum(p.numel() for p in model.parameters()) + own)
    measured = race({name: training(name) for name in settings}, count, ceiling, rounds)
    return rows("training step, tiny", (b, t, config.hidden_size, config.num_heads), {"step": measured})
