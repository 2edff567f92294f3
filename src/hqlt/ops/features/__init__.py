"""Operations on queries and keys before a memory reads them: the feature map φ of the FW-memory, and the rotary
embedding of the KV-memory."""

from __future__ import annotations

from torch import Tensor

from hqlt.ops.backend import implementation
from hqlt.ops.features import native, reference
from hqlt.shapes import Keys, match_floats

__all__ = ["native", "reference", "rotated", "unit_silu"]


def unit_silu(x: Keys, *, backend: str | None = None) -> Keys:
    """Feature map φ of the delta rule: SiLU, normalized to unit length per head.

        φ(x) = SiLU(x) / √(‖SiLU(x)‖² + 1e-6)

    Args:
        x (`[b, t, h, k]`): Queries or keys.
        backend: Name of a backend; selected automatically by default.

    Returns:
        φ(x) `[b, t, h, k]`, in the dtype of x.

    Raises:
        ValueError: If x does not have four axes or is not floating-point, or the backend is unknown.

    Source:
        Yang et al. 2024, "Parallelizing Linear Transformers with the Delta Rule over Sequence Length".

    Example:
        >>> import torch, hqlt
        >>> k = hqlt.ops.unit_silu(torch.randn(2, 5, 4, 8))
        >>> torch.allclose(k.norm(dim=-1), torch.ones(2, 5, 4), atol=1e-3)
        True
    """
    size = match_floats(x=(x, "b t h k"))
    return implementation("unit_silu", x, backend, size)(x)


def rotated(x: Keys, cos: Tensor, sin: Tensor, *, backend: str | None = None) -> Keys:
    """Rotary position embedding, applied to every head.

        (y_i, y_{i+k/2}) = (cos x_i − sin x_{i+k/2}, cos x_{i+k/2} + sin x_i)

    Args:
        x (`[b, l, h, k]`): Queries or keys, with an even k.
        cos (`[l, 1, k/2]`): Cosines of the angles of each position, in at least float32.
        sin (`[l, 1, k/2]`): Their sines.
        backend: Name of a backend; selected automatically by default.

    Returns:
        y `[b, l, h, k]`, in the dtype of x.

    Raises:
        ValueError: If shapes, dtypes or devices do not match, k is odd, or the backend is unknown.

    Source:
        Su et al. 2021, "RoFormer", eq. 15, with component i paired with i + k/2.

    Example:
        >>> import torch, hqlt
        >>> angle = torch.arange(5.0)[:, None, None] / 10_000 ** torch.linspace(0, 0.75, 4)
        >>> hqlt.ops.rotated(torch.randn(2, 5, 4, 8), angle.cos(), angle.sin()).shape
        torch.Size([2, 5, 4, 8])
    """
    size = match_floats(x=(x, "b l h k"), cos=(cos, "l 1 half"), sin=(sin, "l 1 half"))
    if (size["1"], 2 * size["half"]) != (1, size["k"]):
        raise ValueError(
            f"cos, sin: expected [l, 1, k/2] for x of shape {list(x.shape)} with an even k, got {list(cos.shape)}"
        )
    return implementation("rotated", x, backend, size)(x, cos, sin)
