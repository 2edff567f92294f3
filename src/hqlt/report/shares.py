"""Which memory spoke: the share of each in what the mixers put out, token by token."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hqlt.blend import Reads
from hqlt.mixer import Mixer


class Shares(NamedTuple):
    gate: Tensor
    """[layers, b, t] mean weight that the mixer gives to the FW-memory."""
    fw: Tensor
    """[layers, b, t] ‖weighted FW read‖ / (‖weighted FW read‖ + ‖weighted KV read‖), mean over heads."""


def memory_shares(model: nn.Module, inputs: Tensor, resets: Tensor | None = None) -> Shares:
    """Run a language model on tokens [b, t] and tell what each hybrid layer's memories contribute.

    A memory left idle shows here as a share near 0. Raises ValueError for a model without hybrid layers.
    """
    return shares_during(model, lambda: model(inputs, resets=resets, use_cache=False))


@torch.no_grad()
def shares_during(model: nn.Module, run: Callable[[], object]) -> Shares:
    """The same for any model with hybrid layers, of what one call of it reads: an agent's of an episode, say.

    Raises ValueError for a model without hybrid layers.
    """
    gates, shares = [], []

    def listen(mixer: nn.Module, args: tuple[Tensor | None, Reads], mixed: Tensor) -> None:
        logits, reads = args
        if reads.fw is None or reads.kv is None:
            return
        assert isinstance(mixer, Mixer)
        fw_gate, kv_gate = (torch.as_tensor(gate).expand_as(reads.fw) for gate in mixer.gates(logits))
        fw, kv = (fw_gate * reads.fw).norm(dim=-1), (kv_gate * reads.kv).norm(dim=-1)
        gates.append(fw_gate.mean(dim=(-2, -1)))
        shares.append((fw / (fw + kv).clamp_min(1e-30)).mean(dim=-1))

    hooks = [module.register_forward_hook(listen) for module in model.modules() if isinstance(module, Mixer)]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    if not shares:
        raise ValueError("model: expected at least one layer that mixes two memories, got none")
    return Shares(torch.stack(gates), torch.stack(shares))
