"""Products of a chunk's rows under decay: x_i · (e^{L_i − L_j} ⊙ k_j), where L is the cumulative sum of log α.

Every exponent is a sum of log α, never a difference of two cumulative sums. So nothing overflows, nothing is divided,
and a decay of e^−20 next to one of 1 costs no precision. A decay shared by all channels multiplies the products
afterwards.
A decay per channel is applied recursively: of two neighboring blocks of tokens, the second reads the first, with each
row decayed from or to the border between them; then both are merged into one block, up to the whole chunk.

The rows of a token are adjacent. x is […, c·r, k], k is […, c·m, k], and decay = log α is […, c, 1 or k], or None for
α = 1; c is a power of two.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor


def by_token(x: Tensor, factor: Tensor | None) -> Tensor:
    """Multiply the rows x […, c·r, ·] by the factor of their token […, c, ·]."""
    if factor is None:
        return x
    return (x.unflatten(-2, (factor.shape[-2], -1)) * factor[..., None, :]).flatten(-3, -2)


def factors(decay: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Products of α, as factors of a matrix's rows: from the chunk's start through each token and from after each token
    to the end, […, c, ·] each, and over the whole chunk, […, ·, 1]."""
    if decay is None:
        return None, None, None
    since = decay.cumsum(-2)
    until = F.pad(decay[..., 1:, :], (0, 0, 0, 1)).flip(-2).cumsum(-2).flip(-2)
    return since.exp(), until.exp(), since[..., -1, :, None].exp()


def products(x: Tensor, k: Tensor, decay: Tensor | None) -> Tensor:
    """The products […, c·r, c·m], correct unless the token of k is after that of x, where they are arbitrary but
    finite."""
    if decay is None or decay.shape[-1] == 1:
        return _weighted(x @ k.mT, decay)
    c = decay.shape[-2]
    scores = x.new_zeros(*x.shape[:-1], k.shape[-2])
    own = _blocks(x, c) @ _blocks(k, c).mT
    _on_diagonal(scores, c).copy_(own)
    for since, until in _levels(decay):
        x2, k1 = by_token(_second(x, since), since), by_token(_first(k, until), until)
        _below_diagonal(scores, since.shape[-3]).copy_(x2 @ k1.mT)
    return scores


def products_backward(d: Tensor, x: Tensor, k: Tensor, decay: Tensor | None) -> tuple[Tensor, Tensor]:
    """dx and dk, from the gradient of the products, which must be 0 where the token of k is after that of x."""
    if decay is None or decay.shape[-1] == 1:
        d = _weighted(d, decay)
        return d @ k, d.mT @ x
    c = decay.shape[-2]
    own = _on_diagonal(d, c)
    dx, dk = ((own @ _blocks(k, c)).flatten(-3, -2), (own.mT @ _blocks(x, c)).flatten(-3, -2))
    for since, until in _levels(decay):
        d_block = _below_diagonal(d, since.shape[-3])
        x2, k1 = by_token(_second(x, since), since), by_token(_first(k, until), until)
        _second(dx, since).add_(by_token(d_block @ k1, since))
        _first(dk, until).add_(by_token(d_block.mT @ x2, until))
    return dx, dk


def _weighted(scores: Tensor, decay: Tensor | None) -> Tensor:
    """Multiply the scores [c·r, c·m] by e^{L_i − L_j} of their tokens."""
    if decay is None:
        return scores
    c = decay.shape[-2]
    between = decay.expand(*decay.shape[:-1], c).tril(-1).cumsum(-2).exp()  # row i, column j: sum over j < u ≤ i
    rows, columns = (n // c for n in scores.shape[-2:])
    scores = scores.unflatten(-1, (c, columns)).unflatten(-3, (c, rows)) * between[..., :, None, :, None]
    return scores.flatten(-4, -3).flatten(-2, -1)


def _levels(decay: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """For pairs of blocks of 1, 2, 4, … tokens: the product of α from the second block's start through each of its
    tokens, and from after each token of the first block to its end, [..., pairs, tokens per block, k]."""
    since, until, total = decay[..., None, :], torch.zeros_like(decay)[..., None, :], decay[..., None, :]
    while since.shape[-3] > 1:
        since, until, total = (x.unflatten(-3, (-1, 2)) for x in (since, until, total))
        yield since[..., 1, :, :].exp(), until[..., 0, :, :].exp()
        since = torch.cat([since[..., 0, :, :], since[..., 1, :, :] + total[..., 0, :, :]], dim=-2)
        until = torch.cat([until[..., 0, :, :] + total[..., 1, :, :], until[..., 1, :, :]], dim=-2)
        total = total.sum(-3)


def _blocks(x: Tensor, n: int) -> Tensor:
    """The rows […, c·r, k] as n blocks […, n, c/n·r, k]."""
    return x.unflatten(-2, (n, -1))


def _first(x: Tensor, like: Tensor) -> Tensor:
    """The first block of each pair: […, pairs, rows, k]."""
    return x.unflatten(-2, (like.shape[-3], 2, -1))[..., 0, :, :]


def _second(x: Tensor, like: Tensor) -> Tensor:
    """The second block of each pair."""
    return x.unflatten(-2, (like.shape[-3], 2, -1))[..., 1, :, :]


def _on_diagonal(scores: Tensor, n: int) -> Tensor:
    """The n blocks on the diagonal, as a view […, n, rows, columns]."""
    return scores.unflatten(-1, (n, -1)).unflatten(-3, (n, -1)).diagonal(0, -4, -2).movedim(-1, -3)


def _below_diagonal(scores: Tensor, pairs: int) -> Tensor:
    """For each pair, the block in which the second reads the first, as a view […, pairs, rows, columns]."""
    pair = _on_diagonal(scores, pairs)
    return pair[..., pair.shape[-2] // 2 :, : pair.shape[-1] // 2]
