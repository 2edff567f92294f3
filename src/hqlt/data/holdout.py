"""Which documents are held out for validation and test: a property of the document, not of its place."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import NamedTuple

from hqlt.seeds import hash64
from hqlt.task.task import Split

FEW = 4096
"""Of fewer documents than this the shares are counted exactly; of more they hold on average."""


class Holdout(NamedTuple):
    """With u(document) ∈ [0, 2⁶⁴) a hash of its text: validation where u < first, test where first ≤ u < second.

    Equal documents are in the same split, whatever their number and order.
    """

    first: int
    second: int

    def split_of(self, text: str) -> Split:
        u = hash64(text)
        return "validation" if u < self.first else "test" if u < self.second else "train"

    @classmethod
    def of(cls, documents: Iterable[str], validation: float, test: float) -> Holdout:
        """Bounds for these shares. Of few documents at least one goes to each split whose share is not 0.

        Raises ValueError where there are too few documents for that.
        """
        check_shares(validation, test)
        if not validation and not test:
            return cls(0, 0)
        seen = [hash64(text) for text in itertools.islice(filter(None, documents), FEW)]
        if len(seen) == FEW:
            return cls(round(validation * 2**64), round((validation + test) * 2**64))
        hashes = sorted(set(seen))
        counts = [max(1, round(share * len(hashes))) if share else 0 for share in (validation, test)]
        if len(hashes) <= sum(counts):
            raise ValueError(
                f"expected at least {sum(counts) + 1} different documents, to hold out some of them for validation "
                f"and test, found {len(hashes)}; cut a long text into documents by --separator (blank lines: "
                f'--separator=""), give files by --validation and --test, or set --validation-share=0 --test-share=0'
            )
        return cls(hashes[counts[0]], hashes[sum(counts)])


def check_shares(validation: float, test: float) -> None:
    if not (validation >= 0 and test >= 0 and validation + test < 1):
        raise ValueError(
            f"validation_share, test_share: expected shares that leave some for training, got {validation}, {test}"
        )
