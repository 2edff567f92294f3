"""Everything of a synchronous layer between its projections, as one operation."""

from __future__ import annotations

from torch import Tensor

from hqlt.ops.backend import empty_read, implementation
from hqlt.ops.heads import match_heads
from hqlt.ops.synchronous import composed, reference, triton
from hqlt.ops.synchronous.inputs import Inputs
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
    backend: str | None = None,
) -> tuple[Values, Matrix]:
    """Both memories read by the same queries, mixed by a gate for each number, normed over each head.

        fw_t = scale · W_tᵀ φ(q_t)         W_t = α_t W_{t−1} + φ(k_t) ⊗ β_t (v_t − α_t W_{t−1}ᵀ φ(k_t))
        kv_t = Σ_j softmax_j(scale · R_t q_t · R_j k_j) v_j         over the `window` latest tokens j
        mix  = σ(gate) ⊙ fw + (1 − σ(gate)) ⊙ kv         y = mix / √(mean(mix²) + norm_eps) ⊙ norm_weight

    q: [b, t, g·h, k]. k: [b, l, h, k], v: [b, l, h, v] with l ≥ t: the last t pairs are the queries' own, those before
    were held from earlier and are read by attention alone; query head i reads pairs and matrix of head i // g. q and k
    are raw: φ is `hqlt.ops.features.unit_silu`, R_j the rotation by row j of rotary = (cos, sin), [≥ l, 1, k/2] each
    (None: none). beta: [b, t, h]. gate: [b, t, g·h, v], logits. norm_weight: [v]. decay: log α, at most 0, [b, t, h];
    None: α = 1, the delta rule. window: None for all. scale: k^-0.5 where None. state: W_0 [b, h, k, v], zeros where
    None. resets: Bool[b, l], True at a token that begins a segment.
    backend: the name of one implementation, None picks.

    → y [b, t, g·h, v] in v's dtype, W_t [b, h, k, v] in at least float32. Sizes of 0 as in the operations it is made
    of.

    Raises ValueError for shapes, dtypes and devices that do not fit, a window below 1, an unknown backend, and what a
    backend refuses.

    Source: the paper, sections 2 and 3, "Synchronous blending".
    """
    given = {"state": (state, "b h k v"), "decay": (decay, "b t h")}
    others = {name: (x, axes) for name, (x, axes) in given.items() if x is not None}
    size = match_heads(match_floats(
        q=(q, "b t g·h k"), k=(k, "b l h k"), v=(v, "b l h v"), beta=(beta, "b t h"), gate=(gate, "b t g·h v"),
        norm_weight=(norm_weight, "v"), **others,
    ))  # fmt: skip
    b, t, l = size["b"], size["t"], size["l"]
    check_resets(resets, b, l, q.device)
    if l < t:
        raise ValueError(f"k, v: expected at least as many pairs as the {t} queries (their own), got {l}")
    window = max(l, 1) if window is None else window
    if window < 1:
        raise ValueError(f"window: expected at least 1 (the token itself) or None for all, got {window}")
    _check_rotary(rotary, l, size["k"])
    wide = at_least_float32(v.dtype)
    state = q.new_zeros(b, *(size[x] for x in "hkv"), dtype=wide) if state is None else state.to(wide)
    run = implementation("synchronous", q, backend, size)
    if t == 0:
        gated = () if decay is None else (decay,)
        return empty_read(v, size["g·h"], q, k, beta, gate, norm_weight, state, *gated), state
    scale = max(size["k"], 1) ** -0.5 if scale is None else scale
    y, state = run(Inputs(q, k, v, beta, gate, norm_weight, window, rotary, norm_eps, scale, state, resets, decay))
    return y.to(v.dtype), state


def _check_rotary(rotary: tuple[Tensor, Tensor] | None, l: int, k: int) -> None:
    for name, table in zip(("cos", "sin"), rotary or (), strict=False):
        if table.dim() != 3 or table.shape[0] < l or tuple(table.shape[1:]) != (1, k / 2):
            raise ValueError(
                f"rotary: expected {name} of shape [≥ l, 1, k/2] = [≥ {l}, 1, {k / 2:g}], got {list(table.shape)}"
            )
