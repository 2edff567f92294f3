"""What a model makes of what lies beyond its window, from tokens alone: the measurements of a retrofit.

Deterministic: the same model and tokens give the same numbers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hqlt.blend import Reads
from hqlt.evaluate.lengths import bin_edges
from hqlt.layer import HybridMemory
from hqlt.memory.state import leaves
from hqlt.mixer import Mixer
from hqlt.report.shares import memory_shares
from hqlt.shapes import at_least_float32

PIECE = 1024
"""Tokens that are read at once."""
BEYOND, DISTANCE, PARAGRAPH = 256, 400, 64
LENGTHS = (256, 512, 1024)
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
KEY, VALUE = 4, 4
"""Tokens of a fact."""
FEW_ROWS = 2
"""That shares are taken of, and that decide how FW-memories are bypassed."""


def probe(
    model: nn.Module,
    tokens: Tensor,
    *,
    window: int | None = None,
    beyond: int | None = None,
    distance: int | None = None,
    paragraph: int | None = None,
    lengths: Sequence[int] | None = None,
    depths: Sequence[float] = DEPTHS,
    seed: int = 0,
) -> dict[str, Any]:
    """Everything below, of a causal language model on tokens [n, length], as JSON has it.

    window: what the model's windows reach, noted beside the figures; None: the widest that it has. beyond: the
    perplexity is of the tokens with at least so many before them (None: 256, or half of a shorter text). distance,
    paragraph: from the first copy of how many tokens to the second (None: 400 and 64, or less in a shorter text).
    lengths, depths: of the texts with facts in them (None: 256, 512 and 1,024, as far as the tokens go). seed: of the
    facts.

    → "perplexity" and "nll" (nats per token) from `beyond` on; "by_position": `by_position`; "recall": `recall`;
    "needle": `needles`; "shares": `shares_by_layer`; "state": `state_bytes`. With the FW-memory bypassed: the same
    within `fw_bypassed(model)`.

    Raises ValueError for tokens that are too few for what is asked.
    """
    n, length = tokens.shape
    beyond = min(BEYOND, length // 2) if beyond is None else beyond
    distance = min(DISTANCE, length) if distance is None else distance
    paragraph = min(PARAGRAPH, distance // 4) if paragraph is None else paragraph
    lengths = [each for each in LENGTHS if each <= length] or [length] if lengths is None else list(lengths)
    check(n, length, beyond, distance, paragraph, lengths, depths)
    model.eval()
    nll, _ = outcomes(model, tokens)
    mean = nll[:, beyond - 1 :].mean().item()
    return {
        "rows": n,
        "length": length,
        "window": window_of(model) if window is None else window,
        "beyond": beyond,
        "perplexity": math.exp(mean),
        "nll": mean,
        "by_position": by_position(nll),
        "recall": recall(model, tokens, distance, paragraph),
        "needle": needles(model, tokens, lengths, depths, seed),
        "shares": shares_by_layer(model, tokens[:FEW_ROWS], beyond),
        "state": state_bytes(model),
    }


def probed(name: str, model: nn.Module, tokens: Tensor, **options: Any) -> list[dict[str, Any]]:
    """Rows of a report (`hqlt.report.retrofit`): the model, and if it has FW-memories, itself with them bypassed.

    Bypassed in the way of the two (`fw_bypassed`) that leaves the model better, so that what the FW-memories are worth
    is not overstated.
    """
    rows: list[dict[str, Any]] = [{"name": name, "probe": probe(model, tokens, **options)}]
    if any(layer.fw is not None for layer in layers_of(model)):
        whole = min((False, True), key=lambda whole: loss_bypassed(model, tokens[:FEW_ROWS], whole))
        with fw_bypassed(model, kv_whole=whole):
            told = probe(model, tokens, **options)
        rows.append({"name": name, "bypassed": True, "kv_whole": whole, "probe": told})
    return rows


def loss_bypassed(model: nn.Module, tokens: Tensor, kv_whole: bool) -> float:
    """Nats per token of the texts' second halves."""
    with fw_bypassed(model, kv_whole=kv_whole):
        return outcomes(model, tokens)[0][:, tokens.shape[1] // 2 :].mean().item()


def check(
    n: int,
    length: int,
    beyond: int,
    distance: int,
    paragraph: int,
    lengths: Sequence[int],
    depths: Sequence[float],
) -> None:
    """Raises ValueError for what these tokens [n, length] are too few for."""
    least = 2 * (KEY + VALUE) * len(depths)
    if n < 1 or length < max(least, 2):
        raise ValueError(f"tokens: expected [n, length] with at least one row of {max(least, 2)}, got {[n, length]}")
    for name, value, low, high in (
        ("beyond", beyond, 1, length - 1),
        ("distance", distance, 2, length),
        ("paragraph", paragraph, 2, distance),
        *(("lengths", each, least, length) for each in lengths),
    ):
        if not low <= value <= high:
            raise ValueError(f"{name}: expected {low} to {high} with tokens of shape {[n, length]}, got {value}")


@torch.no_grad()
def outcomes(model: nn.Module, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """For each token of [n, length] but the first: −log p in nats, float64, and whether it is the likeliest.

    → [n, length − 1] each. Some rows at a time, and in pieces with the cache carried, so that few logits exist at once.
    """
    device = next(iter(model.parameters()), tokens).device
    nll, right = [], []
    for rows in tokens.to(device).split(max(PIECE // tokens.shape[1], 1)):
        cache = None
        for piece, following in zip(rows[:, :-1].split(PIECE, 1), rows[:, 1:].split(PIECE, 1), strict=True):
            read = model(input_ids=piece, past_key_values=cache, use_cache=True)
            cache, logits = read.past_key_values, read.logits.mT
            logits = logits.to(at_least_float32(logits.dtype))
            nll.append(F.cross_entropy(logits, following, reduction="none").double().cpu())
            right.append((logits.argmax(dim=1) == following).cpu())
    return _joined(nll, len(tokens)), _joined(right, len(tokens))


def _joined(parts: list[Tensor], n: int) -> Tensor:
    """[n, length − 1] from pieces, row by row."""
    return torch.cat([part.flatten() for part in parts]).view(n, -1)


def by_position(nll: Tensor) -> list[dict[str, float]]:
    """Mean nats of the tokens that begin … end − 1 tokens stand before, in bins that grow: nll as `outcomes` has it."""
    edges = bin_edges(nll.shape[1] + 1)
    edges[0] = 1
    return [
        {"begin": begin, "end": end, "nll": nll[:, begin - 1 : end - 1].mean().item()}
        for begin, end in itertools.pairwise(edges)
        if begin < end
    ]


def recall(model: nn.Module, tokens: Tensor, distance: int, paragraph: int) -> dict[str, float]:
    """Loss on the second copy of a paragraph, `distance` tokens after the first, with another row's text between.

        row[: paragraph]   the end of the next row   row[: paragraph] again

    "nll", "accuracy" (of the arg-max): of the second copy; "nll_first": of the first, which nothing precedes. Each but
    for its first token, which nobody can know.
    """
    copy, other = tokens[:, :paragraph], tokens.roll(-1, dims=0)
    filler = other[:, other.shape[1] - (distance - paragraph) :]
    nll, right = outcomes(model, torch.cat([copy, filler, copy], dim=1))
    second = slice(distance, distance + paragraph - 1)
    return {
        "distance": distance,
        "paragraph": paragraph,
        "nll": nll[:, second].mean().item(),
        "accuracy": right[:, second].double().mean().item(),
        "nll_first": nll[:, : paragraph - 1].mean().item(),
    }


def needles(
    model: nn.Module, tokens: Tensor, lengths: Sequence[int], depths: Sequence[float], seed: int = 0
) -> list[dict[str, float]]:
    """Facts key → value at each depth of a text (0: its beginning, 1: its end), all asked for behind it.

        text … key value … text … key' value' … text   key' value'   key value

    Key and value are four tokens each, any that occur in the text; every row has its own. The latest fact is asked for
    first. By length (questions included) and depth: mean "nll" and "accuracy" (of the arg-max) of the values' tokens.
    """
    results = []
    for length in lengths:
        texts, asked = texts_with_needles(tokens, length, depths, seed)
        nll, right = outcomes(model, texts)
        for depth, begin in zip(depths, asked, strict=True):
            value = slice(begin - 1, begin - 1 + VALUE)
            results.append(
                {
                    "length": length,
                    "depth": depth,
                    "nll": nll[:, value].mean().item(),
                    "accuracy": right[:, value].double().mean().item(),
                }
            )
    return results


def texts_with_needles(tokens: Tensor, length: int, depths: Sequence[float], seed: int) -> tuple[Tensor, list[int]]:
    """Texts [n, length], and for each depth where the value begins that is asked for."""
    n, many, fact = len(tokens), len(depths), KEY + VALUE
    room = length - 2 * fact * many
    chance = torch.Generator().manual_seed(seed)
    occurring = tokens.unique().cpu()
    facts = occurring[torch.randint(len(occurring), (n, many, fact), generator=chance)].to(tokens.device)
    order = sorted(range(many), key=lambda i: depths[i])
    parts, begin = [], 0
    for i in order:
        end = round(depths[i] * room)
        parts += [tokens[:, begin:end], facts[:, i]]
        begin = end
    parts.append(tokens[:, begin:room])
    parts += [facts[:, i] for i in reversed(order)]
    asked = {i: length - fact * (place + 1) + KEY for place, i in enumerate(order)}
    return torch.cat(parts, dim=1), [asked[i] for i in range(many)]


def shares_by_layer(model: nn.Module, tokens: Tensor, beyond: int) -> list[dict[str, float]]:
    """Of each layer that mixes both memories, from token `beyond` on: what `hqlt.report.memory_shares` says, averaged.

    "layer" counts all layers from 0; "share": the FW-memory's part of what is mixed, 0 for a branch that is bypassed;
    "gate": its mean weight. Empty for a model without such layers.
    """
    mixing = [i for i, layer in enumerate(layers_of(model)) if layer.kv is not None and layer.fw is not None]
    if not mixing:
        return []
    told = memory_shares(model, tokens.to(next(model.parameters()).device))
    gates, shares = (x[..., beyond:].double().mean(dim=(1, 2)).tolist() for x in told)
    return [
        {"layer": layer, "share": share, "gate": gate} for layer, share, gate in zip(mixing, shares, gates, strict=True)
    ]


def layers_of(model: nn.Module) -> list[HybridMemory]:
    return [layer for layer in model.modules() if isinstance(layer, HybridMemory)]


def window_of(model: nn.Module) -> int | None:
    """The widest of the layers that have any; None for full attention."""
    windows = [layer.blend.window for layer in layers_of(model) if layer.kv is not None]
    return max((window for window in windows if window is not None), default=None)


def state_bytes(model: nn.Module) -> dict[str, int] | None:
    """Of a sequence: "fixed" bytes, and "per_token" what full attention adds; None for a model without our layers."""
    layers = layers_of(model)
    if not layers:
        return None
    growing = [
        (math.prod(size for size in entry.sizes if size is not None), entry.dtype_in(layer.like.dtype).itemsize)
        for layer in layers
        for entry in leaves(layer.entries)
        if None in entry.sizes
    ]
    fixed = sum(layer.init_state(1).bytes_per_row() for layer in layers)
    return {"fixed": fixed, "per_token": sum(numbers * size for numbers, size in growing)}


@contextmanager
def fw_bypassed(model: nn.Module, *, kv_whole: bool = False) -> Iterator[nn.Module]:
    """Within it every FW-memory reads as zero, as an empty one does.

    kv_whole: whether the KV-memory's read then has weight 1, so that the layer is its attention (with the norm behind
    the mix, where there is one), or the weight that its mixer gives it beside the FW-memory. Mixer "add" without
    kv_gate gives it 1 in any case. A layer without a KV-memory adds nothing to the residual stream (but for o_proj's
    bias). A model without FW-memories is itself.

    >>> with fw_bypassed(model):
    ...     without = probe(model, tokens)
    """

    def silence(_: nn.Module, args: tuple[Tensor | None, Reads]) -> tuple[Tensor | None, Reads]:
        logits, reads = args
        return logits, reads if reads.fw is None else reads._replace(fw=torch.zeros_like(reads.fw))

    def keep_kv(_: nn.Module, args: tuple[Tensor | None, Reads], mixed: Tensor) -> Tensor:
        return mixed if args[1].kv is None else args[1].kv

    mixers = [module for module in model.modules() if isinstance(module, Mixer)]
    hooks: list[RemovableHandle] = [mixer.register_forward_pre_hook(silence) for mixer in mixers]
    if kv_whole:
        hooks += [mixer.register_forward_hook(keep_kv) for mixer in mixers]
    try:
        yield model
    finally:
        for hook in hooks:
            hook.remove()
