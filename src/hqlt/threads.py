"""How torch's threads wait for one another, chosen before torch is loaded.

After each operation the threads of OpenMP spin for a while, because the next one usually follows at once. Where another
program needs the core, the scheduler takes it from the thread that spins; the next operation then waits for a time
slice, 3 to 30 times as long as it takes. Threads that sleep instead are woken at once, at a small price on a machine
that does nothing else. libgomp reads its variables when it is loaded, so this is decided at a command's start.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

PREFIXES = ("OMP_", "GOMP_", "KMP_")
"""Of the environment's variables by which users and launchers set this themselves."""
GENTLE = {"OMP_WAIT_POLICY": "PASSIVE"}
"""What a busy machine is met with."""
BUSY = 0.4
"""Cores that others keep busy, from which on a machine counts as busy."""
SHORTEST = 0.15
"""Seconds to watch for at least: the kernel counts in hundredths."""


class Load:
    """How busy other processes keep the cores that this one may use, from its making on."""

    def __init__(self) -> None:
        self.begun, self.busy, self.own = time.monotonic(), _busy_seconds(), time.process_time()

    def of_others(self) -> float:
        """Cores, between 0 and all; 0 where the system does not tell."""
        wait = SHORTEST - (time.monotonic() - self.begun)
        if self.busy is None:
            return 0.0
        if wait > 0:
            time.sleep(wait)
        busy = (_busy_seconds() or 0.0) - self.busy - (time.process_time() - self.own)
        return max(busy, 0.0) / (time.monotonic() - self.begun)


def _busy_seconds() -> float | None:
    """Seconds that the cores which this process may use have worked since the system began; None where unknown."""
    try:
        mine = {f"cpu{core}" for core in os.sched_getaffinity(0)}
        lines = [line.split() for line in Path("/proc/stat").read_text().splitlines()]
        # user, nice, system, idle, iowait, irq, softirq, steal
        ticks = sum(sum(map(int, line[1:9])) - int(line[4]) - int(line[5]) for line in lines if line[0] in mine)
        return ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError, IndexError):  # not Linux
        return None


def wait_gently_if_busy(load: Load) -> None:
    """Set the environment for the torch that is loaded next, unless its user has said how threads are to wait."""
    if any(name.startswith(PREFIXES) for name in os.environ):
        return
    if load.of_others() >= BUSY:
        os.environ.update(GENTLE)
