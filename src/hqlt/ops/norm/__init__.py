"""RMSNorm of a memory's read, by itself or fused with the vector mixer."""

from __future__ import annotations

from torch import Tensor

from hqlt.ops.backend import implementation
from hqlt.ops.norm import native, reference
from hqlt.shapes import Values, match_floats

__all__ = ["mix", "native", "reference", "rms_norm"]


def rms_norm(x: Tensor, weight: Tensor, *, eps: float, backend: str | None = None) -> Tensor:
    """RMSNorm over the last axis, computed in the dtype of the weight.

        y = weight ⊙ x / √(mean x² + eps)

    Args:
        x (`[..., d]`): Input.
        weight (`[d]`): Scale of each component.
        eps: Added to the mean square.
        backend: Name of a backend; selected automatically by default.

    Returns:
        y `[..., d]`, in the dtype of the weight.

    Raises:
        ValueError: If shapes, dtypes or devices do not match, or the backend is unknown.

    Source:
        Zhang and Sennrich 2019, "Root Mean Square Layer Normalization", eq. 4.

    Example:
        >>> import torch, hqlt
        >>> hqlt.ops.rms_norm(torch.tensor([[3.0, 4.0]]), torch.full((2,), 12.5**0.5), eps=0.0)
        tensor([[3., 4.]])
    """
    leading = " ".join(map(str, range(x.dim() - 1)))
    size = match_floats(x=(x, f"{leading} d"), weight=(weight, "d"))
    return implementation("rms_norm", weight, backend, size)(x.to(weight.dtype), weight, eps)


def mix(fw: Values, kv: Values, gate: Tensor, weight: Tensor, *, eps: float, backend: str | None = None) -> Values:
    """The vector mixer and RMSNorm in one operation, computed in the dtype of the weight.

        m = γ ⊙ fw + (1 − γ) ⊙ kv,  γ = σ(gate)        y = weight ⊙ m / √(mean m² + eps)

    Args:
        fw (`[b, t, h, v]`): Read of the FW-memory.
        kv (`[b, t, h, v]`): Read of the KV-memory.
        gate (`[b, t, h, v]`): Logits of the gate γ.
        weight (`[v]`): Weight of the RMSNorm over each head.
        eps: Added to the mean square.
        backend: Name of a backend; selected automatically by default.

    Returns:
        y `[b, t, h, v]`, in the dtype of the weight.

    Raises:
        ValueError: If shapes, dtypes or devices do not match, or the backend is unknown.

    Source:
        Irie, Yau and Gershman 2025, "Blending Complementary Memory Systems in Hybrid Quadratic-Linear Transformers",
        section 3, dynamic vector mixing.

    Example:
        >>> import torch, hqlt
        >>> fw, kv, gate = torch.randn(3, 2, 5, 4, 8)
        >>> hqlt.ops.mix(fw, kv, gate, torch.ones(8), eps=1e-6).shape
        torch.Size([2, 5, 4, 8])
    """
    size = match_floats(fw=(fw, "b t h v"), kv=(kv, "b t h v"), gate=(gate, "b t h v"), weight=(weight, "v"))
    run, dtype = implementation("mix", weight, backend, size), weight.dtype
    return run(fw.to(dtype), kv.to(dtype), gate.to(dtype), weight, eps)
