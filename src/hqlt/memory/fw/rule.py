"""The FW-memory: compressed and endless. A write rule puts pairs into fast weights, and reads them by a product."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from hqlt.memory.heads import Heads
from hqlt.memory.state import Tree
from hqlt.shapes import Hidden, Keys, Live, Queries, Resets, Values

if TYPE_CHECKING:
    from hqlt.memory.fw.features import LearnedMap


class Write(NamedTuple):
    """What reaches a rule at each step, [b, t, …] each. A blend decides which token's it is."""

    keys: Keys
    """Raw: before φ."""
    values: Values
    gates: Tree
    """What the rule itself made of a token's input (`FWMemory.gates`)."""
    live: Live | None
    """Bool[b, t]: where False nothing is written, and the fast weights stay as they are, decay included. None: all."""


class Errors(NamedTuple):
    """How wrongly a rule predicted what it then wrote, [b, t, h] each, in at least float32, without gradients."""

    plain: Tensor
    """‖e‖, e = v − Sᵀa with S as it is when the pair is written; of several writes a token the root of Σ ‖e‖²"""
    weighted: Tensor
    """‖βe‖, alike"""


class FWMemory(nn.Module):
    """A write rule: it owns its parameters, its gates, its feature map, its scan and the shape of its state.

    Layer, blends and state know no rule by name. To write one, say what a token's input decides (`logits`, `gates` and
    their shapes in `gate_entries`), what is held (`state_entries`), and what happens at a step (`forward`).

    Options are the keyword-only arguments of the constructor; a registered rule's are the layer's own.
    """

    native: str | None = None
    """What `hqlt.ops.step` calls this rule, where it runs it; a subclass says so anew."""
    gates_hold_pairs = False
    """Whether the gates hold keys and values of their own token, so that they serve to write no other token's pair. The
    layer then sets `own_v_activation`: what its own values are activated by before they are written."""

    writes = 1
    """Steps for each token that is written."""
    erases = True
    """Whether a step reads what it erases."""

    returns_errors = False
    """Whether `forward` takes errors=True, and then returns `Errors`, too."""

    def __init__(self, heads: Heads) -> None:
        super().__init__()
        self.heads = heads
        self.feature_map: LearnedMap | None = None
        """What queries and keys pass through first, where a rule's option asks for it."""
        self.v_activation: nn.Module = nn.Identity()
        """Of values that reach this memory alone; the layer sets it (`HybridMemory.fw_activation`)."""
        self.convolved: dict[str, int] = {}
        """Fields of the logits that pass through the layer's short convolution, as q, k and v do: their widths."""

    def logits(self, x: Hidden) -> Tree:
        """What the rule's projections make of the layer's input x [b, t, d], [b, t, …] each."""
        return ()

    def mapped(self, q: Queries, keys: Keys) -> tuple[Queries, Keys]:
        """Raw queries and keys, through the learned map where there is one."""
        return (q, keys) if self.feature_map is None else self.feature_map(q, keys)

    @property
    def key_width(self) -> int:
        """Rows of a head's matrix."""
        return self.heads.k * (1 if self.feature_map is None else self.feature_map.widening)

    def gates(self, logits: Tree) -> Tree:
        """From logits to what a write is weighed by: a NamedTuple of [b, t, …] tensors."""
        return ()

    def gate_entries(self) -> Tree:
        """The gates' `Entry`s, without b and t: for blends that hold on to a pair's own gates, and for none at all."""
        return ()

    def init_parameters(self) -> None:
        """Put the gates to where they begin, whatever else has initialised their projections."""

    def state_entries(self) -> Tree:
        """What the rule holds: a NamedTuple of `Entry`s, without b."""
        raise NotImplementedError

    def forward(self, q: Queries, write: Write, past: Tree | None, resets: Resets | None) -> tuple[Any, ...]:
        """At each step write what is live, then read q (raw, as the keys are); at a reset, begin empty.

        past: the state before the first step, None for an empty one. → [b, t, reads, v], the state after the last.
        """
        raise NotImplementedError

    def skip(self, values: Values) -> Values | None:
        """What a token's own values add to what it reads, whenever they are written: [b, t, h, v]; None: nothing."""
        return None

    def multiply_adds(self) -> int:
        """Of writing and reading one token: k · v for each query that reads, each step, and what it erases."""
        heads = self.heads
        return (heads.reads + heads.matrices * self.writes * (1 + self.erases)) * self.key_width * heads.v

    def read(self, q: Queries, past: Tree) -> Values:
        """Read without writing."""
        (b, t), heads = q.shape[:2], self.heads
        keys, values = q.new_zeros(b, t, heads.matrices, heads.k), q.new_zeros(b, t, heads.matrices, heads.v)
        gates = pytree.tree_map(lambda entry: q.new_zeros(b, t, *entry.sizes), self.gate_entries())
        nothing = Write(keys, values, gates, torch.zeros(b, t, dtype=torch.bool, device=q.device))
        out: Values = self(q, nothing, past, None)[0]
        return out


def gate_projection(hidden_size: int, outputs: int, bias: float | None) -> nn.Linear:
    """A gate's logits. bias: where every one of them begins (None: there is no bias)."""
    projection = nn.Linear(hidden_size, outputs, bias=bias is not None)
    if bias is not None:
        nn.init.constant_(projection.bias, bias)
    return projection


class LowRank(nn.Module):
    """W↑ activation(W↓ x): [b, t, d] → [b, t, outputs], through `rank` numbers a token. bias: whether W↑ has one."""

    def __init__(
        self, hidden_size: int, rank: int, outputs: int, *, bias: bool = False, activation: nn.Module | None = None
    ) -> None:
        super().__init__()
        if rank < 1:
            raise ValueError(f"rank: expected at least 1, got {rank}")
        self.down = nn.Linear(hidden_size, rank, bias=False)
        self.activation = nn.Identity() if activation is None else activation
        self.up = nn.Linear(rank, outputs, bias=bias)

    def forward(self, x: Hidden) -> Tensor:
        out: Tensor = self.up(self.activation(self.down(x)))
        return out


def init_parameter(parameter: Tensor, values: Tensor) -> None:
    """Where a gate's parameter begins, unless it was read from a file."""
    if not getattr(parameter, "_is_hf_initialized", False):
        with torch.no_grad():
            parameter.copy_(values)


def check_depth(depth: tuple[int, int]) -> tuple[int, int]:
    """(l, L): a layer's index and how many there are, for a rule that differs by layer; refused where l ∉ 0 … L−1."""
    layer, layers = depth
    if not 0 <= layer < layers:
        raise ValueError(f"depth: expected a layer's index from 0 and how many layers there are, got {tuple(depth)}")
    return layer, layers
