"""A real headless browser, driven over its DevTools protocol: open a file, look, click, press keys.

Whatever Chromium or Chrome the machine has; nothing is downloaded, and nothing is asked of the network.
"""

import base64
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

NAMES = (
    "chromium",
    "chromium-browser",
    "google-chrome",
    "google-chrome-stable",
    "chrome",
    "chrome-headless-shell",
)
TEXT = "document.body.innerText"
START_S = ANSWER_S = 60.0
SWITCHES = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-extensions", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
    "--remote-debugging-port=0",
)  # fmt: skip


def find_browser() -> str | None:
    """Path of the first browser that is installed; None if there is none."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One page of a running browser.

    Attributes:
        events: what the page reported since it was opened, as ``(method, parameters)``.
    """

    def __init__(self, socket: ClientConnection) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []
        self._socket, self._asked, self._session = socket, 0, ""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command and its answer; events that come in between are kept."""
        self._asked += 1
        message = {"id": self._asked, "method": method, "params": parameters}
        self._socket.send(json.dumps(message | ({"sessionId": self._session} if self._session else {})))
        while True:
            answer = self._receive()
            if answer.get("id") == self._asked:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]

    def _receive(self) -> dict[str, Any]:
        message = json.loads(self._socket.recv(timeout=ANSWER_S))
        if "method" in message:
            self.events.append((message["method"], message["params"]))
        return message

    def show(self, width: int, height: int = 900, *, dark: bool = False, scripts: bool = True) -> None:
        """Set the window's size in CSS pixels, the colour scheme, and whether pages may run scripts."""
        phone = width < 600
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": phone}
        self.call("Emulation.setDeviceMetricsOverride", **metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Emulation.setScriptExecutionDisabled", value=not scripts)

    def open(self, page: Path | str) -> None:
        """Open a file or an address and wait until it is loaded; forgets earlier events."""
        self.events.clear()
        self.call("Page.navigate", url=page if isinstance(page, str) else page.resolve().as_uri())
        while not any(method == "Page.loadEventFired" for method, _ in self.events):
            self._receive()

    def value(self, expression: str) -> Any:
        """What a JavaScript expression is on the page."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait_for(self, expression: str) -> Any:
        """What a JavaScript expression is on the page once it is true: pages that ask a server fill up later."""
        end = time.monotonic() + ANSWER_S
        while not (found := self.value(expression)):
            assert time.monotonic() < end, (
                f"{expression} is not so; the page says: {self.value(TEXT)[-2000:]}"
            )
            time.sleep(0.2)
        return found

    def press(self, key: str, code: int, *, text: str = "") -> None:
        """Press and release a key where the focus is."""
        pressed = {"key": key, "code": key, "windowsVirtualKeyCode": code}
        self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **pressed)
        self.call("Input.dispatchKeyEvent", type="keyUp", **pressed)

    def click(self, selector: str) -> None:
        """Click in the middle of the first element that fits a CSS selector, as a mouse does."""
        place = f"document.querySelector({json.dumps(selector)})"
        self.value(f"{place}.scrollIntoView({{block: 'center', behavior: 'instant'}})")
        x, y = self.value(
            f"(() => {{ const b = {place}.getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2] }})()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def screenshot(self, path: Path, *, whole: bool = False) -> None:
        """Save what is seen, or the whole page, as a PNG."""
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(data))


@contextmanager
def running_browser(program: str, folder: Path) -> Iterator[Browser]:
    """Run a browser whose profile is in a folder, for as long as the block lasts."""
    arguments = [program, *SWITCHES, f"--user-data-dir={folder}", "about:blank"]
    log = folder / "browser.log"
    folder.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as out:
        process = subprocess.Popen(arguments, stdout=out, stderr=out, start_new_session=True)
    try:
        with connect(_address(process, log), max_size=None, proxy=None, open_timeout=START_S) as socket:
            yield Browser(socket)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _address(process: subprocess.Popen, log: Path) -> str:
    """Where the browser listens, which it writes when it is ready."""
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        text = log.read_text("utf-8", "replace")
        if found := re.search(r"DevTools listening on (ws://\S+)", text):
            return found[1]
        if process.poll() is not None:
            break
        time.sleep(0.05)
    raise RuntimeError(f"the browser did not start: {log.read_text('utf-8', 'replace')[-2000:]}")
