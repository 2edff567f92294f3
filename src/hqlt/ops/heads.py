"""Heads of queries in groups: query head i reads the pairs and the matrix of head i // g."""

from __future__ import annotations

from torch import Tensor

from hqlt.shapes import Keys, Live, Queries, Resets, Values, check_live, check_resets, match_floats


def group(q: Queries, k: Keys) -> int:
    """g, the query heads that share one head of k."""
    return q.shape[2] // max(k.shape[2], 1)


def grouped(q: Queries, k: Keys) -> Tensor:
    """[b, t, g·h, ·] → [b, t, h, g, ·], the queries of one head of k beside each other."""
    return q.unflatten(2, (k.shape[2], group(q, k)))


def repeated(q: Queries, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors [b, l, h, ·] with a head for every head of q, for what knows no groups."""
    g = group(q, tensors[0])
    return tensors if g == 1 else tuple(x.repeat_interleave(g, dim=2) for x in tensors)


def product(x: Tensor, y: Tensor) -> Tensor:
    """[…, g, m, n] times […, n, ·], which all g share: one product of g·m rows."""
    return (x.flatten(-3, -2) @ y).unflatten(-2, x.shape[-3:-1])


def sum_of_products(x: Tensor, y: Tensor) -> Tensor:
    """Σ_g xᵀ y of […, g, m, n] and […, g, m, ·]."""
    return x.flatten(-3, -2).mT @ y.flatten(-3, -2)


def match_heads(size: dict[str, int]) -> dict[str, int]:
    """The sizes that were matched, of which g·h is a multiple of h.

    Raises ValueError where it is none.
    """
    if size["g·h"] % max(size["h"], 1) or (size["h"] == 0) != (size["g·h"] == 0):
        raise ValueError(f"q: expected heads in a multiple of the {size['h']} heads of k and v, got {size['g·h']}")
    return size


def match_scan(
    q: Queries, k: Keys, v: Values, resets: Resets | None, live: Live | None, **others: tuple[Tensor, str]
) -> dict[str, int]:
    """The sizes of what an operation on fast weights is given: q, k and v, marks on its tokens, and others.

    Raises ValueError for shapes, dtypes and devices that do not fit.
    """
    size = match_heads(match_floats(q=(q, "b t g·h k"), k=(k, "b t h k"), v=(v, "b t h v"), **others))
    check_resets(resets, size["b"], size["t"], q.device)
    check_live(live, size["b"], size["t"], q.device)
    return size
