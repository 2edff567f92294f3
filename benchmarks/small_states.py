"""The cost of rounding states: bytes, and the change in perplexity and recall 1, 100 and 10,000 tokens later.

    python benchmarks/small_states.py [--results=results/small-states] [--models=runs/small-states] [--quick]

Trains four small models (text and recall, two write rules), then compares each format with exact states over the same
tokens, starting from the same state. Models and measurements that are already in the models folder are reused.

- The state is rounded once, as for storage or transfer, and continued exactly.
- Fast weights are rounded after every step, with and without error feedback.
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
"""Number of tokens, ending at a distance, over which perplexity is computed (1 at distance 1)."""
BEFORE = 2_000
"""Bytes of text that are read before the state is rounded."""
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
"""(matrix after a step, carried value) → (matrix for the next step, new carried value)."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("results/small-states"))
    parser.add_argument("--models", type=Path, default=Path("runs/small-states"))
    parser.add_argument("--quick", action="store_true", help="only check that it runs; the results are meaningless")
    options = parser.parse_args()
    rows, distances = (2, (1, 10, 60)) if options.quick else (16, DISTANCES)
    results = {rule: {name: measured(name, rule, options, rows, distances) for name in TASKS} for rule in RULES}
    record = {
        "config": CONFIG, "tasks": TASKS, "rows": rows, "distances": distances, "span": SPAN, "before": BEFORE,
        "torch": torch.__version__, "python": platform.python_version(), "results": results,
    }  # fmt: skip
    options.results.mkdir(parents=True, exist_ok=True)
    write_atomic(options.results / "results.json", (json.dumps(record, indent=1) + "\n").encode())
    write_atomic(options.results / "README.md", page(results, rows, distances).encode())


def measured(name: str, rule: str, options: argparse.Namespace, rows: int, distances: Sequence[int]) -> dict[str, Any]:
    """The measurements of the model of this task and rule, reused if they are already in its folder."""
    model, place = trained(name, rule, options), options.models / f"{name}-{rule}" / "measured.json"
    if not place.exists():
        measure = {"text": measured_on_text, "needles": measured_on_needles}[name]
        write_atomic(place, json.dumps(measure(model, rows, distances)).encode())
    results: dict[str, Any] = json.loads(place.read_text())
    return results


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


# Formats


def exactly(x: Tensor, carried: None) -> tuple[Tensor, None]:
    return x, None


def as_bfloat16(x: Tensor, carried: None) -> tuple[Tensor, None]:
    return x.bfloat16().to(x.dtype), None


def as_int8(x: Tensor, carried: None) -> tuple[Tensor, None]:
    numbers, scale = to_int8(x, (-2,), torch.float32)
    return from_int8(numbers.to(x.dtype), scale), None


def with_feedback(x: Tensor, carried: QuantizedMatrix | None) -> tuple[Tensor, QuantizedMatrix]:
    quantized = quantize_matrix(x, carried)
    return quantized.value(x.dtype), quantized


ROUNDINGS: dict[str, tuple[Rounding, float]] = {
    "exact": (exactly, 4),
    "bfloat16": (as_bfloat16, 2),
    "int8": (as_int8, 1),
    "int8, error feedback": (with_feedback, 1.5),
}
"""Each rounding by name, with its bytes per number (without scales)."""


class Scores(NamedTuple):
    """Predictions of a model for tokens whose next tokens are known."""

    nats: Tensor
    """[rows, t]: −log p of the next token."""
    choice: Tensor
    """[rows, t]: the most likely next token."""


def scores(logits: Tensor, following: Tensor) -> Scores:
    return Scores(F.cross_entropy(logits.mT, following, reduction="none"), logits.argmax(dim=-1))


def rounded_once(
    model: HQLTForCausalLM, states: Sequence[MemoryState], tokens: Tensor, following: Tensor
) -> dict[str, Scores]:
    """Scores by format, when tokens [rows, t] are read from states that were rounded once, before the first token."""
    by_form = {}
    for form in (None, *DTYPES):
        cache, parts = HQLTCache.from_states(unpack(pack(states, form), model)), []
        for chunk, after in zip(tokens.split(CHUNK, dim=1), following.split(CHUNK, dim=1), strict=True):
            parts.append(scores(model(chunk, past_key_values=cache).logits, after))
        by_form[form or "exact"] = Scores(*(torch.cat(part, dim=1) for part in zip(*parts, strict=True)))
    return by_form


def rounded_always(
    model: HQLTForCausalLM, states: Sequence[MemoryState], tokens: Tensor, following: Tensor
) -> dict[str, Scores]:
    """Scores by rounding, when tokens [rows, t] are read one by one and fast weights are rounded before each token. All
    roundings run in one batch."""
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
    """The state with the fast weights of each part of the batch rounded. `carried` is updated in place."""
    parts = list(state.fw.matrix.chunk(len(ROUNDINGS)))
    for i, (rounding, _) in enumerate(ROUNDINGS.values()):
        parts[i], carried[i] = rounding(parts[i], carried[i])
    return state._replace(fw=state.fw._replace(matrix=torch.cat(parts)))


# Measurements


@torch.no_grad()
def measured_on_text(model: HQLTForCausalLM, rows: int, distances: Sequence[int]) -> dict[str, Any]:
    """Perplexity per byte over the last bytes of each distance, and the share of changed most likely bytes."""
    text, longest = files_of("test")[0].long(), max(distances)
    start = torch.linspace(0, len(text) - BEFORE - longest - 2, rows).long()
    window = text[start[:, None] + torch.arange(BEFORE + longest + 1)]
    cache = HQLTCache()
    for chunk in window[:, :BEFORE].split(CHUNK, dim=1):
        model(chunk, past_key_values=cache)
    tokens, following = window[:, BEFORE:-1], window[:, BEFORE + 1 :]
    results: dict[str, Any] = {"bytes": bytes_of(cache.states)}
    for way in (rounded_once, rounded_always):
        began, by_form = time.perf_counter(), way(model, cache.states, tokens, following)
        print(f"{way.__name__}: {time.perf_counter() - began:.0f} s", flush=True)
        results[way.__name__] = {
            name: [
                {
                    "perplexity": math.exp(one.nats[:, span].mean()),
                    "other choices": (one.choice != by_form["exact"].choice)[:, span].double().mean().item(),
                }
                for span in (slice(max(n - SPAN, 0), n) for n in distances)
            ]
            for name, one in by_form.items()
        }
    return results


@torch.no_grad()
def measured_on_needles(model: HQLTForCausalLM, rows: int, distances: Sequence[int]) -> dict[str, Any]:
    """Share of the 8 needles that are recalled, by the number of noise tokens between them and the questions."""
    task = Needles(**TASKS["needles"]["options"])
    (length,) = task.test_lengths
    batch = task.sample(generator_for("test", 1), 2 * rows, "test")
    needles, questions = batch.inputs.split([length, 2 * task.needles], dim=1)
    answers = batch.targets[:, length::2]
    states = model(needles, use_cache=True).past_key_values.states
    results: dict[str, Any] = {"bytes": bytes_of(states), "rounded_once": {}, "rounded_always": {}}
    for n in distances:
        noise = torch.randint(task.vocab_size - task.noise, task.vocab_size, (len(needles), n))
        tokens = torch.cat([noise, questions], dim=1)
        for way in (rounded_once, rounded_always):
            for name, one in way(model, states, tokens, tokens.roll(-1, dims=1)).items():
                recall = (one.choice[:, n::2] == answers).double().mean().item()
                results[way.__name__].setdefault(name, []).append({"recall": recall})
    return results


def bytes_of(states: Sequence[MemoryState]) -> dict[str, dict[str, int]]:
    """Bytes per row: of the whole state in each format, and of the fast weights as they are held between steps."""
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


# The page of results


def page(results: dict[str, Any], rows: int, distances: Sequence[int]) -> str:
    lines = [
        "# The cost of rounding states",
        "",
        "Two small models per write rule (2 hybrid layers, head width 64), trained by this benchmark. Text is Python "
        f"source as bytes, from held-out files, after {BEFORE:,} bytes that were read exactly; recall is of 8 needles "
        "beyond the window. Exact states are float32. Each format reads the same tokens from the same state. Results "
        f"are for 1, 100 and 10,000 tokens later. Perplexity is per byte, over the last {SPAN} bytes up to that "
        "distance, with its change in percent. Changed bytes: the share of most likely next bytes that differ from "
        f"those with exact states, over the same bytes. There are {rows} texts, so distance 1 is over {rows} bytes, "
        f"and {16 * rows} needles.",
    ]
    for way, title in (
        ("rounded_once", "The state is rounded once, then continued exactly (storage, transfer)"),
        ("rounded_always", "Fast weights are rounded after every step"),
    ):
        lines += ["", f"## {title}"]
        for rule, by_task in results.items():
            lines += ["", *table(rule, by_task, way, distances)]
    lines += ["", "This page and results.json are written by `python benchmarks/small_states.py`.", ""]
    return "\n".join(lines)


def table(rule: str, by_task: dict[str, Any], way: str, distances: Sequence[int]) -> list[str]:
    text, recall = by_task["text"][way], by_task["needles"][way]
    after = [f"{n:,}" for n in distances]
    heads = [*(f"perplexity, {n}" for n in after), *(f"changed bytes %, {n}" for n in after)]
    heads += [f"recall %, {n}" for n in after]
    lines = [f"| {rule} | bytes | " + " | ".join(heads) + " |", "| --- " + "| ---: " * (1 + len(heads)) + "|"]
    for name, size in by_task["text"]["bytes"][way].items():
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
