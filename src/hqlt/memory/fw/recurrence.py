"""The family of write rules: one recurrence, of which a rule fills in the terms."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from hqlt import ops
from hqlt.memory.fw.rule import Errors, FWMemory, Write, gate_projection
from hqlt.memory.heads import Heads
from hqlt.memory.state import Entry
from hqlt.ops.fast_weights import Decay, Erase
from hqlt.shapes import Keys, Matrix, Queries, Resets, Strengths, Values, at_least_float32


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
        return MatrixState(Entry((self.heads.matrices, self.key_width, self.heads.v)))  # type: ignore[arg-type]

    def terms(self, q: Queries, write: Write) -> Terms:
        raise NotImplementedError

    @property
    def returns_errors(self) -> bool:  # type: ignore[override]
        return self.erases

    def forward(
        self, q: Queries, write: Write, past: MatrixState | None, resets: Resets | None, *, errors: bool = False
    ) -> tuple[Any, ...]:
        given = self.terms(q, write)
        state: Tensor | None = None if past is None else past.matrix
        out, matrix, *said = ops.fast_weights(
            **given._asdict(), state=state, resets=resets, live=write.live, errors=errors
        )
        return out, MatrixState(matrix), *(self.errors(e, given.beta, q.shape[1]) for e in said)

    def errors(self, e: Values, beta: Strengths | None, t: int) -> Errors:
        """From those of each write [b, m·t, h, v]."""
        squares = e.square().sum(dim=-1)
        weighted = squares if beta is None else beta.detach().square() * squares
        return Errors(*(x.unflatten(1, (t, -1)).sum(dim=2).sqrt() for x in (squares, weighted)))


class Erasing(Recurrence):
    """A rule with write strengths, `writes` for each matrix: β = beta_max · σ(W_β x).

    beta_max: at most 2, with which a rule tracks state. beta_bias: where W_β's bias begins (None: there is none).
    """

    def __init__(self, heads: Heads, beta_max: float, beta_bias: float | None = None, writes: int = 1) -> None:
        super().__init__(heads)
        if not 0 < beta_max <= 2:
            raise ValueError(f"beta_max: expected a number in (0, 2] (above 2 the delta rule diverges), got {beta_max}")
        self.beta_max, self.beta_bias = beta_max, beta_bias
        self.beta_proj: nn.Module = gate_projection(heads.hidden_size, writes * heads.matrices, beta_bias)

    def init_parameters(self) -> None:
        if self.beta_bias is not None:
            nn.init.constant_(self.beta_proj.bias, self.beta_bias)  # type: ignore[arg-type]

    def strengths(self, logits: Tensor) -> Strengths:
        """β, in at least float32."""
        return self.beta_max * logits.to(at_least_float32(logits.dtype)).sigmoid()

    def extra_repr(self) -> str:
        return f"beta_max={self.beta_max}"
