"""Headless Chromium, driven over the DevTools protocol."""

from __future__ import annotations

import itertools
import json
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from websockets.sync.client import connect

FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run")
SECONDS = 60


class Browser:
    """One tab: input by keys and clicks, inspection by JavaScript."""

    def __init__(self, socket: Any) -> None:
        self.socket, self.ids, self.session = socket, itertools.count(1), {}
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = {"sessionId": self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        self.call("Page.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        id = next(self.ids)
        self.socket.send(json.dumps({"id": id, "method": method, "params": params, **self.session}))
        while (message := json.loads(self.socket.recv(timeout=SECONDS))).get("id") != id:
            pass  # an event
        assert "error" not in message, message
        return message["result"]

    def ask(self, expression: str) -> Any:
        """The value of a JavaScript expression as JSON; promises are awaited."""
        options = {"awaitPromise": True, "returnByValue": True, "userGesture": True}
        result = self.call("Runtime.evaluate", expression=expression, **options)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def until(self, expression: str) -> None:
        """Wait until a JavaScript expression is true."""
        end = time.monotonic() + SECONDS
        while not self.ask(f"!!({expression})"):
            assert time.monotonic() < end, f"expected {expression} within {SECONDS} seconds"
            time.sleep(0.02)

    def visit(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        self.until(f"document.readyState === 'complete' && location.href.startsWith({json.dumps(url)})")

    def type(self, text: str) -> None:
        self.call("Input.insertText", text=text)

    def press(self, key: str, code: int) -> None:
        text = {"text": "\r"} if key == "Enter" else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, windowsVirtualKeyCode=code, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key, windowsVirtualKeyCode=code)

    def look(self, width: int, height: int, dark: bool = False) -> None:
        """Set the window size and the color scheme."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])


@contextmanager
def browsing(command: str, profile: Path) -> Iterator[Browser]:
    """Start a browser. profile: the folder of its profile."""
    options = [*FLAGS, "--remote-debugging-port=0", f"--user-data-dir={profile}", "about:blank"]
    process = subprocess.Popen([command, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        with connect(address(process, profile / "DevToolsActivePort"), max_size=None) as socket:
            yield Browser(socket)
    finally:
        process.kill()
        process.wait()


def address(process: subprocess.Popen, file: Path) -> str:
    """The WebSocket URL, which the browser writes to a file."""
    end = time.monotonic() + SECONDS
    while not file.is_file() or len(lines := file.read_text().splitlines()) < 2:
        assert process.poll() is None, f"chromium ended with status {process.returncode}"
        assert time.monotonic() < end, f"expected chromium to listen within {SECONDS} seconds"
        time.sleep(0.05)
    return f"ws://127.0.0.1:{lines[0]}{lines[1]}"
