"""Which KV entries stayed visible beyond the window, head by head."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hqlt.layer import HybridMemory


class KeptPairs(NamedTuple):
    """Of n KV heads, those of all layers that keep entries, and t tokens: entry j is visible to the tokens i with
    j ≤ i < until_j."""

    until: Tensor
    """int64 [n, b, t], at most t: visible to the last token."""
    leaves: Tensor
    """int64 [n, b, t], at most until: the first token that has the entry no longer in its window."""
    heads: list[tuple[int, int]]
    """The layer and the KV head of each, from 0."""

    def stayed(self) -> Tensor:
        """[n, b, t]: of the tokens that came after the entry had left the window, the share that still saw it; NaN for
        an entry that is in the window of the last token."""
        t = self.until.shape[-1]
        return (self.until - self.leaves) / (t - self.leaves)

    def at_the_end(self) -> Tensor:
        """[b, t]: the share of the heads that hold an entry for the last token."""
        return (self.until == self.until.shape[-1]).double().mean(dim=0)

    def before(self, t: int) -> KeptPairs:
        """Of the first t tokens alone."""
        return self._replace(until=self.until[..., :t].clamp(max=t), leaves=self.leaves[..., :t].clamp(max=t))


def kept_pairs(model: nn.Module, inputs: Tensor, resets: Tensor | None = None) -> KeptPairs:
    """Run a language model on tokens [b, t] and tell until when its layers' KV entries stayed visible.

    Raises ValueError for a model that keeps none beyond its windows.
    """
    return kept_during(model, lambda: model(inputs, resets=resets, use_cache=False))


@torch.no_grad()
def kept_during(model: nn.Module, run: Callable[[], object]) -> KeptPairs:
    """The same for any model with layers that keep entries, of what one call of it reads: an agent's of an episode.

    Raises ValueError for a model that keeps none beyond its windows.
    """
    until, leaves, heads = list[Tensor](), list[Tensor](), list[tuple[int, int]]()

    def listen(number: int, layer: HybridMemory, kv: nn.Module, args: tuple[Any, ...]) -> None:
        q, *_, candidates = args
        t = q.shape[1]
        older = candidates.expiry.shape[1] - t
        end, position = (candidates.expiry[:, older:] - older).clamp(max=t), candidates.positions[:, older:]
        index = torch.arange(t, device=q.device)[:, None]
        until.append(end.movedim(2, 0))
        leaves.append((layer.blend.leave_position(position) - position + index).minimum(end).movedim(2, 0))
        heads.extend((number, head) for head in range(end.shape[2]))

    layers = [part for part in model.modules() if isinstance(part, HybridMemory)]
    hooks = [
        layer.kv.register_forward_pre_hook(functools.partial(listen, number, layer))
        for number, layer in enumerate(layers)
        if layer.kv is not None and layer.kv.kept
    ]
    if not hooks:
        raise ValueError(
            "model: expected at least one layer that keeps entries beyond its window, got none; give it a retention "
            "(`hqlt.with_retention`)"
        )
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return KeptPairs(torch.cat(until), torch.cat(leaves), heads)


def marked(pairs: KeptPairs, texts: Sequence[str]) -> list[dict[str, Any]]:
    """For a page: each token's text, the share of heads that hold it at the end, and what is said of it. The first row
    of the batch."""
    n, _, t = pairs.until.shape
    held, recent = (pairs.until[:, 0] == t).sum(dim=0).tolist(), (pairs.leaves[:, 0] == t).all(dim=0).tolist()
    seen = (pairs.until[:, 0] - torch.arange(t, device=pairs.until.device)).double().mean(dim=0).tolist()
    return [
        {
            "text": text,
            "share": 0.0 if in_window else heads / n,
            "recent": in_window,
            "title": f"token {token + 1}: "
            + ("in the window" if in_window else f"held by {heads} of {n} heads; seen by {tokens:.0f} tokens"),
        }
        for token, (text, heads, in_window, tokens) in enumerate(zip(texts, held, recent, seen, strict=True))
    ]
