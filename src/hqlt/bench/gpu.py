"""GPU benchmark in bfloat16: the core of a synchronous layer (between its projections), and a training step of
hqlt-340m.

The peer is the computation of the paper's layer as separate PyTorch calls: φ, fla's `chunk_delta_rule`, rotary
embedding, FlashAttention, mixer and norm. It is measured as written, and with its elementwise operations compiled. A
contestant that does not run here, or computes something else, is reported and skipped.

For the core, the memories' own operations are counted, as in `hqlt.bench.ops`. For a training step, they are added to 6
operations per token and weight of the matrix products. The ceiling is the dense bfloat16 rate measured on the same card
in the same run.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from contextlib import ExitStack, nullcontext, suppress
from functools import partial
from typing import Any, NamedTuple, TypeVar
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from hqlt import ops
from hqlt.bench.race import (
    CUDA,
    Meter,
    Row,
    Work,
    check_equal,
    copy_rate,
    forward_and_backward,
    matrix_product_rate,
    race,
    rows,
)
from hqlt.errors import first_line, how_to_install
from hqlt.memory.rotary import Rotary
from hqlt.ops.backend import IMPLEMENTATIONS
from hqlt.ops.features import rotated, unit_silu

ONLY = ("memories", "train")
SHAPE = (8, 2048, 8, 128)
CAPTION = "bfloat16; ×: speedup over the first row; %: share of the measured dense rate of matrix products"
TOLERANCE = 4e-2
T = TypeVar("T")
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


class Target(NamedTuple):
    """The device and dtype of the contestants, and how they are measured."""

    device: str = "cuda"
    dtype: torch.dtype = torch.bfloat16
    meter: Meter = CUDA


GPU = Target()


def setting() -> dict[str, Any]:
    """The machine and versions that the results hold for."""
    if not torch.cuda.is_available():
        raise SystemExit(
            "hqlt bench gpu: expected a CUDA GPU that PyTorch can use, found none; the other benchmarks run on a CPU, "
            "and `make test-triton` checks the GPU kernels on a CPU"
        )
    if importlib.util.find_spec("fla") is None:
        raise SystemExit(f"hqlt bench gpu: expected the package fla-core, found none; {how_to_install('gpu')}")
    measured = {name: f"{rate:.3g}" for name, rate in rates(GPU).items()}
    return {"GPU": torch.cuda.get_device_name(), "torch": torch.__version__, **measured}


def rates(target: Target) -> dict[str, float]:
    """Measured rates of copying and of dense matrix products."""
    copied = copy_rate(2**29 if target is GPU else 2**10, meter=target.meter, device=target.device)
    return {"copied TB/s": copied / 1e12, "dense TFLOP/s": _dense_rate(target is not GPU, target) / 1e12}


def run(rounds: int, quick: bool, only: str | None, target: Target = GPU) -> list[Row]:
    ceiling = _dense_rate(quick, target)
    results: list[Row] = []
    if only in (None, "memories"):
        for decays in (False, True):
            results += memories_race((1, 70, 2, 16) if quick else SHAPE, 64, rounds, ceiling, target, decays)
    if only in (None, "train"):
        results += training_race(1 if quick else 8, 70 if quick else 2048, quick, rounds, ceiling, target)
    return results


def _dense_rate(quick: bool, target: Target) -> float:
    return matrix_product_rate(128 if quick else 8192, 20, target.meter, dtype=target.dtype, device=target.device)


def inputs(b: int, t: int, h: int, d: int, decays: bool = False, **kind: Any) -> list[Tensor]:
    """Random q, k, v, β, gate, norm weight and, with decay, log α, which require gradients."""
    q, k, v, gate = torch.randn(4, b, t, h, d, **kind)
    v, beta = F.silu(v), 2 * torch.rand(b, t, h, device=q.device)
    decay = [-0.1 * torch.rand(b, t, h, device=q.device)] if decays else []
    return [x.requires_grad_() for x in (q, k, v, beta, gate, torch.ones(d, **kind), *decay)]


def one_by_one(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    gate: Tensor,
    norm_weight: Tensor,
    decay: Tensor | None = None,
    *,
    attention: Attention,
) -> Tensor:
    """The core of the layer as the paper's code runs it: fla, then attention, then mixer and norm."""
    if decay is None:
        fw, _ = ops.delta_rule(unit_silu(q), unit_silu(k), v, beta, backend="fla")
    else:
        fw, _ = ops.fast_weights(unit_silu(q), unit_silu(k), v, beta=beta, decay=decay, backend="fla")
    cos, sin = Rotary(10_000.0).table(q.shape[1], q.shape[3], q.device, torch.float32)
    kv = attention(rotated(q, cos, sin), rotated(k, cos, sin), v)
    gamma = gate.sigmoid()
    return F.rms_norm(gamma * fw + (1 - gamma) * kv, norm_weight.shape, norm_weight, 1e-6)


def varlen_window(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """PyTorch's FlashAttention for packed sequences, which supports windows."""
    from torch.nn.attention.varlen import varlen_attn

    b, t = q.shape[:2]
    bounds = torch.arange(0, b * t + 1, t, dtype=torch.int32, device=q.device)
    q, k, v = (x.flatten(0, 1).to(v.dtype) for x in (q, k, v))
    read = varlen_attn(q, k, v, bounds, bounds, t, t, window_size=(window - 1, 0))
    assert isinstance(read, Tensor)
    return read.unflatten(0, (b, t))


def flex_window(window: int, t: int, device: torch.device) -> Attention:
    """PyTorch's FlexAttention with a band mask, compiled."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def band(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (query - key < window)

    mask = create_block_mask(band, None, None, t, t, device=str(device))
    compiled = torch.compile(partial(flex_attention, block_mask=mask))
    return lambda q, k, v: compiled(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def flash_full(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's FlashAttention, fully causal."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def peers_of(leaves: list[Tensor], window: int) -> dict[str, Callable[[], Tensor]]:
    """The peers by name, each as written and compiled."""
    t, device = leaves[0].shape[1], leaves[0].device
    attentions: dict[str, Attention] = {
        "varlen": partial(varlen_window, window=window),
        "FlexAttention": flex_window(window, t, device),
    }
    if importlib.util.find_spec("flash_attn"):
        flash_attn = importlib.import_module("flash_attn").flash_attn_func
        attentions["flash-attn"] = partial(flash_attn, causal=True, window_size=(window - 1, 0))
    return {
        f"fla, {name}{suffix}": partial(layer, *leaves, attention=attention)
        for name, attention in attentions.items()
        for suffix, layer in (("", one_by_one), (", compiled", torch.compile(one_by_one)))
    }


def memories_race(
    shape: tuple[int, int, int, int],
    window: int,
    rounds: int,
    ceiling: float,
    target: Target = GPU,
    decays: bool = False,
) -> list[Row]:
    """The delta rule against all peers; with decay, against the eager ones, because compiling each takes minutes."""
    b, t, h, d = shape
    leaves = inputs(*shape, decays, dtype=target.dtype, device=target.device)
    rotary = Rotary(10_000.0).table(t, d, leaves[0].device, torch.float32)

    def layer(backend: str) -> Tensor:
        decay = leaves[6] if decays else None
        return ops.synchronous(*leaves[:6], decay=decay, window=window, rotary=rotary, backend=backend)[0]

    ours = {"composed: chunked, blocked": partial(layer, "composed"), "triton": partial(layer, "triton")}
    expected = _output_and_gradients(ours["composed: chunked, blocked"], leaves)
    peers = {name: run for name, run in peers_of(leaves, window).items() if not (decays and name.endswith("compiled"))}
    contestants = runnable(peers | ours, lambda run: _output_and_gradients(run, leaves), expected)
    full = {"fla, FlashAttention over all": partial(one_by_one, *leaves, attention=flash_full)}
    full = runnable(full, lambda run: _output_and_gradients(run, leaves))
    unit = b * t * h * d
    count = unit * (6 * d + 4 * window), unit * (14 * d + 10 * window)
    measured = forward_and_backward(
        contestants, leaves, count, ceiling, rounds, target.meter, TOLERANCE, baselines=full
    )  # fmt: skip
    return rows(f"{'gated ' if decays else ''}memories, mixer, norm; window {window}", shape, measured)


def _output_and_gradients(run: Callable[[], Tensor], leaves: list[Tensor]) -> list[Tensor]:
    """The output, and the gradients of the sum of its squares."""
    out = run()
    return [out.detach(), *torch.autograd.grad(out.float().square().sum(), leaves)]


def runnable(
    contestants: dict[str, T], answer: Callable[[T], list[Tensor]], expected: list[Tensor] | None = None
) -> dict[str, T]:
    """The contestants that run here and return the expected result. For each of the others, the reason is printed."""
    able = {}
    for name, run in contestants.items():
        try:
            if expected is None:
                answer(run)
            else:
                check_equal({"the expected result": expected, name: answer(run)}, TOLERANCE)
            able[name] = run
        except (Exception, SystemExit) as error:  # whatever a kernel, a compiler or a driver raises
            print(f"skipped: {name}: {type(error).__name__}: {first_line(error)}", flush=True)
    return able


def training_race(b: int, t: int, quick: bool, rounds: int, ceiling: float, target: Target = GPU) -> list[Row]:
    from hqlt.model import HQLTForCausalLM, preset

    small = {"hidden_size": 32, "num_heads": 2, "num_hidden_layers": 1, "vocab_size": 50} if quick else {}
    config = preset("hqlt-340m", **small)
    with torch.device(target.device):
        model = HQLTForCausalLM(config)
        torch.nn.Module.to(model, target.dtype)
    compiled = copy.deepcopy(model)
    for block in compiled.model.layers:
        block.compile(backend="aot_eager" if quick else "inductor")
    tokens = torch.randint(0, config.vocab_size, (b, t), device=target.device)
    optimisers = {one: torch.optim.AdamW(one.parameters(), lr=1e-4, fused=True) for one in (model, compiled)}
    contestants = {
        "chunked, blocked": (model, "chunked"),
        "fla, blocked": (model, "fla"),
        "triton": (model, "triton"),
        "triton, compiled blocks": (compiled, "triton"),  # not the others: compiling each of their chunks takes minutes
    }

    def loss(one: HQLTForCausalLM, backend: str | None = None) -> Tensor:
        with ops.use_backend(backend) if backend else nullcontext():
            value: Tensor = one(tokens, labels=tokens, skip_logits=True, use_cache=False).loss  # as in training
            return value

    def step(one: HQLTForCausalLM, backend: str) -> list[Tensor]:
        with ops.use_backend(backend):
            optimisers[one].zero_grad()
            loss(one).backward()
            optimisers[one].step()
        return []

    with torch.no_grad():
        expected = [loss(model, "chunked")]
        able = {name: chosen for name, chosen in contestants.items() if uses_backend(chosen[1], partial(loss, model))}
        able = runnable(able, lambda chosen: [loss(*chosen)], expected)
    able = runnable(able, lambda chosen: step(*chosen))
    works: dict[str, Work] = {name: partial(step, *chosen) for name, chosen in able.items()}
    multiplied = sum(p.numel() for p in model.parameters()) - config.vocab_size * config.hidden_size
    window, d = config.window or t, config.hidden_size // config.num_heads
    own = config.num_hidden_layers * config.hidden_size * (20 * d + 14 * window)
    measured = race(works, b * t * (6.0 * multiplied + own), ceiling, rounds, target.meter)
    return rows("training step, hqlt-340m", (b, t, config.hidden_size, config.num_heads), {"step": measured})


def uses_backend(backend: str, work: Work) -> bool:
    """Whether the work runs this backend when it is forced. If not, its row would show another one's time."""
    calls = mock.Mock()

    def counted(run: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arguments, **options: (calls(), run(*arguments, **options))[1]

    with ExitStack() as patches:
        for known in (IMPLEMENTATIONS["delta_rule"], IMPLEMENTATIONS["synchronous"]):
            if backend in known:
                patches.enter_context(mock.patch.dict(known, {backend: counted(known[backend])}))
        patches.enter_context(ops.use_backend(backend))
        with suppress(Exception):  # `runnable` reports it
            work()
    return calls.called
