"""The hybrid memory layer: project → two memories → mixer → norm → project."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from hqlt import native, registry
from hqlt.blend import Blend, Memories
from hqlt.layer.choices import builders_of, choices
from hqlt.layer.convolution import ShortConvolution
from hqlt.layer.fused import FUSED, without_native_form
from hqlt.layer.norm import RMSNorm, ZeroCenteredRMSNorm, head_norms
from hqlt.layer.parts import Parts, Projected
from hqlt.memory import Entry, FWMemory, Heads, Held, KVMemory, MemoryState
from hqlt.memory.fw import LowRank
from hqlt.memory.state import leaves, named
from hqlt.mixer import Alone, Mixer
from hqlt.ops import Choice
from hqlt.registry import check_choice
from hqlt.shapes import Hidden, Keys, Queries, Resets, Values, check_resets, match

ACTIVATIONS = {"silu": nn.SiLU}
OUTPUT_GATES: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "sigmoid": torch.sigmoid}
QK_NORMS = ("head", "full")


class HybridMemory(nn.Module):
    """A sequence layer whose heads combine an exact, short KV-memory with a compressed, unbounded FW-memory.

        q, k = W_q x, W_k x    v = SiLU(W_v x)
        y    = W_o RMSNorm(mix(FW read of q, KV read of q))

    Parameters: q_proj, k_proj, v_proj, mixer.gate_proj, o_norm, o_proj and those of the write rule, such as
    fw.beta_proj. Options add biases, q_norm, k_norm, conv and g_proj, and g_norm in place of o_norm.

    Args:
        hidden_size: width of x and y.
        num_heads: number of query heads.
        window (tokens): number of latest tokens that the KV-memory attends to, the current one included. None is full
            attention, for "synchronous" and "kv-only"; "fw-only" ignores it.
        blend: when a token reaches each memory: "synchronous", "delayed-streaming" or "delayed-chunk". The baselines
            "kv-only" and "fw-only" have one memory ("kv-only" is the attention of Transformer++: v without SiLU, no
            norm).
        mixer: how the two reads are combined: "vector" (default), "scalar", "sum" or "add".
        fast_weights: write rule of the FW-memory: "delta" (default), "gated-delta", "delta-product",
            "gated-delta-product", "kda", "comba", "rwkv7", "linear", "retnet", "lightning", "gla", "mamba2", "hgrn2" or
            "mlstm" (see `docs/rules.md`).
        retention: which KV entries stay visible beyond the window: "recent" (default, none), "surprise", "value-norm"
            or "random".
        num_kv_heads: number of key and value heads, shared by groups of query heads. Default: num_heads.
        head_dim: width of a query or key head. Default: hidden_size / num_heads.
        num_value_heads: number of value heads, with "fw-only". Default: the number of key heads.
        value_dim: width of a value head, with "fw-only". Default: head_dim.
        qkv_bias: whether q_proj, k_proj and v_proj have a bias.
        o_bias: whether o_proj has a bias.
        qk_norm: RMSNorm of q and k over each "head" or over the "full" width. Default: none.
        zero_centered_norms: whether the weight of these norms is 1 + w.
        kv_activation: activation of the values in the KV-memory, "silu" or None. By default "silu", but None if the
            attention is to stay a plain one ("kv-only" and mixer "add").
        fw_activation: activation of the values in the FW-memory, "silu" (default) or None.
        head_norm: RMSNorm of the mixed reads (of the FW read with mixer "add") over each "head" (or True), over each
            "group" of value heads that share a key head, or over the "full" width. By default over each head if there
            is an FW-memory.
        norm_after_gate: whether the head norm follows the output gate, as in Mamba-2, instead of preceding it.
        norm_eps: ε of all norms.
        conv_size (taps): size of a short convolution on q, k, v, and on the keys and values that a write rule projects
            itself. 0: no convolution.
        output_gate: factor of the normed heads: SiLU(W_g x) ("silu" or True) or σ(W_g x) ("sigmoid"). Default: none.
        gate_rank: rank r of the output gate, which is then W↑ W↓ x + b, as in Kimi delta attention. Default: full rank.
        **options: options of the chosen parts: write_gates ("current" or "own") of "delayed-streaming"; gate_bias and
            kv_gate of mixers; beta_max, beta_bias, … of write rules; kept (entries per KV head) and score ("error" or
            "beta-error") of retentions; sinks, kept_alike, kept_positions, kept_norm, kept_gate, rope_theta (default
            10000; None: no positions), partial_rotary_factor and rope_scaling of `hqlt.memory.KVMemory`.

    Raises:
        ValueError: when arguments do not fit together, or when no chosen part has an option.

    Source:
        The paper, section 3. Weights are initialized by PyTorch's defaults; the paper's initialization is in
        `hqlt.model`.

    Example:
        >>> import torch, hqlt
        >>> layer = hqlt.HybridMemory(hidden_size=64, num_heads=4, window=8, blend="delayed-chunk")
        >>> y, state = layer(torch.randn(2, 100, 64))
        >>> y, state = layer(torch.randn(2, 1, 64), state=state)
        >>> state.fw.matrix.shape
        torch.Size([2, 4, 16, 16])
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        window: int | None = 64,
        blend: str = "synchronous",
        mixer: str | None = None,
        fast_weights: str | None = None,
        *,
        retention: str | None = None,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        num_value_heads: int | None = None,
        value_dim: int | None = None,
        qkv_bias: bool = False,
        o_bias: bool = False,
        qk_norm: str | None = None,
        zero_centered_norms: bool = False,
        kv_activation: str | None = "default",
        fw_activation: str | None = "default",
        head_norm: bool | str | None = None,
        norm_after_gate: bool = False,
        norm_eps: float = 1e-6,
        conv_size: int = 0,
        output_gate: bool | str = False,
        gate_rank: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.hidden_size, self.num_heads = hidden_size, num_heads
        parts = builders_of(blend, mixer, fast_weights, retention, options)
        self.blend: Blend = parts["blend"](window)
        alone = "memory" not in parts
        self.heads = heads = Heads.of(hidden_size, num_heads, num_kv_heads, head_dim, num_value_heads, value_dim, alone)
        self.kv: KVMemory | None = None if alone else self._kv(parts)
        self.mixer: Mixer = parts["mixer"](heads) if "mixer" in parts else Alone(heads)
        widths = heads.queries * heads.k, heads.keys * heads.k, heads.matrices * heads.v
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(hidden_size, width, bias=qkv_bias) for width in widths)
        # After the projections: published results depend on the order in which weights are drawn.
        self.fw: FWMemory | None = self._fw(parts) if "fast_weights" in parts else None
        self.blend.check(Memories(self.kv, self.fw))
        self._activations(kv_activation, fw_activation)
        self.channels = sum(widths) + (0 if self.fw is None else sum(self.fw.convolved.values()))
        self.conv = ShortConvolution(self.channels, conv_size) if conv_size else None
        self.q_norm, self.k_norm = self._qk_norms(qk_norm, norm_eps, zero_centered_norms)
        normed = self.blend.has_fw if head_norm is None else head_norm
        self.o_norm, self.g_norm = head_norms(normed, heads, norm_eps, output_gate, norm_after_gate)
        self.g_proj, self.output_gate = _output_gate(output_gate, gate_rank, hidden_size, heads.reads * heads.v)
        self.o_proj = nn.Linear(heads.reads * heads.v, hidden_size, bias=o_bias)
        self._register_like()

    def _kv(self, parts: dict[str, Callable[..., Any]]) -> KVMemory:
        kv: KVMemory = parts["memory"](self.heads, parts["retention"](self.heads))
        if kv.kept and self.blend.window is None:
            name = registry.name_of("retention", type(kv.retention))
            raise ValueError(
                f"retention: expected 'recent' and no sinks with window=None, which holds every entry, got {name!r}, "
                f"sinks={kv.sinks}"
            )
        return kv

    def set_retention(self, retention: str, window: int | None = None, **options: Any) -> None:
        """Change which entries are kept beyond the window, in place (`hqlt.with_retention` copies)."""
        assert self.kv is not None and self.blend.window is not None, "the layer has no window"
        kind = registry.find("retention", retention)
        takers = {f"retention={retention!r}": kind, "KV": KVMemory.with_retention}
        own, others = registry.split_options(options, takers)
        kv = self.kv.with_retention(kind(self.heads, **own), **others)
        self.blend.check(Memories(kv, self.fw))
        self.blend.window = self.blend.valid_window(self.blend.window if window is None else window)
        self.kv = kv.to(self.like).train(self.training)
        self._cache_derived()

    def _fw(self, parts: dict[str, Callable[..., Any]]) -> FWMemory:
        fw: FWMemory = parts["fast_weights"](self.heads)
        return fw

    def _register_like(self) -> None:
        self.like: Tensor  # has the dtype and device of the layer, even if the layer has no weights of its own
        self.register_buffer("like", torch.empty(0), persistent=False)
        self._cache_derived()

    def _cache_derived(self) -> None:
        """Cache what every call needs and no call changes."""
        self.entries = self._entries()
        self.sizes_held = [entry.sizes for entry in leaves(self.entries)]
        self.fused = tuple(make() for make in FUSED)

    def _activations(self, kv: str | None, fw: str | None) -> None:
        """Set one activation if both memories see the same values, or a separate one for the FW-memory."""
        attends_as_is = self.fw is None or self.mixer.norms_fw
        kv = (None if attends_as_is else "silu") if kv == "default" else kv
        fw = "silu" if fw == "default" else fw
        for name, value in {"kv_activation": kv, "fw_activation": fw}.items():
            if value is not None:
                check_choice(name, value, ACTIVATIONS)
        shared = fw if self.kv is None else kv
        if self.kv is not None and self.fw is not None and kv != fw:
            if kv is not None:
                raise ValueError(
                    f"kv_activation: expected {fw!r} as fw_activation, or None, because values that both memories see "
                    f"are stored once; got {kv!r}"
                )
            self.fw.v_activation = _activation(fw)
        if self.fw is not None and self.fw.gates_hold_pairs:
            self.fw.own_v_activation = _activation(fw)
        self.v_activation: nn.Module = _activation(shared)

    def _qk_norms(self, kind: str | None, eps: float, zero_centered: bool) -> tuple[RMSNorm | None, RMSNorm | None]:
        if kind is None:
            if zero_centered:
                raise ValueError("zero_centered_norms: expected together with qk_norm, got it without")
            return None, None
        check_choice("qk_norm", kind, QK_NORMS)
        self.norms_heads = kind == "head"
        k, wide = self.heads.k, kind == "full"
        q_width, k_width = (k * (heads if wide else 1) for heads in (self.heads.queries, self.heads.keys))
        norm = ZeroCenteredRMSNorm if zero_centered else RMSNorm
        return norm(q_width, eps), norm(k_width, eps)

    def _entries(self) -> MemoryState:
        """Return the state's tree with an `Entry` in place of each tensor."""
        heads, s = self.heads, self.blend.slots
        kv: Any = ()
        if self.kv is not None:
            gates = self.fw.gate_entries() if self.fw is not None and self.blend.keeps_gates else ()
            gates = pytree.tree_map(lambda entry: Entry((s, *entry.sizes), entry.dtype), gates)
            keys, values = (Entry((s, heads.keys, width), "narrow") for width in (heads.k, heads.v))
            kv = Held(keys, values, gates, self.kv.kept_entries(s or 0))  # type: ignore[arg-type]
        taps = self.conv.size - 1 if self.conv else 0
        fw = () if self.fw is None else self.fw.state_entries()
        return MemoryState(kv, fw, Entry((taps, self.channels), "narrow"), Entry((), "int64"))  # type: ignore[arg-type]

    def forward(
        self, x: Hidden, state: MemoryState | None = None, resets: Resets | None = None
    ) -> tuple[Hidden, MemoryState]:
        """Process a batch of sequences.

        Args:
            x ([b, t, hidden]): the inputs.
            state: the state returned by an earlier call; it is not modified. Default: empty memories.
            resets (Bool[b, t]): True for each token that begins a new segment. Default: no resets.

        Returns:
            y [b, t, hidden], and the state after the last token.

        Raises:
            ValueError: when shapes do not fit, or when the state belongs to another layer.
        """
        size = match(x=(x, "b t d"))
        b, t = size["b"], size["t"]
        if size["d"] != self.hidden_size:
            raise ValueError(f"x: expected [b, t, {self.hidden_size}] for this layer, got shape {list(x.shape)}")
        check_resets(resets, b, t)
        if state is not None:
            if type(state) is tuple:  # torch.jit.trace turns NamedTuples into tuples
                state = self.state_of(leaves(state))
            self.check_state(state, x)
        if t == 0:
            return self.no_tokens(x), self.init_state(b, x.device) if state is None else state

        projected, convolution = self.project(x, state, resets)
        read, (kv, fw, _, position) = self.read_memories(projected, state, resets)
        y = read.flatten(2)
        if self.g_proj is not None:
            y = y * self.output_gate(self.g_proj(x))
        if self.g_norm is not None:
            y = self.g_norm(y.view_as(read)).flatten(2)
        return self.o_proj(y), MemoryState(kv, fw, convolution, position)

    if TYPE_CHECKING:  # what a call returns, for type checkers; at run time a call goes through the hooks
        __call__ = forward

    def no_tokens(self, x: Hidden) -> Hidden:
        """Return y for t = 0. Every weight contributes an empty slice, so that its gradient is zero and not missing."""
        y: Tensor = self.o_proj(x.new_zeros(*x.shape[:2], self.heads.reads * self.heads.v)) + x.flatten()[:0].sum()
        return y + sum(weight.flatten()[:0].sum() for weight in self.parameters()) if torch.is_grad_enabled() else y

    def project(self, x: Hidden, state: MemoryState | None, resets: Resets | None) -> tuple[Projected, Tensor]:
        """Return the projections of x, and the latest inputs of the convolution."""
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        write: Any = () if self.fw is None else self.fw.logits(x)
        latest = x.new_zeros(x.shape[0], 0, self.channels) if state is None else state.convolution
        if self.conv is not None:
            held = None if state is None else (state.convolution, state.position)
            own = {} if self.fw is None else {name: getattr(write, name) for name in self.fw.convolved}
            given = [q, k, v, *own.values()]
            convolved, latest = self.conv(torch.cat(given, dim=-1), held, resets)
            q, k, v, *others = convolved.split([x.shape[-1] for x in given], dim=-1)
            write = write._replace(**dict(zip(own, others, strict=True))) if own else write
        q, k, v = self.split(q, k, v)
        return Projected(q, k, v, write, self.mixer.logits(x)), latest

    def split(self, q: Hidden, k: Hidden, v: Hidden) -> tuple[Queries, Keys, Values]:
        """Split q, k and v into heads [b, t, heads, ·], with the norms of q and k if there are any."""
        heads = self.heads
        (b, t, _), (q_norm, k_norm) = q.shape, (self.q_norm, self.k_norm)
        if q_norm is not None and k_norm is not None and not self.norms_heads:
            q, k = q_norm(q), k_norm(k)
        q, k = q.view(b, t, heads.queries, heads.k), k.view(b, t, heads.keys, heads.k)
        if q_norm is not None and k_norm is not None and self.norms_heads:
            q, k = q_norm(q), k_norm(k)
        if heads.matrices > heads.keys:
            q, k = (x.repeat_interleave(heads.matrices // heads.keys, dim=2) for x in (q, k))
        return q, k, v.view(b, t, heads.matrices, heads.v)

    def read_memories(
        self, projected: Projected, state: MemoryState | None, resets: Resets | None
    ) -> tuple[Values, MemoryState]:
        """Return the mixed and normed reads [b, t, h, v], and the state after the last token.

        Unless a part has hooks, the first of `hqlt.layer.fused.FUSED` that supports the call runs it as one operation;
        otherwise the parts run one by one.
        """
        parts = self.parts()
        if not parts.hooked():
            for fused in self.fused:
                if (done := fused(parts, projected, state, resets)) is not None:
                    return done
        return parts.run(projected, state, resets)

    def parts(self) -> Parts:
        """Return the parts between the projections."""
        modules: dict[str, Any] = self._modules  # attribute access through nn.Module is slow for a single token
        return Parts._make(map(modules.get, ("v_activation", "kv", "fw", "blend", "mixer", "o_norm")))

    def explain(self) -> Choice:
        """Return how the layer processes a single token on a CPU without gradients, and why.

        >>> hqlt.HybridMemory(64, 4, fast_weights="kda").explain()
        Choice(name='parts', why='part by part, each with its fastest operation: no native form of fw')
        """
        if unknown := without_native_form(self.parts()):
            missing = ", ".join(unknown)
            return Choice("parts", f"part by part, each with its fastest operation: no native form of {missing}")
        if native.why_not():
            return Choice("parts", f"part by part, each with its fastest operation: {native.why_not()}")
        return Choice("native", "memories, mixer and norm in one C++ call")

    def init_state(self, batch_size: int, device: torch.device | str | None = None) -> MemoryState:
        """Return the state of empty memories, equivalent to `state=None`; by default on the layer's device."""
        state: MemoryState = pytree.tree_map(lambda entry: entry.zeros(batch_size, self.like, device), self.entries)
        return state

    def state_of(self, leaves: Iterable[Tensor]) -> MemoryState:
        """Rebuild a state from its `leaves()`."""
        state: MemoryState = pytree.tree_unflatten(list(leaves), pytree.tree_structure(self.entries))
        return state

    def check_state(self, state: MemoryState, x: Hidden) -> None:
        """Raise a ValueError if the state belongs to another layer, batch size or device."""
        b, device = x.shape[0], x.device
        if [(part.shape, part.device) for part in leaves(state)] == [
            ((b, *sizes), device) for sizes in self.sizes_held
        ]:
            return
        given, expected = named(state), named(self.entries)
        if list(given) != list(expected):
            raise ValueError(
                f"state: expected {', '.join(expected)} for this layer ({self.extra_repr()}), got {', '.join(given)}; "
                f"is it the state of another layer?"
            )
        for (name, part), entry in zip(given.items(), expected.values(), strict=True):
            sizes = x.shape[0], *entry.sizes
            if len(part.shape) != len(sizes) or any(
                size not in (None, got) for size, got in zip(sizes, part.shape, strict=True)
            ):
                raise ValueError(
                    f"state.{name}: expected shape {_shape((len(x), *entry.sizes))} for this layer "
                    f"({self.extra_repr()}) and a batch of {len(x)}, got {_shape(part.shape)}; is it the state of "
                    f"another layer or batch?"
                )
            if part.device != x.device:
                raise ValueError(
                    f"state.{name}: expected on {x.device}, where x is, got {part.device}; "
                    f"use state.to({str(x.device)!r})"
                )

    def extra_repr(self) -> str:
        return f"hidden_size={self.hidden_size}, num_heads={self.num_heads}"


FW_ONLY_ARGUMENTS = ("num_value_heads", "value_dim")


def arguments_of(blend: str, mixer: str | None, fast_weights: str | None, retention: str | None = None) -> list[str]:
    """Return the names of all arguments that a layer with these choices accepts.

    Args:
        blend: name of the blend.
        mixer: name of the mixer. Default: "vector".
        fast_weights: name of the write rule. Default: "delta".
        retention: name of the retention. Default: "recent".

    Returns:
        The names, those of `HybridMemory` itself first.

    Example:
        >>> from hqlt.layer import arguments_of
        >>> arguments_of("fw-only", None, "kda")[-3:]
        ['beta_max', 'decay_rank', 'decay_floor']
    """
    chosen = choices(blend, mixer, fast_weights, retention)
    unused = {name for name in ("mixer", "fast_weights", "retention") if name not in chosen}
    unused |= set(FW_ONLY_ARGUMENTS) if "memory" in chosen else set()
    own = [name for name in _own_arguments() if name not in unused]
    return [*own, *_options(cls for _, cls in chosen.values())]


def layer_arguments() -> list[str]:
    """Return the names of all arguments that any layer accepts, options of registered classes included.

    Returns:
        The names, those of `HybridMemory` itself first.

    Example:
        >>> from hqlt.layer import layer_arguments
        >>> {"hidden_size", "beta_max", "sinks"} <= set(layer_arguments())
        True
    """
    kinds = ("blend", "mixer", "rule", "retention")
    classes = [registry.find(kind, name) for kind in kinds for name in registry.names(kind)]
    return [*_own_arguments(), *_options([KVMemory, *classes])]


def _own_arguments() -> list[str]:
    return [name for name in inspect.signature(HybridMemory).parameters if name != "options"]


def _options(classes: Iterable[type]) -> list[str]:
    return list(dict.fromkeys(name for cls in classes for name in registry.options_of(cls)))


def _activation(name: str | None) -> nn.Module:
    return nn.Identity() if name is None else ACTIVATIONS[name]()


def _output_gate(
    name: bool | str, rank: int | None, hidden_size: int, width: int
) -> tuple[nn.Module | None, Callable[[Tensor], Tensor]]:
    """Return the module of the gate's logits (None without a gate), and the activation of the gate."""
    if rank is not None and not name:
        raise ValueError(f"gate_rank: expected together with output_gate, got {rank} without")
    kind = "silu" if isinstance(name, bool) else name
    check_choice("output_gate", kind, OUTPUT_GATES)
    if rank is not None:
        return LowRank(hidden_size, rank, width, bias=True), OUTPUT_GATES[kind]
    return (nn.Linear(hidden_size, width, bias=False) if name else None), OUTPUT_GATES[kind]


def _shape(sizes: Iterable[int | None]) -> str:
    return "[" + ", ".join("any" if size is None else str(size) for size in sizes) + "]"
