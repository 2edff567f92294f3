"""The first signal is recorded, a second one stops at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from hqlt.signals import SIGNALS, stopping


def test_the_first_signal_is_recorded_and_a_second_ctrl_c_raises() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with stopping() as received:
            os.kill(os.getpid(), signal.SIGINT)
            assert received == [signal.SIGINT]
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("first", SIGNALS)
def test_a_second_sigterm_ends_the_process(first: signal.Signals) -> None:
    code = (
        "import os, signal\nfrom hqlt.signals import stopping\n"
        f"with stopping():\n os.kill(os.getpid(), {int(first)})\n print('recorded', flush=True)\n"
        " os.kill(os.getpid(), signal.SIGTERM)\n print('not reached', flush=True)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (ended.stdout, ended.returncode) == ("recorded\n", -signal.SIGTERM)
