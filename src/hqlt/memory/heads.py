"""How many heads a layer has, and how wide they are."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Heads:
    """Grouped freely: query head i reads the KV entries and the matrix of head i // (query heads / their heads)."""

    hidden_size: int
    """Of the layer's input."""
    queries: int
    """Heads of q."""
    keys: int
    """Heads of k, and of the entries that a KV-memory holds."""
    matrices: int
    """Heads of v, each with a matrix of its own: as many as `keys`, or a multiple of them without a KV-memory."""
    k: int
    """Width of a query or key head."""
    v: int
    """Width of a value head."""

    @property
    def reads(self) -> int:
        """Heads of what is read."""
        return max(self.queries, self.matrices)

    @staticmethod
    def of(
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None,
        head_dim: int | None,
        num_value_heads: int | None,
        value_dim: int | None,
        alone: bool,
    ) -> Heads:
        """From a layer's arguments. alone: whether there is no KV-memory. Raises ValueError where they do not fit."""
        keys = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads < 1 or hidden_size < 1 or (head_dim is None and hidden_size % num_heads):
            raise ValueError(
                f"num_heads: expected a positive number that divides hidden_size = {hidden_size}, got {num_heads}; or "
                f"give head_dim"
            )
        if keys < 1 or num_heads % keys:
            raise ValueError(f"num_kv_heads: expected a number that divides num_heads = {num_heads}, got {keys}")
        k = hidden_size // num_heads if head_dim is None else head_dim
        for name, value in {"num_value_heads": num_value_heads, "value_dim": value_dim}.items():
            if value is not None and not alone:
                raise ValueError(f"{name}: expected none beside a KV-memory (blend='fw-only' has no such), got {value}")
        matrices = keys if num_value_heads is None else num_value_heads
        if matrices % keys or (matrices != keys and keys != num_heads):
            raise ValueError(
                f"num_value_heads: expected a multiple of num_heads = {num_heads} (as many as key heads), got "
                f"{matrices} with num_kv_heads = {keys}"
            )
        v = k if value_dim is None else value_dim
        if min(k, v) < 1:
            raise ValueError(f"head_dim, value_dim: expected at least 1, got {k} and {v}")
        return Heads(hidden_size, num_heads, keys, matrices, k, v)
