"""Until when a KV entry stays visible: one name, one signature, an implementation a file."""

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
    """When each entry stops being visible, if of those that have left the window the `kept` highest scores stay.

        expiry_j = the first index from leaves_j on at which `kept` entries that outrank j have left, in j's segment

    Entry i outranks j of the same segment where its score is higher, or the same and i is older. So at any index of
    the timeline those that have left and are still visible are the `kept` first by rank; one that is out never returns,
    and none outlives its segment.

    scores: [b, l, h], entries in order of age, without NaN. leaves: int64 [b, l], the index at which an entry leaves
    the window; it does not fall with age within a segment. used: Bool[b, l], entries that are there at all; None: all.
    resets: Bool[b, l], True at an entry that begins a segment. kept: at least 1. backend: the name of one
    implementation, None picks.

    → int64 [b, l, h], `NEVER` (2⁶²) in the last segment where fewer than `kept` entries of the timeline outrank one, 0
    for one that is not there. No gradient goes through.

    Raises ValueError for shapes, dtypes and devices that do not fit, kept below 1, an unknown backend.
    """
    size = match_floats(scores=(scores, "b l h"))
    check_resets(resets, size["b"], size["l"], scores.device)
    check_marks("used", "an entry is there", used, size["b"], size["l"], scores.device)
    if leaves.shape != scores.shape[:2] or leaves.dtype != torch.int64:
        raise ValueError(
            f"leaves: expected int64 {list(scores.shape[:2])}, an index for each entry, got {leaves.dtype} "
            f"{list(leaves.shape)}"
        )
    if kept < 1:
        raise ValueError(f"kept: expected at least 1 entry, got {kept}")
    run = implementation("expiry", scores, backend, size)
    out: Tensor = run(scores.detach(), leaves, used, resets, min(kept, max(size["l"], 1)))
    return out if resets is None else out.minimum(_ends(resets)[..., None])


def _ends(resets: Resets) -> Tensor:
    """The index at which each entry's segment has ended: [b, l]."""
    index = torch.arange(resets.shape[1], device=resets.device)
    later = F.pad(torch.where(resets, -index, -NEVER)[:, 1:], (0, 1), value=-NEVER)  # ONNX knows no cummin
    return -later.flip(1).cummax(dim=1).values.flip(1)
