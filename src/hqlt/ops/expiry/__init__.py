"""Expiry of KV entries: until when each stays visible. Each file holds one implementation; all share one name and
signature."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hqlt.ops.backend import implementation
from hqlt.ops.expiry import chunked, native, reference
from hqlt.ops.expiry.reference import NEVER
from hqlt.shapes import Resets, check_marks, check_resets, match_floats

__all__ = ["NEVER", "chunked", "expiry", "native", "reference"]


def expiry(
    scores: Tensor,
    leaves: Tensor,
    *,
    kept: int,
    used: Tensor | None = None,
    resets: Resets | None = None,
    backend: str | None = None,
) -> Tensor:
    """Index at which each KV entry stops being visible, if the `kept` best of those that left the window are kept.

        expiry_j = the first index, from leaves_j on, at which `kept` entries of j's segment that outrank j have left

    Entry i outranks entry j of the same segment if its score is higher, or if the scores are equal and i is older. At
    any index, the visible entries that have left the window are therefore the `kept` best; an entry that has expired
    never returns, and no entry outlives its segment. The result has no gradient.

    Args:
        scores (`[b, l, h]`): Scores of the entries, oldest first, without NaN.
        leaves (`int64 [b, l]`): Index at which each entry leaves the window. Within a segment, no entry leaves before
            an older one.
        kept: Number of entries to keep, at least 1.
        used (`Bool[b, l]`): Entries that exist, all by default.
        resets (`Bool[b, l]`): Entries that begin a segment.
        backend: Name of a backend; selected automatically by default.

    Returns:
        int64 `[b, l, h]`: 0 for an entry that does not exist, and in the last segment `NEVER` (2⁶²) for an entry that
        fewer than `kept` others outrank.

    Raises:
        ValueError: If shapes, dtypes or devices do not match, kept is below 1, or the backend is unknown.

    Example:
        >>> import torch, hqlt
        >>> scores = torch.tensor([3.0, 1.0, 2.0]).view(1, 3, 1)
        >>> leaves = torch.tensor([[4, 5, 6]])
        >>> hqlt.ops.expiry(scores, leaves, kept=2).flatten().tolist()  # the entry of score 1 goes when 2 leaves
        [4611686018427387904, 6, 4611686018427387904]
    """
    size = match_floats(scores=(scores, "b l h"))
    check_resets(resets, size["b"], size["l"], scores.device)
    check_marks("used", "an entry is there", used, size["b"], size["l"], scores.device)
    if leaves.shape != scores.shape[:2] or leaves.dtype != torch.int64:
        raise ValueError(
            f"leaves: expected int64 {list(scores.shape[:2])}, one index per entry, got {leaves.dtype} "
            f"{list(leaves.shape)}"
        )
    if kept < 1:
        raise ValueError(f"kept: expected at least 1 entry, got {kept}")
    run = implementation("expiry", scores, backend, size)
    out: Tensor = run(scores.detach(), leaves, used, resets, min(kept, max(size["l"], 1)))
    return out if resets is None else out.minimum(_ends(resets)[..., None])


def _ends(resets: Resets) -> Tensor:
    """Index of the next segment's first entry, for each entry: [b, l]."""
    index = torch.arange(resets.shape[1], device=resets.device)
    later = F.pad(torch.where(resets, -index, -NEVER)[:, 1:], (0, 1), value=-NEVER)  # cummax: ONNX has no cummin
    return -later.flip(1).cummax(dim=1).values.flip(1)
