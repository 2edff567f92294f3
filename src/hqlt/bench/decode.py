"""Decoding after a long context: a transformer, the same with windowed layers, and the same retrofitted with a memory.

The shape is that of SmolLM2-135M, with random weights, whose values do not affect the times. Long contexts are not
actually read: the state after a short text is used, with attention's KV entries repeated up to the length of the
context. In bfloat16, weights, activations and KV entries are bfloat16; fast weights stay float32.

Decoding moves much data and computes little, so its ceiling is the copy rate: each step reads weights and state.
Reading (the next 256 tokens at once) is counted in operations; its ceiling is a large matrix product in the same dtype.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache

from hqlt.bench.race import Row, Work, check_equal, copy_rate, matrix_product_rate, race, rows
from hqlt.layer import HybridMemory
from hqlt.memory import Held
from hqlt.model import HQLTCache, HQLTConfig, HQLTForCausalLM
from hqlt.model.pretrained import to_transformers
from hqlt.model.pretrained.retrofit import NO_RULE, config_for, retrofitted

ONLY = ("float32", "bfloat16")
CAPTION = "per token, batch 1; ×: speedup over the first row; %: share of the measured ceiling; state of one sequence"
SIZE = {
    "hidden_size": 576, "num_heads": 9, "num_kv_heads": 3, "intermediate_size": 1536, "num_hidden_layers": 30,
    "vocab_size": 49152, "rope_theta": 1e5, "tie_word_embeddings": True,
}  # fmt: skip
SMALL = {
    "hidden_size": 16,
    "num_heads": 2,
    "num_kv_heads": 1,
    "intermediate_size": 24,
    "num_hidden_layers": 5,
    "vocab_size": 256,
}
STEPS, READ = 8, 256
TEXT = 128
"""Tokens of the short text, more than window and sinks."""


class Contestant(NamedTuple):
    """A model, and its cache after a context."""

    model: Any
    cache_after_context: Callable[[], Any]
    """Returns a cache that holds the context."""
    state: int
    """Size of the cache in bytes."""
    operations: float
    """Operations per token."""


@torch.no_grad()
def run(rounds: int, quick: bool, only: str | None) -> list[Row]:
    torch.manual_seed(0)
    models = models_of(SIZE | (SMALL if quick else {}))
    results: list[Row] = []
    for name in ONLY:
        if only in (None, name):
            dtype = getattr(torch, name)
            if name != "float32":
                converted = {label: copy.deepcopy(model).to(dtype) for label, model in models.items()}
            else:
                converted = models
            for context in [200] if quick else [1_000, 8_000, 32_000]:
                results += one_race(converted, context, name, rounds, quick)
    return results


def models_of(size: dict[str, Any]) -> dict[str, Any]:
    """The models by name. They share all weights that they have in common."""
    layers = int(size["num_hidden_layers"])
    original = HQLTForCausalLM(HQLTConfig(**size, layer_kinds=["kv"] * layers)).eval()
    learned = {"feature_map": "learned", "kv_gate": True}
    choices: dict[str, dict[str, Any]] = {
        "window 64 + 4 sinks": {"rule": NO_RULE},
        "delta and the window": {},
        "the same, learned maps, kv_gate": learned,
        "the same, every fifth layer full": {**learned, "full": range(0, layers, 5)},
    }
    models: dict[str, Any] = {
        "original": original,
        "original in transformers": to_transformers(original, "llama").eval(),
    }
    for name, choice in choices.items():
        models[name] = retrofitted(original, config_for(original.config, **choice)).eval()
    return models


def one_race(models: dict[str, Any], context: int, dtype: str, rounds: int, quick: bool) -> list[Row]:
    kind = getattr(torch, dtype)
    tokens = torch.randint(0, 256, (1, READ))
    contestants = {name: contestant(model, tokens[:, :TEXT], context) for name, model in models.items()}
    if dtype == "float32":
        check_equal({name: model(tokens).logits for name, model in list(models.items())[:2]})
    works: dict[str, dict[str, Work]] = {"decoding": {}, "reading": {}}
    for name, each in contestants.items():
        works["decoding"][name] = partial(decoded, each, tokens, STEPS)
        works["reading"][name] = partial(read, each, tokens)
    weights = {name: sum(p.nbytes for p in each.model.parameters()) for name, each in contestants.items()}
    moved = {name: float(STEPS * (weights[name] + each.state)) for name, each in contestants.items()}
    done = {name: READ * each.operations for name, each in contestants.items()}
    measured = {
        "decoding": race(works["decoding"], moved, copy_rate(2**16 if quick else 2**24, dtype=kind), rounds),
        "reading": race(
            works["reading"], done, matrix_product_rate(256 if quick else 1536, dtype=kind), max(rounds // 3, 1)
        ),
    }
    for what, count in (("decoding", STEPS), ("reading", READ)):
        for figures in measured[what].values():
            figures["ms"] /= count
    size = contestants["original"].model.config
    table = rows(f"{dtype}, context {context:,}", (1, 1, size.hidden_size, size.num_heads), measured)
    for row in table:
        row["state"] = {"MB": contestants[row["implementation"]].state / 1e6}
    return table


def contestant(model: Any, text: Tensor, context: int) -> Contestant:
    """A contestant with a cache as it is after `context` tokens."""
    cache = model(text, use_cache=True).past_key_values
    table = model.get_input_embeddings().weight  # not counted: a lookup, and a product for the last token only
    parameters = sum(p.numel() for p in model.parameters() if p is not table)
    if not isinstance(cache, HQLTCache):
        long, state = DynamicCache(config=model.config), 0
        for i, layer in enumerate(cache.layers):
            keys, values = (repeated(x, context, 2) for x in (layer.keys, layer.values))
            long.update(keys, values, i)
            state += keys.nbytes + values.nbytes
        return Contestant(model, partial(cropped, long, context), state, operations(model, parameters, context))
    states = []
    layers = [part for part in model.modules() if isinstance(part, HybridMemory)]
    for layer, after in zip(layers, cache.states, strict=True):
        kv = after.kv
        if layer.blend.slots is None and isinstance(kv, Held):
            kv = kv._replace(keys=repeated(kv.keys, context, 1), values=repeated(kv.values, context, 1))
        states.append(after._replace(kv=kv, position=torch.full_like(after.position, context)))
    after_context = HQLTCache.from_states(states)
    size = sum(state.bytes_per_row() for state in states)
    return Contestant(model, after_context.fork, size, operations(model, parameters, context))


def cropped(cache: DynamicCache, context: int) -> DynamicCache:
    """The cache cropped back to the context."""
    if (more := cache.get_seq_length() - context) > 0:
        cache.crop(-more)
    return cache


def repeated(x: Tensor, length: int, axis: int) -> Tensor:
    """x repeated along an axis up to this length."""
    times = -(-length // x.shape[axis])
    return torch.cat([x] * times, dim=axis).narrow(axis, 0, length).contiguous()


def operations(model: Any, parameters: int, context: int) -> float:
    """Operations per token: two per weight, plus those of each layer's memories."""
    total = 2.0 * parameters
    layers = [part for part in model.modules() if isinstance(part, HybridMemory)]
    for layer in layers:
        reach = context if layer.blend.window is None else layer.blend.window
        total += 4 * layer.heads.queries * layer.heads.k * reach
        total += 0 if layer.fw is None else 2 * layer.fw.multiply_adds()
    if not layers:
        config = model.config
        total += 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * context
    return total


def decoded(contestant: Contestant, tokens: Tensor, steps: int) -> Tensor:
    """Decode `steps` tokens one by one, and return the logits of the last."""
    cache = contestant.cache_after_context()
    for t in range(steps):
        logits: Tensor = contestant.model(tokens[:, t : t + 1], past_key_values=cache, use_cache=True).logits
    return logits


def read(contestant: Contestant, tokens: Tensor) -> Tensor:
    """Read all tokens in one call, and return the logits of the last."""
    cache = contestant.cache_after_context()
    logits: Tensor = contestant.model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    return logits
