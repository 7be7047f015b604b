"""A page in a real headless Chromium, driven over a pipe: no port, no network."""

import base64
import itertools
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-sync",
    "--disable-background-networking",
    "--disable-component-update",
    "--remote-debugging-pipe",
]

# Elements whose text does not fit: wider inside than outside, or letters beyond the picture's edge.
CUT_OFF = """(() => {
  const wide = [...document.body.querySelectorAll('*')].filter(one => !one.closest('svg')
    && one.scrollWidth > one.clientWidth + 1 && getComputedStyle(one).display !== 'inline');
  const out = [...document.querySelectorAll('svg text')].filter(one => {
    const text = one.getBoundingClientRect();
    const box = one.ownerSVGElement.getBoundingClientRect();
    return text.left < box.left - 1 || text.right > box.right + 1
      || text.top < box.top - 1 || text.bottom > box.bottom + 1;
  });
  const page = document.documentElement;
  return [...wide, ...out].map(one => one.outerHTML.slice(0, 200)).concat(
    page.scrollWidth > innerWidth ? ['the page: ' + page.scrollWidth] : []);
})()"""
UNLOADED = """[...document.images].filter(one => !(one.complete && one.naturalWidth))
  .map(one => one.src.slice(0, 100))"""
LOADED = """performance.getEntriesByType('resource').map(one => one.name)
  .filter(one => !one.startsWith('data:'))"""


class Browser:
    """One page; `said` gathers what it puts on the console, and its errors."""

    def __init__(self, write: int, read: int) -> None:
        self._write, self._read = write, read
        self._rest, self._numbers = b"", itertools.count(1)
        self._session: str | None = None
        self.said: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> Any:
        """One command of the DevTools protocol; events that come meanwhile are looked at."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            found = self._next()
            if found.get("id") == number:
                assert "error" not in found, found
                return found["result"]

    def open(self, page: Path, width: int, dark: bool, media: str = "") -> None:
        """Loads the page as a window of `width` shows it."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", media=media, features=[scheme])
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.call("Page.navigate", url=page.resolve().as_uri())
        ready = "new Promise(go => document.readyState === 'complete' ? go(1) : addEventListener"
        self.evaluate(f"{ready}('load', () => go(1)))")

    def evaluate(self, script: str) -> Any:
        """The value of a script in the page."""
        given = {"expression": script, "awaitPromise": True, "returnByValue": True}
        found = self.call("Runtime.evaluate", **given)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def screenshot(self, path: Path) -> None:
        """The whole page as a PNG file."""
        found = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(found["data"]))

    def _next(self) -> Any:
        while b"\0" not in self._rest:
            more = os.read(self._read, 1 << 16)
            assert more, "the browser ended"
            self._rest += more
        line, _, self._rest = self._rest.partition(b"\0")
        found = json.loads(line)
        if found.get("method") in (
            "Runtime.consoleAPICalled",
            "Runtime.exceptionThrown",
            "Log.entryAdded",
        ):
            self.said.append(json.dumps(found["params"])[:500])
        return found


@contextmanager
def browser() -> Iterator[Browser]:
    """A Chromium with a profile of its own, ended afterwards."""
    assert CHROMIUM
    to_browser, from_browser = os.pipe(), os.pipe()

    def wire() -> None:  # the protocol wants descriptors 3 and 4
        ours = os.dup2(to_browser[0], 100), os.dup2(from_browser[1], 101)
        os.dup2(ours[0], 3)
        os.dup2(ours[1], 4)

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(
            [CHROMIUM, *FLAGS, f"--user-data-dir={profile}"],
            preexec_fn=wire,
            close_fds=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser[0])
        os.close(from_browser[1])
        try:
            page = Browser(to_browser[1], from_browser[0])
            yield page
            page._session = None
            page.call("Browser.close")
        finally:
            process.kill()
            process.wait()
            os.close(to_browser[1])
            os.close(from_browser[0])
