"""A headless Chromium for tests of pages, driven over its debugging pipe: no driver, no port, no network.

`find_chromium()` gives the command, or None. Where LONGVPO_REQUIRE_CHROMIUM is set, its absence is an error.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

_COMMANDS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)
_SECONDS = 30.0


def find_chromium() -> str:
    """The command of a Chromium; without one the test is skipped, or fails where one must be there."""
    found = next((path for name in _COMMANDS if (path := shutil.which(name))), None)
    if found is None:
        reason = f"no Chromium: none of {', '.join(_COMMANDS)} is on the PATH (Debian: apt-get install chromium)"
        if os.environ.get("LONGVPO_REQUIRE_CHROMIUM"):
            pytest.fail(f"LONGVPO_REQUIRE_CHROMIUM is set, but {reason}")
        pytest.skip(reason)
    return found


class Chromium:
    """One page at a time in a browser of its own, as a context manager.

    Args:
        profile: An empty folder for the browser's profile.
    """

    def __init__(self, profile: Path) -> None:
        self._profile = profile
        self._buffer = b""
        self._last_id = 0
        self.events: list[dict[str, Any]] = []

    def __enter__(self) -> Chromium:
        command = find_chromium()
        browser_reads, self._to = os.pipe()
        self._from, browser_writes = os.pipe()
        # The browser reads from descriptor 3 and writes to 4.
        shell = f'exec "$@" 3<&{browser_reads} 4>&{browser_writes}'
        self._process = subprocess.Popen(
            ["bash", "-c", shell, "chromium", command, *_FLAGS, f"--user-data-dir={self._profile}", "about:blank"],
            pass_fds=(browser_reads, browser_writes),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(browser_reads)
        os.close(browser_writes)
        self._session = ""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)  # its own group, made above
        self._process.wait()
        os.close(self._to)
        os.close(self._from)

    def open(self, path: Path, fragment: str = "") -> None:
        """Loads a file's page anew and forgets the events before it."""
        self.call("Page.navigate", url="about:blank")
        self.events.clear()
        self.call("Page.navigate", url=path.as_uri() + fragment)
        self.wait("document.readyState === 'complete'")

    def run(self, expression: str) -> Any:
        """What JavaScript gives, as JSON."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, expression: str) -> None:
        """Waits until an expression holds."""
        end = time.monotonic() + _SECONDS
        while not self.run(expression):
            assert time.monotonic() < end, f"not within {_SECONDS} s: {expression}"
            time.sleep(0.02)

    def type(self, text: str) -> None:
        """Types into what has the focus."""
        self.call("Input.insertText", text=text)

    def press(self, key: str) -> None:
        """Presses and releases Tab, Enter or another key that has a name."""
        codes = {"Tab": 9, "Enter": 13, " ": 32}
        text = {"Enter": "\r", " ": " "}.get(key, "")
        key_down = "keyDown" if text else "rawKeyDown"
        for kind in (key_down, "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, text=text, windowsVirtualKeyCode=codes[key])

    def size(self, width: int, height: int, scale: float = 1) -> None:
        """Shows the page as on a screen of this size; narrower than 500 px, on a phone."""
        phone = width < 500
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=phone
        )

    def colours(self, scheme: str) -> None:
        """`light` or `dark`, as the reader's system asks for."""
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def screenshot(self, path: Path) -> None:
        """A PNG of what the window shows."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def call(self, method: str, **parameters: Any) -> Mapping[str, Any]:
        """One command of the DevTools protocol; events that come meanwhile are kept."""
        self._last_id += 1
        message = {"id": self._last_id, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._last_id:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]
            self.events.append(answer)

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._from], [], [], _SECONDS)
            assert ready, f"the browser says nothing for {_SECONDS} s"
            chunk = os.read(self._from, 1 << 20)
            assert chunk, "the browser has ended"
            self._buffer += chunk
        message, self._buffer = self._buffer.split(b"\0", 1)
        return json.loads(message)
