"""The contribution of each memory to the output of the mixers, token by token."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hqlt.blend import Reads
from hqlt.mixer import Mixer


class Shares(NamedTuple):
    """Contributions of the FW-memories of all hybrid layers; the rest is the KV-memories'."""

    gate: Tensor
    """[layers, b, t]: mean weight that the mixer gives to the FW-memory."""
    fw: Tensor
    """[layers, b, t]: ‖weighted FW read‖ / (‖weighted FW read‖ + ‖weighted KV read‖), mean over heads."""


def memory_shares(model: nn.Module, inputs: Tensor, resets: Tensor | None = None) -> Shares:
    """Run a language model on a text, and record how much each hybrid layer's memories contribute.

    A memory that the model does not use has a share near 0.

    Args:
        model: a language model with hybrid layers.
        inputs (int64 [b, t]): tokens.
        resets (Bool[b, t]): True for tokens that begin a new segment. Default: none.

    Returns:
        The shares of all hybrid layers.

    Raises:
        ValueError: if no layer mixes two memories.

    Example:
        >>> import hqlt, torch
        >>> from hqlt.report import memory_shares
        >>> model = hqlt.HQLTForCausalLM(hqlt.preset("tiny")).eval()
        >>> shares = memory_shares(model, torch.tensor([list(b"some text")]))
        >>> len(shares.fw) == model.config.num_hidden_layers
        True
    """
    return shares_during(model, lambda: model(inputs, resets=resets, use_cache=False))


@torch.no_grad()
def shares_during(model: nn.Module, run: Callable[[], object]) -> Shares:
    """Like `memory_shares`, for any model and any call of it, such as an agent that reads an episode.

    Args:
        model: contains the layers.
        run: calls the model, once.

    Returns:
        The shares of all hybrid layers.

    Raises:
        ValueError: if no layer mixes two memories.
    """
    gates, shares = [], []

    def record(mixer: nn.Module, args: tuple[Tensor | None, Reads], mixed: Tensor) -> None:
        logits, reads = args
        if reads.fw is None or reads.kv is None:
            return
        assert isinstance(mixer, Mixer)
        fw_gate, kv_gate = (torch.as_tensor(gate).expand_as(reads.fw) for gate in mixer.gates(logits))
        fw, kv = (fw_gate * reads.fw).norm(dim=-1), (kv_gate * reads.kv).norm(dim=-1)
        gates.append(fw_gate.mean(dim=(-2, -1)))
        shares.append((fw / (fw + kv).clamp_min(1e-30)).mean(dim=-1))

    hooks = [module.register_forward_hook(record) for module in model.modules() if isinstance(module, Mixer)]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    if not shares:
        raise ValueError("model: expected at least one layer that mixes two memories, got none")
    return Shares(torch.stack(gates), torch.stack(shares))
