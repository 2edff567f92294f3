"""The core of a synchronous layer, everything between its projections, as one operation."""

from __future__ import annotations

from torch import Tensor

from hqlt.ops.backend import empty_read, implementation
from hqlt.ops.heads import match_heads
from hqlt.ops.synchronous import composed, reference, triton
from hqlt.ops.synchronous.inputs import Inputs
from hqlt.ops.window_attention import Beyond, check_beyond
from hqlt.shapes import Keys, Matrix, Queries, Resets, Strengths, Values, at_least_float32, check_resets, match_floats

__all__ = ["Inputs", "composed", "reference", "synchronous", "triton"]


def synchronous(
    q: Queries,
    k: Keys,
    v: Values,
    beta: Strengths,
    gate: Values,
    norm_weight: Tensor,
    *,
    decay: Strengths | None = None,
    window: int | None,
    rotary: tuple[Tensor, Tensor] | None = None,
    norm_eps: float = 1e-6,
    scale: float | None = None,
    state: Matrix | None = None,
    resets: Resets | None = None,
    beyond: Beyond | None = None,
    backend: str | None = None,
) -> tuple[Values, Matrix]:
    """Both memories read by the same queries, mixed by an elementwise gate and normalized per head.

        fw_t = scale · W_tᵀ φ(q_t)         W_t = α_t W_{t−1} + φ(k_t) ⊗ β_t (v_t − α_t W_{t−1}ᵀ φ(k_t))
        kv_t = Σ_j softmax_j(scale · R_t q_t · R_j k_j) v_j         over the `window` latest tokens j, and those kept
        mix  = σ(gate) ⊙ fw + (1 − σ(gate)) ⊙ kv         y = mix / √(mean(mix²) + norm_eps) ⊙ norm_weight

    φ is `hqlt.ops.unit_silu`, and R_j the rotary embedding of position j.

    Args:
        q (`[b, t, g·h, k]`): Queries, before φ and before the rotary embedding. Query head i reads the entries and the
            matrix of head i // g.
        k (`[b, l, h, k]`): Keys, l ≥ t, before φ and before the rotary embedding. The last t belong to the new tokens;
            those before them are held entries, which only attention reads.
        v (`[b, l, h, v]`): Values.
        beta (`[b, t, h]`): Write strengths.
        gate (`[b, t, g·h, v]`): Logits of the mixer's gate.
        norm_weight (`[v]`): Weight of the RMSNorm over each head.
        decay (`[b, t, h]`): log α, at most 0. α = 1, the delta rule, by default.
        window: Number of latest tokens that attention reads; None for all.
        rotary: cos and sin of at least l positions, `[≥ l, 1, k/2]` each; no rotary embedding by default.
        norm_eps: Added to the mean square in the norm.
        scale: Factor of the FW read and of the attention scores, k^-0.5 by default.
        state (`[b, h, k, v]`): W_0, zeros by default.
        resets (`Bool[b, l]`): Tokens that begin a segment.
        beyond: Entries that stay visible outside the window; none by default. They use the same queries and keys as
            those within it, so its q and k must be None.
        backend: Name of a backend; selected automatically by default.

    Returns:
        y `[b, t, g·h, v]` in the dtype of v, and the final matrix `[b, h, k, v]` in at least float32.

    Raises:
        ValueError: If shapes, dtypes or devices do not match, the window is below 1, `beyond` has queries and keys of
            its own, or the backend is unknown or does not support the call.

    Source:
        Irie, Yau and Gershman 2025, "Blending Complementary Memory Systems in Hybrid Quadratic-Linear Transformers",
        sections 2 and 3, synchronous blending.

    Example:
        >>> import torch, hqlt
        >>> q, k, v, gate = torch.randn(4, 2, 5, 4, 8)
        >>> y, state = hqlt.ops.synchronous(q, k, v, torch.rand(2, 5, 4), gate, torch.ones(8), window=3)
        >>> y.shape, state.shape
        (torch.Size([2, 5, 4, 8]), torch.Size([2, 4, 8, 8]))
    """
    others = {"state": (state, "b h k v"), "decay": (decay, "b t h")}
    optional = {name: (x, axes) for name, (x, axes) in others.items() if x is not None}
    size = match_heads(match_floats(
        q=(q, "b t g·h k"), k=(k, "b l h k"), v=(v, "b l h v"), beta=(beta, "b t h"), gate=(gate, "b t g·h v"),
        norm_weight=(norm_weight, "v"), **optional,
    ))  # fmt: skip
    b, t, l = size["b"], size["t"], size["l"]
    check_resets(resets, b, l, q.device)
    if l < t:
        raise ValueError(f"k, v: expected at least as many entries as the {t} queries (their own), got {l}")
    window = max(l, 1) if window is None else window
    if window < 1:
        raise ValueError(f"window: expected at least 1 (the token itself) or None for all, got {window}")
    _check_rotary(rotary, l, size["k"])
    if beyond is not None:
        check_beyond(beyond, q, k)
        if beyond.q is not None:
            raise ValueError("beyond: expected entries that are compared as those within the window, got q and k")
    wide = at_least_float32(v.dtype)
    state = q.new_zeros(b, *(size[x] for x in "hkv"), dtype=wide) if state is None else state.to(wide)
    run = implementation("synchronous", q, backend, size)
    if t == 0:
        gated = () if decay is None else (decay,)
        return empty_read(v, size["g·h"], q, k, beta, gate, norm_weight, state, *gated), state
    scale = max(size["k"], 1) ** -0.5 if scale is None else scale
    y, state = run(
        Inputs(q, k, v, beta, gate, norm_weight, window, rotary, norm_eps, scale, state, resets, decay, beyond)
    )
    return y.to(v.dtype), state


def _check_rotary(rotary: tuple[Tensor, Tensor] | None, l: int, k: int) -> None:
    for name, table in zip(("cos", "sin"), rotary or (), strict=False):
        if table.dim() != 3 or table.shape[0] < l or tuple(table.shape[1:]) != (1, k / 2):
            raise ValueError(
                f"rotary: expected {name} of shape [≥ l, 1, k/2] = [≥ {l}, 1, {k / 2:g}], got {list(table.shape)}"
            )
