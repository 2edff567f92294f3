"""Which documents are held out for validation and test, decided by a hash of their text."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import NamedTuple

from hqlt.seeds import hash64
from hqlt.task.task import Split

EXACT_BELOW = 4096
"""With fewer documents than this the shares are met exactly, otherwise in expectation."""


class Holdout(NamedTuple):
    """Assigns each document to a split by the hash u ∈ [0, 2⁶⁴) of its text:

        u < first            validation
        first ≤ u < second   test
        otherwise            train

    Equal documents are always in the same split, however many documents there are and in whatever order.
    """

    first: int
    second: int

    def split_of(self, text: str) -> Split:
        u = hash64(text)
        return "validation" if u < self.first else "test" if u < self.second else "train"

    @classmethod
    def of(cls, documents: Iterable[str], validation: float, test: float) -> Holdout:
        """Choose the thresholds for the given shares. Each split with a nonzero share gets at least one document.

        Raises ValueError if there are too few documents for that.
        """
        check_shares(validation, test)
        if not validation and not test:
            return cls(0, 0)
        seen = [hash64(text) for text in itertools.islice(filter(None, documents), EXACT_BELOW)]
        if len(seen) == EXACT_BELOW:
            return cls(round(validation * 2**64), round((validation + test) * 2**64))
        hashes = sorted(set(seen))
        counts = [max(1, round(share * len(hashes))) if share else 0 for share in (validation, test)]
        if len(hashes) <= sum(counts):
            raise ValueError(
                f"expected at least {sum(counts) + 1} different documents, so that some can be held out for "
                f"validation and test, found {len(hashes)}; split a long text into documents with --separator "
                f'(blank lines: --separator=""), give files with --validation and --test, or set --validation-share=0 '
                f"--test-share=0"
            )
        return cls(hashes[counts[0]], hashes[sum(counts)])


def check_shares(validation: float, test: float) -> None:
    if not (validation >= 0 and test >= 0 and validation + test < 1):
        raise ValueError(
            f"validation_share, test_share: expected shares that sum to less than 1, got {validation}, {test}"
        )
