"""Probes: how well a model uses text beyond its window, measured on tokens only. They evaluate a retrofit.

The same model and tokens always give the same numbers.
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

CHUNK = 1024
"""Tokens per forward pass."""
BEYOND, DISTANCE, PARAGRAPH = 256, 400, 64
LENGTHS = (256, 512, 1024)
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
KEY, VALUE = 4, 4
"""Tokens of a fact's key and value."""
FEW_ROWS = 2
"""Rows on which shares are measured, and on which the way of bypassing FW-memories is chosen."""


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
    """Run all probes on a causal language model. Use `fw_bypassed(model)` to probe it without its FW-memories.

    Args:
        model: a model of hqlt or transformers.
        tokens ([n, length]): texts that the model was not trained on.
        window (tokens): the model's window, included in the result. Default: its widest window.
        beyond (tokens): perplexity is measured on tokens with at least this many before them. Default: 256, or half of
            a shorter text.
        distance (tokens): from the first copy of a paragraph to the second. Default: 400, or less in a shorter text.
        paragraph (tokens): length of the paragraph. Default: 64, or less in a shorter text.
        lengths (tokens): lengths of the texts with facts. Default: 256, 512 and 1,024, as far as `length` allows.
        depths: places of the facts, from 0 (beginning) to 1 (end).
        seed: seed of the facts.

    Returns:
        A JSON-compatible dict: "perplexity" and "nll" (nats per token) from `beyond` on; "by_position"
        (`by_position`), "recall" (`recall`), "needle" (`needles`), "shares" (`shares_by_layer`), "state"
        (`state_bytes`).

    Raises:
        ValueError: when the tokens are too few.
    """
    n, length = tokens.shape
    beyond = min(BEYOND, length // 2) if beyond is None else beyond
    distance = min(DISTANCE, length) if distance is None else distance
    paragraph = min(PARAGRAPH, distance // 4) if paragraph is None else paragraph
    lengths = [each for each in LENGTHS if each <= length] or [length] if lengths is None else list(lengths)
    check_sizes(n, length, beyond, distance, paragraph, lengths, depths)
    model.eval()
    nll, _ = token_losses(model, tokens)
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


def probe_rows(name: str, model: nn.Module, tokens: Tensor, **options: Any) -> list[dict[str, Any]]:
    """Probe a model, and once more with its FW-memories bypassed if it has any.

    Of the two ways to bypass (`fw_bypassed`), the one with the lower loss is used, so that the benefit of the
    FW-memories is not overstated.

    Args:
        name: name of the rows.
        model: a model of hqlt or transformers.
        tokens ([n, length]): texts that the model was not trained on.
        **options: options of `probe`.

    Returns:
        One or two rows of a report (`hqlt.report.retrofit`).
    """
    rows: list[dict[str, Any]] = [{"name": name, "probe": probe(model, tokens, **options)}]
    if any(layer.fw is not None for layer in layers_of(model)):
        whole = min((False, True), key=lambda whole: loss_bypassed(model, tokens[:FEW_ROWS], whole))
        with fw_bypassed(model, kv_whole=whole):
            bypassed = probe(model, tokens, **options)
        rows.append({"name": name, "bypassed": True, "kv_whole": whole, "probe": bypassed})
    return rows


def loss_bypassed(model: nn.Module, tokens: Tensor, kv_whole: bool) -> float:
    """Loss of the second half of each text with FW-memories bypassed, in nats per token."""
    with fw_bypassed(model, kv_whole=kv_whole):
        return token_losses(model, tokens)[0][:, tokens.shape[1] // 2 :].mean().item()


def check_sizes(
    n: int,
    length: int,
    beyond: int,
    distance: int,
    paragraph: int,
    lengths: Sequence[int],
    depths: Sequence[float],
) -> None:
    """Raise ValueError if the tokens [n, length] are too few for these options."""
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
def token_losses(model: nn.Module, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of each token except the first of a row, and whether it was predicted.

    Rows are read in small batches, and long ones in chunks with a cache, so that few logits exist at a time.

    Args:
        model: a causal language model.
        tokens ([n, length]): the texts.

    Returns:
        −log p in nats (float64, [n, length − 1]), and whether the token was the most likely one (bool,
        [n, length − 1]).
    """
    device = next(iter(model.parameters()), tokens).device
    nll, right = [], []
    for rows in tokens.to(device).split(max(CHUNK // tokens.shape[1], 1)):
        cache = None
        for chunk, targets in zip(rows[:, :-1].split(CHUNK, 1), rows[:, 1:].split(CHUNK, 1), strict=True):
            output = model(input_ids=chunk, past_key_values=cache, use_cache=True)
            cache, logits = output.past_key_values, output.logits.mT
            logits = logits.to(at_least_float32(logits.dtype))
            nll.append(F.cross_entropy(logits, targets, reduction="none").double().cpu())
            right.append((logits.argmax(dim=1) == targets).cpu())
    return _joined(nll, len(tokens)), _joined(right, len(tokens))


def _joined(parts: list[Tensor], n: int) -> Tensor:
    """Concatenate chunks, which are ordered row by row, to [n, length − 1]."""
    return torch.cat([part.flatten() for part in parts]).view(n, -1)


def by_position(nll: Tensor) -> list[dict[str, float]]:
    """The mean loss by position, in bins of growing width.

    Args:
        nll (nats, [n, length − 1]): the losses that `token_losses` returns.

    Returns:
        Bins {"begin", "end", "nll"} over the tokens that have begin … end − 1 tokens before them.
    """
    edges = bin_edges(nll.shape[1] + 1)
    edges[0] = 1
    return [
        {"begin": begin, "end": end, "nll": nll[:, begin - 1 : end - 1].mean().item()}
        for begin, end in itertools.pairwise(edges)
        if begin < end
    ]


def recall(model: nn.Module, tokens: Tensor, distance: int, paragraph: int) -> dict[str, float]:
    """The loss on the second copy of a paragraph, after text from another row.

        row[: paragraph]   the end of the next row   row[: paragraph] again

    Args:
        model: a causal language model.
        tokens ([n, length]): the texts.
        distance (tokens): from the first copy to the second.
        paragraph (tokens): length of the paragraph.

    Returns:
        "nll" and "accuracy" (of the most likely token) of the second copy, and "nll_first" of the first. The first
        token of each copy is not scored, because it cannot be predicted.
    """
    copy, other = tokens[:, :paragraph], tokens.roll(-1, dims=0)
    filler = other[:, other.shape[1] - (distance - paragraph) :]
    nll, right = token_losses(model, torch.cat([copy, filler, copy], dim=1))
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
    """How well facts key → value are found that are placed at several depths of a text and queried after it.

        text … key value … text … key' value' … text   key' value'   key value

    Key and value have four random tokens each, drawn from those of the texts, and differ between rows. The last fact is
    queried first.

    Args:
        model: a causal language model.
        tokens ([n, length]): the texts.
        lengths (tokens): lengths of the texts, including the queries.
        depths: places of the facts, from 0 (beginning) to 1 (end).
        seed: seed of the facts.

    Returns:
        For each "length" and "depth": mean "nll" and "accuracy" (of the most likely token) of the value's tokens.
    """
    results = []
    for length in lengths:
        texts, value_begins = texts_with_needles(tokens, length, depths, seed)
        nll, right = token_losses(model, texts)
        for depth, begin in zip(depths, value_begins, strict=True):
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
    """Build texts [n, length] with facts and queries; also returns where the queried value of each depth begins."""
    n, count, fact = len(tokens), len(depths), KEY + VALUE
    room = length - 2 * fact * count
    generator = torch.Generator().manual_seed(seed)
    occurring = tokens.unique().cpu()
    facts = occurring[torch.randint(len(occurring), (n, count, fact), generator=generator)].to(tokens.device)
    order = sorted(range(count), key=lambda i: depths[i])
    parts, begin = [], 0
    for i in order:
        end = round(depths[i] * room)
        parts += [tokens[:, begin:end], facts[:, i]]
        begin = end
    parts.append(tokens[:, begin:room])
    parts += [facts[:, i] for i in reversed(order)]
    value_begins = {i: length - fact * (place + 1) + KEY for place, i in enumerate(order)}
    return torch.cat(parts, dim=1), [value_begins[i] for i in range(count)]


def shares_by_layer(model: nn.Module, tokens: Tensor, beyond: int) -> list[dict[str, float]]:
    """The mean contribution of the FW-memory to each layer with both memories, from token `beyond` on.

    Args:
        model: a causal language model.
        tokens ([n, length]): the texts.
        beyond (tokens): number of first tokens that are ignored.

    Returns:
        For each such layer: "layer", its index; "share", the FW-memory's part of the mixer's output
        (`hqlt.report.memory_shares`), which is 0 if it is bypassed; "gate", its mean weight.
    """
    mixing = [i for i, layer in enumerate(layers_of(model)) if layer.kv is not None and layer.fw is not None]
    if not mixing:
        return []
    per_token = memory_shares(model, tokens.to(next(model.parameters()).device))
    gates, shares = (x[..., beyond:].double().mean(dim=(1, 2)).tolist() for x in per_token)
    return [
        {"layer": layer, "share": share, "gate": gate} for layer, share, gate in zip(mixing, shares, gates, strict=True)
    ]


def layers_of(model: nn.Module) -> list[HybridMemory]:
    """All layers of hqlt in a model."""
    return [layer for layer in model.modules() if isinstance(layer, HybridMemory)]


def window_of(model: nn.Module) -> int | None:
    """The widest window of a model's layers, or None if none has a window."""
    windows = [layer.blend.window for layer in layers_of(model) if layer.kv is not None]
    return max((window for window in windows if window is not None), default=None)


def state_bytes(model: nn.Module) -> dict[str, int] | None:
    """The size of one sequence's state in bytes.

    Args:
        model: any model.

    Returns:
        "fixed", and "per_token", which full attention adds for each token; None if the model has no layers of hqlt.
    """
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
    """A context in which every FW-memory of a model reads as zero, like an empty one.

    A layer without a KV-memory then adds nothing to the residual stream (except a bias of o_proj). A model without
    FW-memories does not change.

    Args:
        model: the model.
        kv_whole: whether the read of the KV-memory gets weight 1, so that the layer becomes its attention (with the
            norm after the mixer, if there is one). Otherwise it keeps the weight that the mixer gives it. With mixer
            "add" without kv_gate the weight is always 1.

    Returns:
        A context manager that returns the model.

    Example:
        >>> import torch
        >>> from hqlt.evaluate.probes import fw_bypassed
        >>> from hqlt.model import HQLTForCausalLM, preset
        >>> model, tokens = HQLTForCausalLM(preset("tiny")), torch.arange(9)[None]
        >>> with fw_bypassed(model):
        ...     without = model(tokens).logits
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
