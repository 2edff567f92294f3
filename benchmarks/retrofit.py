"""Compare retrofits of one model with different rules, and controls: how much of the original each recovers.

    hqlt convert SmolLM2-135M-Instruct.Q4_1.gguf smollm2
    python benchmarks/retrofit.py smollm2 --data=wikitext2_valid.txt --text=wikitext2_test.txt

Each run is one `hqlt retrofit` in its own folder, seed after seed. Options that are not listed here are passed to it
(--precision=bfloat16, --lora_rank=8). All models are probed on the same text, which none was trained on. Finished runs
are not repeated, interrupted ones resume, and table and curves are updated after each run.

There are two controls without FW-memories. "LoRA alone" has nothing to fit in stage 1 and gets its tokens in stage 2.
"window gate and LoRA" has everything that the others have (mixer, window gate δ, both stages), but its memories stay
empty.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import hqlt
from hqlt.disk import write_atomic
from hqlt.evaluate.probes import probe, probe_rows
from hqlt.language.folder import load_model, read_config, tokenizer_of
from hqlt.memory import FWMemory, Write
from hqlt.model import HQLTForCausalLM
from hqlt.model.pretrained.retrofit import config_for, retrofitted
from hqlt.report.retrofit import ORIGINAL, WINDOW, write_retrofit_report

BY_ERROR = {"full_choice": "error"}
RUNS: dict[str, dict[str, Any]] = {
    "delta": {"rule": "delta"},
    "LoRA alone": {"rule": "none"},
    "delta, full by error": {"rule": "delta", **BY_ERROR},
    "LoRA alone, full by error": {"rule": "none", **BY_ERROR},
    "window gate and LoRA, full by error": {"rule": "empty", **BY_ERROR},
    "gated-delta, full by error": {"rule": "gated-delta", **BY_ERROR},
    "linear, full by error": {"rule": "linear", **BY_ERROR},
    "delta, random full layers": {"rule": "delta", "full_choice": "random"},
    "delta, none full": {"rule": "delta", "full": 0},
    "LoRA alone, none full": {"rule": "none", "full": 0},
    "delta, none full, window 128": {"rule": "delta", "full": 0, "window": 128},
    "LoRA alone, none full, window 128": {"rule": "none", "full": 0, "window": 128},
    "delta, none full, kept by surprise": {"rule": "delta", "full": 0, "retention": "surprise"},
    "LoRA alone, none full, kept by value-norm": {"rule": "none", "full": 0, "retention": "value-norm"},
    "LoRA alone, none full, kept at random": {"rule": "none", "full": 0, "retention": "random"},
}
"""By name: options of `hqlt retrofit`. All rules have states of the same size, except linear's normalizer (1/64)."""
STAGES = ("fit", "distill", "tune")


@hqlt.register("rule", "empty")
class Empty(FWMemory):
    """A rule that writes nothing, so that all reads are 0. Of the new parts, only the window's gate remains."""

    def state_entries(self) -> tuple[()]:
        return ()

    def forward(self, q: torch.Tensor, write: Write, past: Any, resets: Any) -> tuple[torch.Tensor, tuple[()]]:
        b, t, reads, _ = q.shape
        return write.values.new_zeros(b, t, reads, self.heads.v), ()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a folder written by `hqlt convert`")
    parser.add_argument("--data", required=True, help="training data, as for `hqlt retrofit`")
    parser.add_argument("--text", type=Path, required=True, help="text file on which all models are probed")
    parser.add_argument(
        "--rows", type=int, default=8, help="number of texts of --length tokens, from the beginning of --text"
    )
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--fit", type=int, default=200_000, help="tokens of stage 1")
    parser.add_argument("--distill", type=int, default=400_000, help="tokens of stage 2")
    parser.add_argument("--tune", type=int, default=0, help="tokens of stage 3")
    parser.add_argument("--window", type=int, default=64)
    parser.add_argument("--sinks", type=int, default=4)
    parser.add_argument("--kept", type=int, default=64, help="kept entries in runs that keep any beyond the window")
    parser.add_argument("--seeds", type=numbers, default=[0, 1, 2], help="such as 0,1,2")
    parser.add_argument(
        "--only", type=lambda text: text.split(";"), default=list(RUNS), help="names of runs, separated by ;"
    )
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/retrofit"), help="output folder of runs, table and page"
    )
    parser.add_argument(
        "--results", type=Path, default=Path("results/retrofit"), help="folder for a copy of table and curves"
    )
    options, more = parser.parse_known_args()
    if unknown := set(options.only) - set(RUNS):
        parser.error(f"--only: expected some of {'; '.join(RUNS)}, got {'; '.join(sorted(unknown))}")
    tokens = tokens_of(options)
    rows = cached(options.folder / "baselines.json", settings_of(options, {}, []), partial(baselines, options, tokens))
    for seed in options.seeds:
        for name in options.only:
            place = options.folder / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"
            command = arguments(options, name, seed) + more
            settings = settings_of(options, {"name": name, "seed": seed}, command)
            make = partial(measured, options, name, seed, place, command, tokens)
            rows += cached(place / "rows.json", settings, make)
            report(options, more, rows)


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def tokens_of(options: argparse.Namespace) -> torch.Tensor:
    tokenizer = tokenizer_of(options.model, read_config(options.model).vocab_size)
    wanted = options.rows * options.length
    ids = tokenizer.encode(options.text.read_text(encoding="utf-8")[: 16 * wanted])
    if len(ids) < wanted:
        raise SystemExit(f"text: expected {wanted:,} tokens in {options.text}, got {len(ids):,}")
    return torch.tensor(ids[:wanted]).view(options.rows, options.length)


def settings_of(options: argparse.Namespace, more: dict[str, Any], command: Sequence[str]) -> dict[str, Any]:
    """Everything that the rows of a file depend on."""
    names = ("model", "text", "rows", "length", "window", "sinks")
    return {name: str(getattr(options, name)) for name in names} | more | {"arguments": list(command)}


def cached(file: Path, settings: dict[str, Any], make: Any) -> list[dict[str, Any]]:
    """The rows in a file, which is created if missing.

    Raises:
        SystemExit: If the rows in the file belong to other settings.
    """
    if not file.exists():
        rows = make()
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, json.dumps({"asked": settings, "rows": rows}).encode())
    content = json.loads(file.read_text())
    if content["asked"] != settings:
        found = content["asked"]
        raise SystemExit(f"{file}: expected rows of {settings}, found those of {found}; use another --folder")
    rows_found: list[dict[str, Any]] = content["rows"]
    return rows_found


def baselines(options: argparse.Namespace, tokens: torch.Tensor) -> list[dict[str, Any]]:
    """The original model, and the same with only a window and sinks in all layers."""
    original: HQLTForCausalLM = load_model(options.model).float()
    config = config_for(original.config, window=options.window, sinks=options.sinks, rule="none")
    models = {ORIGINAL: original, WINDOW: retrofitted(original, config)}
    return [{"name": name, "probe": probe(model, tokens)} for name, model in models.items()]


def arguments(options: argparse.Namespace, name: str, seed: int) -> list[str]:
    """The arguments of `hqlt retrofit` that follow model and folder."""
    own, budgets = RUNS[name], {stage: getattr(options, stage) for stage in STAGES}
    if own["rule"] == "none":
        budgets["distill"] += budgets["fit"]
    values = own | {"data": options.data, "window": own.get("window", options.window), "sinks": options.sinks}
    values |= {"seed": seed}
    values |= {"kept": options.kept} if "retention" in own else {}
    values |= {f"{stage}.tokens": count for stage, count in budgets.items()} | {"validation_rows": 0}
    return [f"--{name}={value}" for name, value in values.items()]


def measured(
    options: argparse.Namespace, name: str, seed: int, place: Path, arguments: Sequence[str], tokens: torch.Tensor
) -> list[dict[str, Any]]:
    """Run one retrofit, and probe its result."""
    command = ["retrofit", str(options.model), str(place), *arguments]
    print("hqlt", *command, flush=True)
    begin = time.perf_counter()
    subprocess.run([sys.executable, __file__, *command], check=True)
    seconds = time.perf_counter() - begin
    rows = probe_rows(name, load_model(place), tokens)
    trained = sum(getattr(options, stage) for stage in STAGES)
    rows[0] |= {"tokens": trained, "seconds": seconds}
    return [row | {"seed": seed} for row in rows]


def report(options: argparse.Namespace, more: Sequence[str], rows: list[dict[str, Any]]) -> None:
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    settings |= {"more": list(more), "runs": RUNS, "hqlt": hqlt.__version__, "torch": torch.__version__}
    settings |= {"python": platform.python_version()}
    write_retrofit_report(
        options.folder,
        rows,
        settings,
        Console(),
        title=f"{options.model.name}, retrofitted",
        introduction=f"Full attention is replaced by windows of {options.window} tokens, {options.sinks} sinks and an "
        f"FW-memory. Unless stated otherwise, a fifth of the layers keep full attention.",
    )
    options.results.mkdir(parents=True, exist_ok=True)
    for name in ("README.md", "results.json", "curves.png"):
        shutil.copyfile(options.folder / name, options.results / name)


if __name__ == "__main__":
    if sys.argv[1:2] == ["retrofit"]:  # `hqlt retrofit`, with the rule "empty"
        hqlt.cli.main()
    else:
        main()
