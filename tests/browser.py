"""Open a page in Chromium as a desktop or a phone does, and measure what a reader would meet."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest

# Elements that scroll within their own box may hold what is wider than the page.
MEASURE = """(() => {
  const wide = [...document.querySelectorAll('body *')].filter(one => {
    const box = one.getBoundingClientRect();
    return box.right > innerWidth + 1 && !one.closest('pre') && !one.closest('svg') && !one.closest('.scroll');
  });
  return {title: document.title, pictures: document.images.length,
          broken: [...document.images].filter(one => !one.naturalWidth).length, inner: innerWidth,
          scroll: document.documentElement.scrollWidth, wide: wide.slice(0, 5).map(one => one.outerHTML.slice(0, 200)),
          text: document.body.innerText, paper: getComputedStyle(document.body).backgroundColor};
})()"""


@contextmanager
def chromium(profile: Path) -> Iterator[str]:
    """Start the browser and give the port of its developer tools; skips the test where there is none, but not in CI."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        if os.environ.get("CI") == "true":
            pytest.fail("Chromium is not installed; CI must have it")
        pytest.skip("Chromium is not installed")
    command = [
        browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", f"--user-data-dir={profile}", "--remote-debugging-port=0",
    ]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            deadline, told = time.monotonic() + 60, profile / "DevToolsActivePort"
            while not (told.exists() and told.read_text()) and time.monotonic() < deadline:  # it is empty at first
                time.sleep(0.1)
            yield told.read_text().split()[0]
        finally:
            process.terminate()


def look(port: str, page: Path, width: int, scheme: str, ask: str = "null") -> dict[str, Any]:
    """Open a page with all that is folded in it: what MEASURE says, ``requested`` URLs and ``complaints``.

    ``asked`` is what the expression ``ask`` gives before anything is unfolded.
    """
    return asyncio.run(_look(port, page, width, scheme, ask))


async def _look(port: str, page: Path, width: int, scheme: str, ask: str) -> dict[str, Any]:
    async with open_tab(port, width, scheme) as tab:
        await tab.load(page)
        asked = await tab.evaluate(ask)
        await tab.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
        return await tab.evaluate(MEASURE) | {"requested": tab.requested, "complaints": tab.complaints, "asked": asked}


KEYS = {
    "ArrowLeft": ("ArrowLeft", 37, ""), "ArrowRight": ("ArrowRight", 39, ""), "ArrowDown": ("ArrowDown", 40, ""),
    "Backspace": ("Backspace", 8, ""), " ": ("Space", 32, " "), "1": ("Digit1", 49, "1"), "2": ("Digit2", 50, "2"),
}  # fmt: skip


@dataclass
class Tab:
    """A tab under control; ``requested`` are the URLs it asked for, ``complaints`` what its console says."""

    socket: aiohttp.ClientWebSocketResponse
    requested: list[str] = field(default_factory=list)
    complaints: list[dict[str, Any]] = field(default_factory=list)
    number: int = 0

    async def call(self, method: str, wait: str = "", **parameters: Any) -> dict[str, Any]:
        """Call a method of the developer tools, and wait for an event after it."""
        self.number += 1
        await self.socket.send_json({"id": self.number, "method": method, "params": parameters})
        result = None
        while result is None or wait:
            message = await asyncio.wait_for(self.socket.receive_json(), 60)
            event = message.get("method")
            if event == "Network.requestWillBeSent":
                self.requested.append(message["params"]["request"]["url"])
            if event in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):
                self.complaints.append(message["params"])
            if message.get("id") == self.number:
                result = message["result"]
            if event == wait:
                wait = ""
        return result

    async def load(self, page: Path) -> None:
        """Open a file, or open it again."""
        await self.call("Page.navigate", wait="Page.loadEventFired", url=page.as_uri())

    async def evaluate(self, expression: str) -> Any:
        """Return what an expression is in the page."""
        found = await self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        return found["result"].get("value")

    async def press(self, *keys: str) -> None:
        """Press keys one after the other, each of KEYS."""
        for key in keys:
            code, number, text = KEYS[key]
            given = {"key": key, "code": code, "windowsVirtualKeyCode": number}
            await self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **given)
            await self.call("Input.dispatchKeyEvent", type="keyUp", **given)

    async def click(self, selector: str, count: int = 1) -> None:
        """Click on the middle of an element with the mouse, which also gives it the focus; twice is a double click."""
        middle = "(box => [box.x + box.width / 2, box.y + box.height / 2])"
        x, y = await self.evaluate(f"{middle}(document.querySelector({selector!r}).getBoundingClientRect())")
        for number in range(1, count + 1):
            for kind in ("mousePressed", "mouseReleased"):
                await self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=number)


@asynccontextmanager
async def open_tab(port: str, width: int = 1280, scheme: str = "light") -> AsyncIterator[Tab]:
    """Open an empty tab, 800 pixels high."""
    async with aiohttp.ClientSession() as session:
        async with session.put(f"http://127.0.0.1:{port}/json/new?about:blank") as answer:
            target = await answer.json()
        async with session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=1 << 26) as socket:
            tab = Tab(socket)
            for domain in ("Page", "Network", "Runtime", "Log"):
                await tab.call(f"{domain}.enable")
            size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": True}
            await tab.call("Emulation.setDeviceMetricsOverride", **size)
            await tab.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
            yield tab
