"""Chromium without a window, driven through its own debugging pipe: no driver, no port, no download."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

FOUND = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)


class Left(Exception):
    """The page was left while it was asked something."""


class Page:
    """One page of a browser."""

    def __init__(self, write: int, read: int):
        self._write, self._read, self._number, self._held = write, read, 0, b""
        target = self._ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self._ask("Page.enable")

    _session = None

    def _ask(self, method: str, **params) -> dict:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self._held:
                part = os.read(self._read, 1 << 20)
                assert part, "the browser has ended"
                self._held += part
            line, _, self._held = self._held.partition(b"\0")
            answer = json.loads(line)
            if answer.get("id") == self._number:
                if "navigated" in answer.get("error", {}).get("message", ""):
                    raise Left
                assert "error" not in answer, answer
                return answer["result"]

    def go(self, url: str, width: int = 1000, height: int = 760, scheme: str = "light") -> None:
        self._ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.scheme(scheme)
        self._ask("Page.navigate", url=url)
        self.wait("document.readyState === 'complete'")

    def scheme(self, name: str) -> None:
        """"light" or "dark"."""
        self._ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": name}])

    def js(self, expression: str):
        """The value of a JavaScript expression."""
        answer = self._ask("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, condition: str, seconds: int = 60) -> None:
        """Until a JavaScript condition holds, on this page or the one to which it leads."""
        try:
            self._wait(condition, seconds)
        except Left:
            self._wait(condition, seconds)

    def _wait(self, condition: str, seconds: int) -> None:
        held = self.js(
            f"new Promise(done => {{ const end = performance.now() + {1000 * seconds}; const look = () => {{"
            f" let held = false; try {{ held = Boolean({condition}); }} catch {{ }}"
            " held ? done(true) : performance.now() > end ? done(false) : setTimeout(look, 20); }; look(); })"
        )
        assert held, f"never: {condition}; the page says {self.js('document.body.innerText')!r}"

    def type(self, text: str) -> None:
        self._ask("Input.insertText", text=text)

    def press(self, key: str, code: int, text: str = "") -> None:
        for kind in ("keyDown", "keyUp"):
            self._ask("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code,
                      **({"text": text} if kind == "keyDown" and text else {}))  # fmt: skip

    def picture(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self._ask("Page.captureScreenshot", format="png")["data"]))


@contextlib.contextmanager
def page():
    """A page of a browser of its own."""
    (ours_in, theirs_out), (theirs_in, ours_out) = os.pipe(), os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [
            FOUND, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
            "--disable-background-networking", f"--user-data-dir={profile}", "--remote-debugging-pipe", "about:blank",
        ]  # fmt: skip
        # The pipes have to be 3 and 4 there.
        script = f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}'
        process = subprocess.Popen(["bash", "-c", script, "bash", *command], pass_fds=(theirs_in, theirs_out),
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
        os.close(theirs_in)
        os.close(theirs_out)
        try:
            yield Page(ours_out, ours_in)
        finally:
            process.terminate()
            process.wait(20)
            os.close(ours_in)
            os.close(ours_out)
