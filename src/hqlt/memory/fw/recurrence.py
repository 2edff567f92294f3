"""The family of write rules that share one recurrence and differ in its terms."""

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
    """The state of a rule with one matrix per head."""

    matrix: Matrix
    """[b, h, k, v]"""


class Terms(NamedTuple):
    """Arguments of `hqlt.ops.fast_weights`, with m writes per token."""

    q: Queries
    """[b, t, g·h, k] after the feature map"""
    k: Keys
    """[b, m·t, h, k] after the feature map"""
    v: Values
    """[b, m·t, h, v]"""
    beta: Strengths | None = None
    """[b, m·t, h] write strengths; None: 1"""
    decay: Decay | None = None
    """[b, t, h] or [b, t, h, k] log α; None: no decay"""
    erase: Erase = True
    """keys to erase along, [b, m·t, h, k]; True: k; False: nothing is erased"""
    scale: float | None = None
    """factor of the read; None: k^−½"""


class Recurrence(FWMemory):
    """Base class of rules of the family; a subclass defines `terms`.

        S ← Diag(α) S      m times: S ← S + k ⊗ β (v − Sᵀ a)      read: scale · Sᵀ q

    Args:
        heads: number and width of the layer's heads.
    """

    def state_entries(self) -> MatrixState:
        return MatrixState(Entry((self.heads.matrices, self.key_width, self.heads.v)))  # type: ignore[arg-type]

    def terms(self, q: Queries, write: Write) -> Terms:
        """Return the arguments of `hqlt.ops.fast_weights`, from raw queries and what is written."""
        raise NotImplementedError

    @property
    def returns_errors(self) -> bool:  # type: ignore[override]
        return self.erases

    def forward(
        self, q: Queries, write: Write, past: MatrixState | None, resets: Resets | None, *, errors: bool = False
    ) -> tuple[Any, ...]:
        terms = self.terms(q, write)
        state: Tensor | None = None if past is None else past.matrix
        out, matrix, *residuals = ops.fast_weights(
            **terms._asdict(), state=state, resets=resets, live=write.live, errors=errors
        )
        return out, MatrixState(matrix), *(self.errors(e, terms.beta, q.shape[1]) for e in residuals)

    def errors(self, e: Values, beta: Strengths | None, t: int) -> Errors:
        """Return the errors per token from e [b, m·t, h, v] of each write."""
        squares = e.square().sum(dim=-1)
        weighted = squares if beta is None else beta.detach().square() * squares
        return Errors(*(x.unflatten(1, (t, -1)).sum(dim=2).sqrt() for x in (squares, weighted)))


class Erasing(Recurrence):
    """Base class of rules with write strengths β = beta_max · σ(W_β x).

    Args:
        heads: number and width of the layer's heads.
        beta_max: maximum of β, at most 2. State tracking needs values above 1.
        beta_bias: initial bias of W_β. None: no bias.
        writes: number of write strengths per token and matrix.

    Raises:
        ValueError: when beta_max is not in (0, 2].

    Example:
        >>> import hqlt
        >>> from hqlt.memory.fw import Erasing
        >>> isinstance(hqlt.HybridMemory(hidden_size=64, num_heads=4, fast_weights="kda").fw, Erasing)
        True
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
        """Return β in at least float32."""
        return self.beta_max * logits.to(at_least_float32(logits.dtype)).sigmoid()

    def extra_repr(self) -> str:
        return f"beta_max={self.beta_max}"
