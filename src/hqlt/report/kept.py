"""How long KV entries stay visible beyond the window, by head."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hqlt.layer import HybridMemory


class KeptPairs(NamedTuple):
    """How long the KV entries of a text are visible, in n KV heads: all heads of the layers that keep entries.

    The entry of token j is visible to the tokens i with j ≤ i < until_j.
    """

    until: Tensor
    """Int64 [n, b, t]: the first token to which the entry is not visible any more; t if the last token still sees it.
    """
    leaves: Tensor
    """Int64 [n, b, t], at most `until`: the first token whose window does not contain the entry."""
    heads: list[tuple[int, int]]
    """Layer and KV head of each of the n heads, counted from 0."""

    def stayed(self) -> Tensor:
        """Share of the tokens after the entry left the window that still see it: [n, b, t].

        The share is NaN for entries in the last token's window.
        """
        t = self.until.shape[-1]
        return (self.until - self.leaves) / (t - self.leaves)

    def at_the_end(self) -> Tensor:
        """Share of the heads in which the last token sees an entry: [b, t]."""
        return (self.until == self.until.shape[-1]).double().mean(dim=0)

    def before(self, t: int) -> KeptPairs:
        """Restrict the result to the first t tokens."""
        return self._replace(until=self.until[..., :t].clamp(max=t), leaves=self.leaves[..., :t].clamp(max=t))


def kept_pairs(model: nn.Module, inputs: Tensor, resets: Tensor | None = None) -> KeptPairs:
    """Run a language model on a text, and record how long its layers' KV entries stay visible.

    Args:
        model: a language model with a retention.
        inputs (int64 [b, t]): tokens.
        resets (Bool[b, t]): True for tokens that begin a new segment. Default: none.

    Returns:
        The times, for all heads of the layers that keep entries.

    Raises:
        ValueError: if no layer keeps entries beyond its window.

    Example:
        >>> import hqlt, torch
        >>> from hqlt.report import kept_pairs
        >>> model = hqlt.HQLTForCausalLM(hqlt.preset("tiny", window=8, retention="surprise", kept=4)).eval()
        >>> pairs = kept_pairs(model, torch.tensor([list(b"Which of these bytes are kept?")]))
        >>> pairs.at_the_end().shape
        torch.Size([1, 30])
    """
    return kept_during(model, lambda: model(inputs, resets=resets, use_cache=False))


@torch.no_grad()
def kept_during(model: nn.Module, run: Callable[[], object]) -> KeptPairs:
    """Like `kept_pairs`, for any model and any call of it, such as an agent that reads an episode.

    Args:
        model: contains the layers.
        run: calls the model, once.

    Returns:
        The times, for all heads of the layers that keep entries.

    Raises:
        ValueError: if no layer keeps entries beyond its window.
    """
    until, leaves, heads = list[Tensor](), list[Tensor](), list[tuple[int, int]]()

    def record(number: int, layer: HybridMemory, kv: nn.Module, args: tuple[Any, ...]) -> None:
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
        layer.kv.register_forward_pre_hook(functools.partial(record, number, layer))
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


def page_tokens(pairs: KeptPairs, texts: Sequence[str]) -> list[dict[str, Any]]:
    """Prepare the first row of the batch for a page.

    Args:
        pairs: what `kept_pairs` returns.
        texts: each token's text.

    Returns:
        For each token its text, the share of heads that keep its entry until the end, whether it is still in every
        window, and a tooltip.
    """
    n, _, t = pairs.until.shape
    held, recent = (pairs.until[:, 0] == t).sum(dim=0).tolist(), (pairs.leaves[:, 0] == t).all(dim=0).tolist()
    seen = (pairs.until[:, 0] - torch.arange(t, device=pairs.until.device)).double().mean(dim=0).tolist()
    return [
        {
            "text": text,
            "share": 0.0 if in_window else heads / n,
            "recent": in_window,
            "title": f"token {token + 1}: "
            + ("in the window" if in_window else f"kept by {heads} of {n} heads; visible to {tokens:.0f} tokens"),
        }
        for token, (text, heads, in_window, tokens) in enumerate(zip(texts, held, recent, seen, strict=True))
    ]
