"""Grouped query heads: query head i reads the KV entries and the matrix of head i // g."""

from __future__ import annotations

from torch import Tensor

from hqlt.shapes import Keys, Live, Queries, Resets, Values, check_live, check_resets, match_floats


def group(q: Queries, k: Keys) -> int:
    """g, the number of query heads per head of k."""
    return q.shape[2] // max(k.shape[2], 1)


def grouped(q: Queries, k: Keys) -> Tensor:
    """[b, t, g·h, ·] → [b, t, h, g, ·]: the query heads grouped by the head of k that they share."""
    return q.unflatten(2, (k.shape[2], group(q, k)))


def repeated(q: Queries, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors [b, l, h, ·] with every head repeated g times, for operations without grouped heads."""
    g = group(q, tensors[0])
    return tensors if g == 1 else tuple(x.repeat_interleave(g, dim=2) for x in tensors)


def product(x: Tensor, y: Tensor) -> Tensor:
    """[…, g, m, n] @ […, n, ·], where all g share the second factor: one product of g·m rows."""
    return (x.flatten(-3, -2) @ y).unflatten(-2, x.shape[-3:-1])


def sum_of_products(x: Tensor, y: Tensor) -> Tensor:
    """Σ_g xᵀ y of […, g, m, n] and […, g, m, ·]."""
    return x.flatten(-3, -2).mT @ y.flatten(-3, -2)


def match_heads(size: dict[str, int]) -> dict[str, int]:
    """Return the matched sizes after checking that g·h is a multiple of h.

    Raises:
        ValueError: If it is not.
    """
    if size["g·h"] % max(size["h"], 1) or (size["h"] == 0) != (size["g·h"] == 0):
        raise ValueError(f"q: expected heads in a multiple of the {size['h']} heads of k and v, got {size['g·h']}")
    return size


def match_scan(
    q: Queries, k: Keys, v: Values, resets: Resets | None, live: Live | None, **others: tuple[Tensor, str]
) -> dict[str, int]:
    """Check the inputs of an operation on fast weights, and return their sizes by letter.

    Raises:
        ValueError: If shapes, dtypes or devices do not match.
    """
    size = match_heads(match_floats(q=(q, "b t g·h k"), k=(k, "b t h k"), v=(v, "b t h v"), **others))
    check_resets(resets, size["b"], size["t"], q.device)
    check_live(live, size["b"], size["t"], q.device)
    return size
