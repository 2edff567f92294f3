"""The family of write rules: one recurrence, of which a rule fills in the terms."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from hqlt import ops
from hqlt.memory.fw.rule import FWMemory, Write
from hqlt.memory.state import Entry
from hqlt.ops.fast_weights import Decay, Erase
from hqlt.shapes import Keys, Matrix, Queries, Resets, Strengths, Values


class MatrixState(NamedTuple):
    matrix: Matrix
    """[b, h, k, v]"""


class Terms(NamedTuple):
    """What `hqlt.ops.fast_weights` takes."""

    q: Queries
    k: Keys
    v: Values
    beta: Strengths | None = None
    decay: Decay | None = None
    erase: Erase = True
    scale: float | None = None


class Recurrence(FWMemory):
    """S ← Diag(α) S      m times: S ← S + k ⊗ β (v − Sᵀ a)      read: scale · Sᵀ q

    A rule of the family says in `terms` what it puts there, from raw queries and what is written.
    """

    def state_entries(self) -> MatrixState:
        return MatrixState(Entry((self.heads.matrices, self.heads.k, self.heads.v)))  # type: ignore[arg-type]

    def terms(self, q: Queries, write: Write) -> Terms:
        raise NotImplementedError

    def forward(
        self, q: Queries, write: Write, past: MatrixState | None, resets: Resets | None
    ) -> tuple[Values, MatrixState]:
        given = self.terms(q, write)._asdict()
        state: Tensor | None = None if past is None else past.matrix
        out, matrix = ops.fast_weights(**given, state=state, resets=resets, live=write.live)
        return out, MatrixState(matrix)
