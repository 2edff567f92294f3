"""A training step of the tiny model, on an idle machine and with another program keeping one core busy, for different
OpenMP wait policies (`hqlt.threads`).

Each contestant runs in its own process, because libgomp reads its environment variables when it is loaded. The other
program is a loop that never sleeps.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator

from hqlt.bench.race import Row
from hqlt.threads import PREFIXES

ONLY = ("quiet", "busy")
CAPTION = "training steps per second of the tiny model (b8 t256), and their share of the first row's on a quiet machine"

CONTESTANTS: dict[str, dict[str, str]] = {
    "torch's default": {},
    "hqlt's commands": {"HQLT_BENCH": "chosen"},
    "OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
    "GOMP_SPINCOUNT=1000": {"GOMP_SPINCOUNT": "1000"},
    "GOMP_SPINCOUNT=10000": {"GOMP_SPINCOUNT": "10000"},
    "GOMP_SPINCOUNT=100000": {"GOMP_SPINCOUNT": "100000"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}

MEASURE = """
import os, sys, json, time
if os.environ.get("HQLT_BENCH"):
    from hqlt.threads import Load, use_passive_wait_if_busy
    del os.environ["HQLT_BENCH"]
    use_passive_wait_if_busy(Load())
import torch
from hqlt.model import HQLTForCausalLM, preset
seconds, b, t = float(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
torch.manual_seed(0)
model = HQLTForCausalLM(preset("tiny"))
tokens = torch.randint(0, model.config.vocab_size, (b, t))
optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
def step():
    optimiser.zero_grad()
    model(tokens, labels=tokens).loss.backward()
    optimiser.step()
step()
begun, steps = time.perf_counter(), 0
while time.perf_counter() - begun < seconds or steps < 2:
    step()
    steps += 1
print(json.dumps(steps / (time.perf_counter() - begun)))
"""


def run(rounds: int, quick: bool, only: str | None) -> list[Row]:
    """Run `rounds` processes per contestant, in turns. `--threads` has no effect, because threads are measured."""
    arguments = ["0.1", "1", "8"] if quick else ["3", "8", "256"]
    machines = [machine for machine in ONLY if only in (None, machine)]
    speeds: dict[str, dict[str, list[float]]] = {name: {machine: [] for machine in machines} for name in CONTESTANTS}
    for _ in range(rounds):
        for machine in machines:
            with busy_core() if machine == "busy" else contextlib.nullcontext():
                for name, variables in CONTESTANTS.items():
                    speeds[name][machine].append(steps_per_second(variables, arguments))
    medians = {
        name: {machine: statistics.median(measured) for machine, measured in by_machine.items()}
        for name, by_machine in speeds.items()
    }
    first = medians[next(iter(CONTESTANTS))][machines[0]]
    return [
        {"implementation": name}
        | {machine: {"steps/s": speed, "share": speed / first} for machine, speed in by_machine.items()}
        for name, by_machine in medians.items()
    ]


def steps_per_second(variables: dict[str, str], arguments: list[str]) -> float:
    """Speed in a new process with these environment variables, without the user's own settings of threads."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(PREFIXES)} | variables
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *arguments], env=environment, check=True, stdout=subprocess.PIPE, text=True
    )
    return float(json.loads(done.stdout))


@contextlib.contextmanager
def busy_core() -> Iterator[None]:
    """Context manager in which another program keeps one core busy."""
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        time.sleep(0.5)
        yield
    finally:
        other.kill()
        other.wait()
