"""What rounded states cost: bytes, and the change in perplexity and recall 1, 100 and 10,000 tokens later.

    python benchmarks/small_states.py [--results=results/small-states] [--models=runs/small-states] [--quick]

Trains four small models (text and recall, two write rules), then compares each form with exact states over the same
tokens, from the same state. What is in the folder of models already is not done again.

- rounded once, as a store or a wire does it, and continued exactly;
- fast weights rounded after every step, with and without error feedback.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hqlt.disk import write_atomic
from hqlt.memory import MemoryState
from hqlt.model import HQLTCache, HQLTConfig, HQLTForCausalLM
from hqlt.registry import build
from hqlt.state import pack, unpack
from hqlt.state.quantization import DTYPES, QuantizedMatrix, from_int8, quantize_matrix, to_int8
from hqlt.task import Needles, Task, generator_for
from hqlt.task.text import files_of
from hqlt.train.fit import Budget, Fit, fit

DISTANCES = (1, 100, 10_000)
RULES = ("delta", "gated-delta")
CHUNK = 500
SPAN = 50
"""Perplexity at a distance is over so many tokens that end there (1 at distance 1)."""
BEFORE = 2_000
"""Bytes of text that a state has read before it is rounded."""
CONFIG: dict[str, Any] = {"hidden_size": 128, "num_heads": 2, "num_hidden_layers": 2, "conv_size": 4}
TASKS: dict[str, dict[str, Any]] = {
    "text": {"options": {"length": 256}, "config": {"window": 32}, "steps": 300, "learning_rate": 0.006},
    "needles": {
        "options": {"needles": 8, "train_lengths": [24, 32, 64, 128], "test_lengths": [64]},
        "config": {"window": 16, "rope_theta": None},
        "steps": 600,
        "learning_rate": 0.008,
    },
}  # fmt: skip

Rounding = Callable[[Tensor, Any], tuple[Tensor, Any]]
"""(a matrix after a step, what was carried) → (the matrix that the next step begins from, what is carried)."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("results/small-states"))
    parser.add_argument("--models", type=Path, default=Path("runs/small-states"))
    parser.add_argument("--quick", action="store_true", help="a look at whether it runs: the figures mean nothing")
    options = parser.parse_args()
    rows, distances = (2, (1, 10, 60)) if options.quick else (16, DISTANCES)
    results = {rule: {name: measured(name, rule, options, rows, distances) for name in TASKS} for rule in RULES}
    told = {
        "config": CONFIG, "tasks": TASKS, "rows": rows, "distances": distances, "span": SPAN, "before": BEFORE,
        "torch": torch.__version__, "python": platform.python_version(), "results": results,
    }  # fmt: skip
    options.results.mkdir(parents=True, exist_ok=True)
    write_atomic(options.results / "results.json", (json.dumps(told, indent=1) + "\n").encode())
    write_atomic(options.results / "README.md", page(results, rows, distances).encode())


def measured(name: str, rule: str, options: argparse.Namespace, rows: int, distances: Sequence[int]) -> dict[str, Any]:
    """Of a model of this task and rule; what is in its folder already is not measured again."""
    model, place = trained(name, rule, options), options.models / f"{name}-{rule}" / "measured.json"
    if not place.exists():
        measure = {"text": measured_on_text, "needles": measured_on_needles}[name]
        write_atomic(place, json.dumps(measure(model, rows, distances)).encode())
    told: dict[str, Any] = json.loads(place.read_text())
    return told


def trained(name: str, rule: str, options: argparse.Namespace) -> HQLTForCausalLM:
    folder, about = options.models / f"{name}-{rule}", TASKS[name]
    if not (folder / "config.json").exists():
        task: Task = build("task", name, **about["options"])
        torch.manual_seed(0)
        config = HQLTConfig(**CONFIG, **about["config"], fast_weights=rule, vocab_size=task.vocab_size)
        model = HQLTForCausalLM(config)
        steps = 2 if options.quick else about["steps"]
        budget = Budget(steps=steps, batch_size=16, learning_rate=about["learning_rate"], test_rows=64, validations=2)
        for event in fit(model, task, budget, seed=0):
            if isinstance(event, Fit):
                print(f"{name} {rule}: {event.test.value:.3f}", flush=True)
        model.save_pretrained(folder)
    return HQLTForCausalLM.from_pretrained(folder).eval()


# What is compared


def exactly(x: Tensor, carried: None) -> tuple[Tensor, None]:
    return x, None


def as_bfloat16(x: Tensor, carried: None) -> tuple[Tensor, None]:
    return x.bfloat16().to(x.dtype), None


def as_int8(x: Tensor, carried: None) -> tuple[Tensor, None]:
    numbers, scale = to_int8(x, (-2,), torch.float32)
    return from_int8(numbers.to(x.dtype), scale), None


def as_kept(x: Tensor, carried: QuantizedMatrix | None) -> tuple[Tensor, QuantizedMatrix]:
    kept = quantize_matrix(x, carried)
    return kept.value(x.dtype), kept


ROUNDINGS: dict[str, tuple[Rounding, float]] = {
    "exact": (exactly, 4),
    "bfloat16": (as_bfloat16, 2),
    "int8": (as_int8, 1),
    "int8, error feedback": (as_kept, 1.5),
}
"""By name: the rounding, and its bytes a number without scales."""


class Scores(NamedTuple):
    """What a model makes of tokens whose next ones are known."""

    nats: Tensor
    """[rows, t] −log p of the next token."""
    choice: Tensor
    """[rows, t] the likeliest next token."""


def scores(logits: Tensor, following: Tensor) -> Scores:
    return Scores(F.cross_entropy(logits.mT, following, reduction="none"), logits.argmax(dim=-1))


def rounded_once(
    model: HQLTForCausalLM, states: Sequence[MemoryState], tokens: Tensor, following: Tensor
) -> dict[str, Scores]:
    """By form: tokens [rows, t] are read from states that were rounded before the first of them."""
    made = {}
    for form in (None, *DTYPES):
        cache, parts = HQLTCache.from_states(unpack(pack(states, form), model)), []
        for piece, after in zip(tokens.split(CHUNK, dim=1), following.split(CHUNK, dim=1), strict=True):
            parts.append(scores(model(piece, past_key_values=cache).logits, after))
        made[form or "exact"] = Scores(*(torch.cat(part, dim=1) for part in zip(*parts, strict=True)))
    return made


def rounded_always(
    model: HQLTForCausalLM, states: Sequence[MemoryState], tokens: Tensor, following: Tensor
) -> dict[str, Scores]:
    """By rounding: tokens [rows, t] are read one by one, and fast weights are rounded before each. All in one batch."""
    n, rows = len(ROUNDINGS), len(tokens)
    states = [MemoryState.concatenate([state] * n) for state in states]
    carried: list[list[Any]] = [[None] * n for _ in states]
    parts = []
    for t in range(tokens.shape[1]):
        states = [rounded(state, mine) for state, mine in zip(states, carried, strict=True)]
        cache = HQLTCache.from_states(states, seen_tokens=1)
        logits = model(tokens[:, t : t + 1].repeat(n, 1), past_key_values=cache).logits
        parts.append(scores(logits, following[:, t : t + 1].repeat(n, 1)))
        states = list(cache.states)
    whole = Scores(*(torch.cat(part, dim=1) for part in zip(*parts, strict=True)))
    return {name: Scores(*(x.split(rows)[i] for x in whole)) for i, name in enumerate(ROUNDINGS)}


def rounded(state: MemoryState, carried: list[Any]) -> MemoryState:
    """The fast weights of each part of the batch as its rounding leaves them; what is carried changes in place."""
    parts = list(state.fw.matrix.chunk(len(ROUNDINGS)))
    for i, (rounding, _) in enumerate(ROUNDINGS.values()):
        parts[i], carried[i] = rounding(parts[i], carried[i])
    return state._replace(fw=state.fw._replace(matrix=torch.cat(parts)))


# What is measured


@torch.no_grad()
def measured_on_text(model: HQLTForCausalLM, rows: int, distances: Sequence[int]) -> dict[str, Any]:
    """Perplexity a byte over the last bytes of each distance, and how many likeliest bytes are others."""
    text, longest = files_of("test")[0].long(), max(distances)
    start = torch.linspace(0, len(text) - BEFORE - longest - 2, rows).long()
    window = text[start[:, None] + torch.arange(BEFORE + longest + 1)]
    cache = HQLTCache()
    for piece in window[:, :BEFORE].split(CHUNK, dim=1):
        model(piece, past_key_values=cache)
    tokens, following = window[:, BEFORE:-1], window[:, BEFORE + 1 :]
    told: dict[str, Any] = {"bytes": bytes_of(cache.states)}
    for way in (rounded_once, rounded_always):
        began, made = time.perf_counter(), way(model, cache.states, tokens, following)
        print(f"{way.__name__}: {time.perf_counter() - began:.0f} s", flush=True)
        told[way.__name__] = {
            name: [
                {
                    "perplexity": math.exp(one.nats[:, span].mean()),
                    "other choices": (one.choice != made["exact"].choice)[:, span].double().mean().item(),
                }
                for span in (slice(max(n - SPAN, 0), n) for n in distances)
            ]
            for name, one in made.items()
        }
    return told


@torch.no_grad()
def measured_on_needles(model: HQLTForCausalLM, rows: int, distances: Sequence[int]) -> dict[str, Any]:
    """Share of 8 needles that are recalled, by how many tokens of noise come between them and the questions."""
    task = Needles(**TASKS["needles"]["options"])
    (length,) = task.test_lengths
    batch = task.sample(generator_for("test", 1), 2 * rows, "test")
    needles, questions = batch.inputs.split([length, 2 * task.needles], dim=1)
    answers = batch.targets[:, length::2]
    states = model(needles, use_cache=True).past_key_values.states
    told: dict[str, Any] = {"bytes": bytes_of(states), "rounded_once": {}, "rounded_always": {}}
    for n in distances:
        noise = torch.randint(task.vocab_size - task.noise, task.vocab_size, (len(needles), n))
        tokens = torch.cat([noise, questions], dim=1)
        for way in (rounded_once, rounded_always):
            for name, one in way(model, states, tokens, tokens.roll(-1, dims=1)).items():
                recall = (one.choice[:, n::2] == answers).double().mean().item()
                told[way.__name__].setdefault(name, []).append({"recall": recall})
    return told


def bytes_of(states: Sequence[MemoryState]) -> dict[str, dict[str, int]]:
    """Of a row: the whole state in each form, and the fast weights alone as they are kept between steps."""
    one = [state.select([0]) for state in states]
    matrices = [state.fw.matrix for state in one]
    scales = {"exact": 0, "bfloat16": 0}
    return {
        "rounded_once": {form or "exact": sum(x.nbytes for x in pack(one, form).values()) for form in (None, *DTYPES)},
        "rounded_always": {
            name: sum(int(x.numel() * size) + scales.get(name, 4) * x[..., 0].numel() for x in matrices)
            for name, (_, size) in ROUNDINGS.items()
        },
    }


# What is written


def page(results: dict[str, Any], rows: int, distances: Sequence[int]) -> str:
    lines = [
        "# What rounded states cost",
        "",
        "Two small models for each write rule (2 hybrid layers, heads of 64), trained here. "
        f"Text is Python source, byte by byte: held-out files, after {BEFORE:,} bytes that were read exactly; recall "
        "is of 8 needles beyond the window. Exact states are float32. Each form reads the same tokens from the same "
        f"state. Figures are those 1, 100 and 10,000 tokens later. Perplexity is per byte, over the last {SPAN} bytes "
        f"up to there, its change in percent. Other bytes: how many of the likeliest next bytes are others than with "
        f"exact states, over the same bytes. There are {rows} texts, so that distance 1 is of {rows} bytes, and "
        f"{16 * rows} needles.",
    ]
    for way, title in (
        ("rounded_once", "The state rounded once, then continued exactly: a store, the wire"),
        ("rounded_always", "Fast weights rounded after every step"),
    ):
        lines += ["", f"## {title}"]
        for rule, told in results.items():
            lines += ["", *table(rule, told, way, distances)]
    lines += ["", "`python benchmarks/small_states.py` writes this page and results.json.", ""]
    return "\n".join(lines)


def table(rule: str, told: dict[str, Any], way: str, distances: Sequence[int]) -> list[str]:
    text, recall = told["text"][way], told["needles"][way]
    after = [f"{n:,}" for n in distances]
    heads = [*(f"perplexity, {n}" for n in after), *(f"other bytes %, {n}" for n in after)]
    heads += [f"recall %, {n}" for n in after]
    lines = [f"| {rule} | bytes | " + " | ".join(heads) + " |", "| --- " + "| ---: " * (1 + len(heads)) + "|"]
    for name, size in told["text"]["bytes"][way].items():
        cells = [f"{size:,}"]
        for i in range(len(distances)):
            exact, mine = text["exact"][i]["perplexity"], text[name][i]["perplexity"]
            cells.append(f"{mine:.3f}" if name == "exact" else f"{100 * (mine / exact - 1):+.2f}%")
        cells += ["–" if name == "exact" else f"{100 * one['other choices']:.1f}" for one in text[name]]
        cells += [f"{100 * one['recall']:.1f}" for one in recall[name]]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


if __name__ == "__main__":
    main()
