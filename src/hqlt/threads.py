"""OpenMP's wait policy, which must be set before PyTorch is loaded.

After each operation, OpenMP's threads spin for a while, because the next operation usually follows at once. If another
program needs the core, the scheduler takes it from a spinning thread, and the next operation waits for a time slice: 3
to 30 times as long as the operation itself. Threads that sleep instead are woken at once, at a small cost on an idle
machine. libgomp reads its environment variables when it is loaded, so this is decided when a command starts.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

PREFIXES = ("OMP_", "GOMP_", "KMP_")
"""Prefixes of the environment variables with which users and launchers set the policy themselves."""
PASSIVE = {"OMP_WAIT_POLICY": "PASSIVE"}
"""Environment variables to set on a busy machine."""
BUSY_CORES = 0.4
"""A machine counts as busy if other processes use at least this many cores."""
MIN_SECONDS = 0.15
"""Minimum time to observe the load, because the kernel counts in hundredths of a second."""


class Load:
    """Measures how busy other processes keep the cores that this process may use, from construction on."""

    def __init__(self) -> None:
        self.begun, self.busy, self.own = time.monotonic(), _busy_seconds(), time.process_time()

    def busy_cores(self) -> float:
        """Average number of cores used by other processes; 0 if the system does not report it."""
        wait = MIN_SECONDS - (time.monotonic() - self.begun)
        if self.busy is None:
            return 0.0
        if wait > 0:
            time.sleep(wait)
        busy = (_busy_seconds() or 0.0) - self.busy - (time.process_time() - self.own)
        return max(busy, 0.0) / (time.monotonic() - self.begun)


def _busy_seconds() -> float | None:
    """Busy time, since boot, of the cores that this process may use, in seconds; None if unknown."""
    try:
        mine = {f"cpu{core}" for core in os.sched_getaffinity(0)}
        lines = [line.split() for line in Path("/proc/stat").read_text().splitlines()]
        # user, nice, system, idle, iowait, irq, softirq, steal
        ticks = sum(sum(map(int, line[1:9])) - int(line[4]) - int(line[5]) for line in lines if line[0] in mine)
        return ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError, IndexError):  # not Linux
        return None


def use_passive_wait_if_busy(load: Load) -> None:
    """Set the wait policy in the environment if the machine is busy, unless the user has already set a policy."""
    if any(name.startswith(PREFIXES) for name in os.environ):
        return
    if load.busy_cores() >= BUSY_CORES:
        os.environ.update(PASSIVE)
