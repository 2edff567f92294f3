"""Other CPU implementations of this package's operations, with the same signatures."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from hqlt import ops
from hqlt.blend import Blend, Reads, Tokens
from hqlt.memory import MemoryState


def delta_rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, *, state: Tensor | None = None, **_: Any
) -> tuple[Tensor, Tensor]:
    """`gated_delta_rule` with g = 0."""
    return gated_delta_rule(q, k, v, beta, torch.zeros_like(beta), state=state)


def gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor, *, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`torch_chunk_gated_delta_rule`, transformers' CPU implementation."""
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    out, final = torch_chunk_gated_delta_rule(q, k, v, decay, beta, initial_state=state, output_final_state=True)
    return out, final


def band_attention(q: Tensor, k: Tensor, v: Tensor, *, window: int, **_: Any) -> Tensor:
    """PyTorch's fused attention with a band mask."""
    t, l = q.shape[1], k.shape[1]
    age = torch.arange(l - t, l)[:, None] - torch.arange(l)
    return _heads_first(q, k, v, attn_mask=(age >= 0) & (age < window))


def full_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's fused attention, fully causal."""
    return _heads_first(q, k, v, is_causal=True)


def _heads_first(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2)


@contextlib.contextmanager
def memories(delta: Callable[..., Any], window: Callable[..., Any]) -> Iterator[None]:
    """Context manager in which the memories of every layer are computed by these two operations."""
    with mock.patch.object(ops, "delta_rule", delta), mock.patch.object(ops, "window_attention", window):
        yield


MEMORIES: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "peer delta, SDPA band": partial(memories, delta_rule, band_attention),
    "chunked, blocked": partial(
        memories, partial(ops.delta_rule, backend="chunked"), partial(ops.window_attention, backend="blocked")
    ),
    "native": contextlib.nullcontext,
}
"""Contestants of the layer and training benchmarks."""


@contextlib.contextmanager
def no_memories() -> Iterator[None]:
    """Context manager in which layers have no memories, to measure the limit. Every projection still has a gradient."""

    def forward(self: Blend, memories: object, new: Tokens, state: object, resets: object) -> tuple[Reads, MemoryState]:
        position = torch.zeros(len(new.q), dtype=torch.long)
        reads = Reads(new.q * new.gates.beta[..., None], new.keys + new.values)
        return reads, MemoryState((), (), new.q.new_zeros(len(new.q), 0, 0), position)

    with mock.patch.object(Blend, "forward", forward):
        yield
