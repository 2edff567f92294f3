"""The layer: project → two memories → mixer → norm → project."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

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
    """A sequence layer whose heads hold a precise, short KV-memory and a compressed, endless FW-memory.

        q, k = W_q x, W_k x    v = SiLU(W_v x)
        y    = W_o RMSNorm(mix(FW read of q, KV read of q))

    hidden_size: width of x and y. num_heads: query heads. window: tokens that the KV-memory reaches, the current one
    included; None is full attention (for "synchronous" and "kv-only"; "fw-only" has no use for it).

    What is chosen by name (`hqlt.register` adds to each), and what each takes as `options`:
    blend: when a token reaches each memory: "synchronous", "delayed-streaming" (write_gates="current" or "own"),
    "delayed-chunk"; "kv-only" and "fw-only" are the baselines from the same parts ("kv-only" as in Transformer++: v
    without SiLU, no norm). mixer: "vector" (where None), "scalar", "sum", "add" (gate_bias, kv_gate). fast_weights: how
    a pair is written: "delta" (where None; beta_max, beta_bias), "gated-delta", "delta-product", "gated-delta-product",
    "kda", "comba", "rwkv7", "linear", "retnet", "lightning", "gla", "mamba2", "hgrn2" or "mlstm" (`docs/rules.md`).
    retention: which entries stay visible beyond the window: none with "recent" (where None), `kept` a KV head with
    "surprise" (score="error" or "beta-error"), "value-norm" and "random". The KV-memory takes sinks (first entries of a
    segment that stay, too), kept_alike, kept_positions, kept_norm and kept_gate (`hqlt.memory.KVMemory`), rope_theta
    (base of its rotary positions, 10000 unless given, None for none), partial_rotary_factor and rope_scaling
    (`hqlt.memory.rotary`).

    Heads: num_kv_heads (None: num_heads) share pairs and matrix among query heads; head_dim (None: hidden_size /
    num_heads) of q and k; "fw-only" has value heads of their own number (num_value_heads) and width (value_dim).
    qkv_bias, o_bias: biases of the projections. qk_norm: RMSNorm of q and k, over each "head" or the "full" width;
    zero_centered_norms: its weight is 1 + w. kv_activation, fw_activation: of the values that each memory sees, "silu"
    or None; unless given, both "silu", but none for an attention that stays itself ("kv-only", mixer "add").
    head_norm: RMSNorm of the mix (of the FW read, with mixer "add") over each "head" (or True), over each "group" of
    value heads that share a key head, or over the "full" width; unless given, over heads where there is an FW-memory.
    norm_eps: of all norms. conv_size: taps of a short convolution on q, k, v, and on the keys and values that a rule
    projects itself, before anything else (0: none). output_gate: multiply the normed heads by SiLU(W_g x) ("silu" or
    True) or by σ(W_g x) ("sigmoid"); with gate_rank W_g x is W↑ W↓ x + b through so many numbers, as in Kimi delta
    attention. norm_after_gate: norm what the gate has multiplied instead, as Mamba-2 does.

    Parameters: q_proj, k_proj, v_proj, mixer.gate_proj, o_norm, o_proj, the rule's own such as fw.beta_proj, each
    `.weight`; with their options `.bias`, q_norm, k_norm, conv.weight, g_proj.weight and g_norm for o_norm.

    Raises ValueError for what does not fit together, and for an option that no choice uses.

    Source: the paper, section 3; PyTorch's default initialisation, the paper's in `hqlt.model`.
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
        self.sizes = heads = Heads.of(hidden_size, num_heads, num_kv_heads, head_dim, num_value_heads, value_dim, alone)
        self.kv: KVMemory | None = None if alone else self._kv(parts)
        self.mixer: Mixer = parts["mixer"](heads) if "mixer" in parts else Alone(heads)
        widths = heads.queries * heads.k, heads.keys * heads.k, heads.matrices * heads.v
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(hidden_size, width, bias=qkv_bias) for width in widths)
        # After the projections: seeds draw weights in this order, and published figures hang on it.
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
        kv: KVMemory = parts["memory"](self.sizes, parts["retention"](self.sizes))
        if kv.kept and self.blend.window is None:
            name = registry.name_of("retention", type(kv.retention))
            raise ValueError(
                f"retention: expected 'recent' and no sinks with window=None, which holds every entry, got {name!r}, "
                f"sinks={kv.sinks}"
            )
        return kv

    def set_retention(self, retention: str, window: int | None = None, **options: Any) -> None:
        """Keep other entries beyond the window from now on, as `hqlt.with_retention` of this layer does, in place."""
        assert self.kv is not None and self.blend.window is not None, "there is nothing beyond the window"
        kind = registry.find("retention", retention)
        takers = {f"retention={retention!r}": kind, "KV": KVMemory.with_retention}
        own, others = registry.split_options(options, takers)
        kv = self.kv.with_retention(kind(self.sizes, **own), **others)
        self.blend.check(Memories(kv, self.fw))
        self.blend.window = self.blend.valid_window(self.blend.window if window is None else window)
        self.kv = kv.to(self.like).train(self.training)
        self._cache_derived()

    def _fw(self, parts: dict[str, Callable[..., Any]]) -> FWMemory:
        fw: FWMemory = parts["fast_weights"](self.sizes)
        return fw

    def _register_like(self) -> None:
        self.like: Tensor
        self.register_buffer("like", torch.empty(0), persistent=False)  # has the layer's dtype, its weights or not
        self._cache_derived()

    def _cache_derived(self) -> None:
        """What every call looks at, and is the same for all of them."""
        self.entries = self._entries()
        self.sizes_held = [entry.sizes for entry in leaves(self.entries)]
        self.fused = tuple(make() for make in FUSED)

    def _activations(self, kv: str | None, fw: str | None) -> None:
        """One activation where both memories see the same values, or one of the FW-memory's own."""
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
                    f"kv_activation: expected {fw!r} as fw_activation, or None, because the pairs that both memories "
                    f"see are held once; got {kv!r}"
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
        k, wide = self.sizes.k, kind == "full"
        q_width, k_width = (k * (heads if wide else 1) for heads in (self.sizes.queries, self.sizes.keys))
        norm = ZeroCenteredRMSNorm if zero_centered else RMSNorm
        return norm(q_width, eps), norm(k_width, eps)

    def _entries(self) -> MemoryState:
        """What the state is made of, without the batch row."""
        heads, s = self.sizes, self.blend.slots
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
        """x: [b, t, hidden]; state: what an earlier call returned, None for empty memories; resets: Bool[b, t].

        → y [b, t, hidden], the state after the last token. The given state is left as it was.

        Raises ValueError for shapes that do not fit and for a state that another layer made.
        """
        size = match(x=(x, "b t d"))
        b, t = size["b"], size["t"]
        if size["d"] != self.hidden_size:
            raise ValueError(f"x: expected [b, t, {self.hidden_size}] for this layer, got shape {list(x.shape)}")
        check_resets(resets, b, t)
        if state is not None:
            if type(state) is tuple:  # as torch.jit.trace passes it
                state = self.state_of(leaves(state))
            self.check_state(state, x)
        if t == 0:
            return self.no_tokens(x), self.init_state(b, x.device) if state is None else state

        projected, convolution = self.project(x, state, resets)
        heads, (kv, fw, _, position) = self.heads(projected, state, resets)
        y = heads.flatten(2)
        if self.g_proj is not None:
            y = y * self.output_gate(self.g_proj(x))
        if self.g_norm is not None:
            y = self.g_norm(y.view_as(heads)).flatten(2)
        return self.o_proj(y), MemoryState(kv, fw, convolution, position)

    def no_tokens(self, x: Hidden) -> Hidden:
        """y for t = 0. Every weight takes part by an empty slice: its gradient is zero, as in any other call."""
        y: Tensor = self.o_proj(x.new_zeros(*x.shape[:2], self.sizes.reads * self.sizes.v)) + x.flatten()[:0].sum()
        return y + sum(weight.flatten()[:0].sum() for weight in self.parameters()) if torch.is_grad_enabled() else y

    def project(self, x: Hidden, state: MemoryState | None, resets: Resets | None) -> tuple[Projected, Tensor]:
        """What the heads are made of, and the latest inputs of the convolution."""
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
        """Into heads, normed where there are norms of q and k: [b, t, heads, ·]."""
        heads = self.sizes
        (b, t, _), (q_norm, k_norm) = q.shape, (self.q_norm, self.k_norm)
        if q_norm is not None and k_norm is not None and not self.norms_heads:
            q, k = q_norm(q), k_norm(k)
        q, k = q.view(b, t, heads.queries, heads.k), k.view(b, t, heads.keys, heads.k)
        if q_norm is not None and k_norm is not None and self.norms_heads:
            q, k = q_norm(q), k_norm(k)
        if heads.matrices > heads.keys:
            q, k = (x.repeat_interleave(heads.matrices // heads.keys, dim=2) for x in (q, k))
        return q, k, v.view(b, t, heads.matrices, heads.v)

    def heads(
        self, projected: Projected, state: MemoryState | None, resets: Resets | None
    ) -> tuple[Values, MemoryState]:
        """What both memories say, mixed and normed: [b, t, h, v], and the state after the last token.

        Where nobody watches a part, the first of `hqlt.layer.fused.FUSED` that serves does it in one piece; otherwise
        the parts run one by one.
        """
        parts = self.parts()
        if not parts.hooked():
            for fused in self.fused:
                if (done := fused(parts, projected, state, resets)) is not None:
                    return done
        return parts.run(projected, state, resets)

    def parts(self) -> Parts:
        modules: dict[str, Any] = self._modules  # nn.Module's look-up of self.mixer takes as long as one token's mixing
        return Parts._make(map(modules.get, ("v_activation", "kv", "fw", "blend", "mixer", "o_norm")))

    def explain(self) -> Choice:
        """How a token by itself, without gradients, runs on a CPU between the projections, and why.

        >>> hqlt.HybridMemory(64, 4, mixer="add").explain()
        Choice(name='parts', why='one by one, each by its fastest operation: no native form of mixer, v_activation')
        """
        if unknown := without_native_form(self.parts()):
            missing = ", ".join(unknown)
            return Choice("parts", f"one by one, each by its fastest operation: no native form of {missing}")
        if native.why_not():
            return Choice("parts", f"one by one, each by its fastest operation: {native.why_not()}")
        return Choice("native", "memories, mixer and norm in one call of C++")

    def init_state(self, batch_size: int, device: torch.device | str | None = None) -> MemoryState:
        """The state of empty memories, as `state=None` means it; on the layer's device where none is given."""
        state: MemoryState = pytree.tree_map(lambda entry: entry.zeros(batch_size, self.like, device), self.entries)
        return state

    def state_of(self, leaves: Iterable[Tensor]) -> MemoryState:
        """The state whose `leaves()` these are."""
        state: MemoryState = pytree.tree_unflatten(list(leaves), pytree.tree_structure(self.entries))
        return state

    def check_state(self, state: MemoryState, x: Hidden) -> None:
        """Refuse a state of another layer, batch or device."""
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
    """The names of the arguments that a layer of these choices uses."""
    chosen = choices(blend, mixer, fast_weights, retention)
    unused = {name for name in ("mixer", "fast_weights", "retention") if name not in chosen}
    unused |= set(FW_ONLY_ARGUMENTS) if "memory" in chosen else set()
    own = [name for name in _own_arguments() if name not in unused]
    return [*own, *_options(cls for _, cls in chosen.values())]


def layer_arguments() -> list[str]:
    """The names of all arguments that some layer understands, those of registered choices included."""
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
    """What makes its logits (None: there is no gate), and what they go through."""
    if rank is not None and not name:
        raise ValueError(f"gate_rank: expected together with output_gate, got {rank} without")
    kind = "silu" if isinstance(name, bool) else name
    check_choice("output_gate", kind, OUTPUT_GATES)
    if rank is not None:
        return LowRank(hidden_size, rank, width, bias=True), OUTPUT_GATES[kind]
    return (nn.Linear(hidden_size, width, bias=False) if name else None), OUTPUT_GATES[kind]


def _shape(sizes: Iterable[int | None]) -> str:
    return "[" + ", ".join("any" if size is None else str(size) for size in sizes) + "]"
