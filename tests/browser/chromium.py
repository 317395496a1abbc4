"""A headless Chromium, spoken to in its DevTools protocol over a pipe: no driver, no port, the standard library alone."""

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SECONDS = 60  # for any answer
FLAGS = (
    "--headless",
    "--remote-debugging-pipe",
    "--disable-gpu",
    "--hide-scrollbars",
    "--no-first-run",
    "--disable-extensions",
)


def find():
    """The browser's program; None where there is none."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


@dataclass
class Opened:
    """What a page did while it was opened: errors it reported, and every address it asked for."""

    errors: list = field(default_factory=list)
    requests: list = field(default_factory=list)


class Chromium:
    """One browser process with one page. A context manager."""

    def __init__(self, profile: Path) -> None:
        """profile: an empty folder for what it writes."""
        reads, self._write = os.pipe()
        self._read, writes = os.pipe()
        given = [fcntl.fcntl(fd, fcntl.F_DUPFD, 20) for fd in (reads, writes)]  # out of the way of 3 and 4
        root = ["--no-sandbox"] if os.geteuid() == 0 else []  # the sandbox refuses root
        self._process = subprocess.Popen(
            [find(), *FLAGS, *root, f"--user-data-dir={profile}", "about:blank"],
            preexec_fn=lambda: [os.dup2(fd, number) for fd, number in zip(given, (3, 4), strict=True)],
            pass_fds=(3, 4),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for fd in (reads, writes, *given):
            os.close(fd)
        self._buffer, self._number, self.session, self.opened = b"", 0, None, Opened()

    def __enter__(self):
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(self, *error):
        os.close(self._write)
        os.close(self._read)
        self._process.terminate()
        self._process.wait(timeout=SECONDS)

    def call(self, method: str, **parameters) -> dict:
        """Ask for something and wait for the answer; what happens meanwhile is noted in `opened`."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        answer = self._wait(lambda found: found.get("id") == self._number)
        assert "error" not in answer, f"{method}: {answer['error']}"
        return answer["result"]

    def open(self, page: Path, width: int, height: int, dark: bool = False, media: str = "screen") -> Opened:
        """Open a file in a window of so many CSS pixels; a phone's where it is narrower than 600."""
        phone = width < 600
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=2 if phone else 1,
            mobile=phone,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", media=media, features=[scheme])
        self.opened = Opened()
        self.call("Page.navigate", url=page.resolve().as_uri())
        self._wait(lambda found: found.get("method") == "Page.loadEventFired")
        self.evaluate("document.fonts.ready.then(() => 1)")
        return self.opened

    def evaluate(self, expression: str):
        """The value of a JavaScript expression in the page."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def screenshot(self, file: Path, width: int, height: int) -> None:
        """The page's first so many pixels, or fewer where it is shorter, as a PNG."""
        height = min(height, self.evaluate("document.documentElement.scrollHeight"))
        clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        shot = self.call("Page.captureScreenshot", format="png", clip=clip, captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(shot["data"]))

    def pdf(self) -> bytes:
        """The page as it is printed on A4."""
        printed = self.call("Page.printToPDF", paperWidth=8.27, paperHeight=11.69, printBackground=True)
        return base64.b64decode(printed["data"])

    def _wait(self, wanted) -> dict:
        deadline = time.monotonic() + SECONDS
        while True:
            while b"\0" in self._buffer:
                line, _, self._buffer = self._buffer.partition(b"\0")
                found = json.loads(line)
                self._note(found)
                if wanted(found):
                    return found
            ready, _, _ = select.select([self._read], [], [], max(0.0, deadline - time.monotonic()))
            part = os.read(self._read, 1 << 16) if ready else b""
            assert part, f"Chromium said nothing for {SECONDS} s, or ended (exit code {self._process.poll()})"
            self._buffer += part

    def _note(self, found: dict) -> None:
        """Keep errors and addresses of what happens in the page."""
        method, said = found.get("method"), found.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.opened.errors.append(said["exceptionDetails"]["text"])
        elif method == "Runtime.consoleAPICalled" and said["type"] in ("error", "warning", "assert"):
            self.opened.errors.append(f"console: {said['args']}")
        elif method == "Log.entryAdded" and said["entry"]["level"] in ("error", "warning"):
            self.opened.errors.append(f"{said['entry']['text']} {said['entry'].get('url', '')}")
        elif method == "Network.loadingFailed":
            self.opened.errors.append(f"a request failed: {said['errorText']}")
        elif method == "Network.requestWillBeSent":
            self.opened.requests.append(said["request"]["url"])
