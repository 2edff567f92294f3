"""The FW-memory: compressed and unbounded. A write rule stores KV pairs in fast weights and reads them by a product."""

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
    """What a rule writes at each step; the blend decides whose token it is."""

    keys: Keys
    """[b, t, h, k] before the feature map"""
    values: Values
    """[b, t, h, v]"""
    gates: Tree
    """[b, t, …] each, from `FWMemory.gates`"""
    live: Live | None
    """Bool[b, t]: where False, nothing is written and nothing decays; None: all tokens are written"""


class Errors(NamedTuple):
    """Prediction errors of a rule, in at least float32 and detached."""

    plain: Tensor
    """[b, t, h] ‖e‖ with e = v − Sᵀa just before the write; √(Σ ‖e‖²) over several writes per token"""
    weighted: Tensor
    """[b, t, h] ‖βe‖, likewise"""


class FWMemory(nn.Module):
    """Base class of write rules, which own their parameters, gates, feature map, scan and the shape of their state.

    A subclass defines the gates of a token (`logits`, `gates`, and their shapes in `gate_entries`), its state
    (`state_entries`) and the recurrence (`forward`). Its options are the keyword-only arguments of its constructor;
    once it is registered, they are options of the layer.

    Args:
        heads: number and width of the layer's heads.
    """

    native: str | None = None
    """Name of this rule in `hqlt.ops.step`, if it supports it; not inherited by subclasses."""
    gates_hold_pairs = False
    """Whether the gates include keys and values of their own token, so that they cannot write another token. The layer
    then sets `own_v_activation`, the activation of these values."""

    writes = 1
    """Number of writes per token."""
    erases = True
    """Whether a write reads what it erases."""

    returns_errors = False
    """Whether `forward` accepts errors=True and then also returns `Errors`."""

    def __init__(self, heads: Heads) -> None:
        super().__init__()
        self.heads = heads
        self.feature_map: LearnedMap | None = None
        """Learned map of queries and keys, if an option of the rule asks for one."""
        self.v_activation: nn.Module = nn.Identity()
        """Activation of values for this memory only, set by the layer (`fw_activation`)."""
        self.convolved: dict[str, int] = {}
        """Widths of those fields of the logits that pass through the layer's short convolution, as q, k and v do."""

    def logits(self, x: Hidden) -> Tree:
        """Project the layer's input x [b, t, d] to the logits of the gates, [b, t, …] each."""
        return ()

    def mapped(self, q: Queries, keys: Keys) -> tuple[Queries, Keys]:
        """Apply the learned map, if there is one, to raw queries and keys."""
        return (q, keys) if self.feature_map is None else self.feature_map(q, keys)

    @property
    def key_width(self) -> int:
        """Number of rows of a head's matrix."""
        return self.heads.k * (1 if self.feature_map is None else self.feature_map.widening)

    def gates(self, logits: Tree) -> Tree:
        """Return the gates of the logits: a NamedTuple of [b, t, …] tensors."""
        return ()

    def gate_entries(self) -> Tree:
        """Return the gates' `Entry`s without b and t, for blends that hold gates until a token is written."""
        return ()

    def init_parameters(self) -> None:
        """Set the rule's own initial values, after a model's own initialization of the projections."""

    def state_entries(self) -> Tree:
        """Return the state's `Entry`s without b, as a NamedTuple."""
        raise NotImplementedError

    def forward(self, q: Queries, write: Write, past: Tree | None, resets: Resets | None) -> tuple[Any, ...]:
        """At each step write if the token is live, then read.

        Args:
            q ([b, t, g·h, k]): queries, before the feature map.
            write: what is written.
            past: the state before the first step. None: empty.
            resets (Bool[b, t]): steps at which the memory starts empty. None: none.

        Returns:
            The reads [b, t, heads, v], and the state after the last step.
        """
        raise NotImplementedError

    def skip(self, values: Values) -> Values | None:
        """Return what a token's own values add to its read, whenever they are written: [b, t, h, v], or None."""
        return None

    def multiply_adds(self) -> int:
        """Return the multiply-adds per token: k · v for each read, each write and each erase."""
        heads = self.heads
        return (heads.reads + heads.matrices * self.writes * (1 + self.erases)) * self.key_width * heads.v

    def read(self, q: Queries, past: Tree) -> Values:
        """Read q without writing."""
        (b, t), heads = q.shape[:2], self.heads
        keys, values = q.new_zeros(b, t, heads.matrices, heads.k), q.new_zeros(b, t, heads.matrices, heads.v)
        gates = pytree.tree_map(lambda entry: q.new_zeros(b, t, *entry.sizes), self.gate_entries())
        nothing = Write(keys, values, gates, torch.zeros(b, t, dtype=torch.bool, device=q.device))
        out: Values = self(q, nothing, past, None)[0]
        return out


def gate_projection(hidden_size: int, outputs: int, bias: float | None) -> nn.Linear:
    """Return a linear map for the logits of gates.

    Args:
        hidden_size: width of the input.
        outputs: number of logits.
        bias: initial value of all biases. None: no bias.

    Returns:
        The linear map.

    Example:
        >>> from hqlt.memory.fw import gate_projection
        >>> gate_projection(64, 4, bias=3.0).bias.tolist()
        [3.0, 3.0, 3.0, 3.0]
    """
    projection = nn.Linear(hidden_size, outputs, bias=bias is not None)
    if bias is not None:
        nn.init.constant_(projection.bias, bias)
    return projection


class LowRank(nn.Module):
    """A low-rank projection W↑ activation(W↓ x): [b, t, d] → [b, t, outputs].

    Args:
        hidden_size: width of x.
        rank: number of rows of W↓.
        outputs: number of rows of W↑.
        bias: whether W↑ has a bias.
        activation: module between the two maps. Default: none.

    Raises:
        ValueError: when the rank is below 1.

    Example:
        >>> import torch
        >>> from hqlt.memory.fw import LowRank
        >>> LowRank(64, 16, 128)(torch.randn(2, 5, 64)).shape
        torch.Size([2, 5, 128])
    """

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
    """Set the initial values of a parameter in place, unless it was loaded from a checkpoint.

    Args:
        parameter: the parameter.
        values: its values, of the same shape or broadcast to it.

    Example:
        >>> import torch
        >>> from hqlt.memory.fw import init_parameter
        >>> weight = torch.nn.Parameter(torch.empty(2))
        >>> init_parameter(weight, torch.ones(2))
        >>> weight.tolist()
        [1.0, 1.0]
    """
    if not getattr(parameter, "_is_hf_initialized", False):
        with torch.no_grad():
            parameter.copy_(values)


def check_depth(depth: tuple[int, int]) -> tuple[int, int]:
    """Return (l, L), a layer's index and the number of layers; raise a ValueError unless 0 ≤ l < L."""
    layer, layers = depth
    if not 0 <= layer < layers:
        raise ValueError(f"depth: expected a layer's index (from 0) and the number of layers, got {tuple(depth)}")
    return layer, layers
