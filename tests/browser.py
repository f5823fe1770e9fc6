"""Open a page in Chromium as a desktop or a phone does, and measure what a reader would meet."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
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
            deadline = time.monotonic() + 60
            while not (profile / "DevToolsActivePort").exists() and time.monotonic() < deadline:
                time.sleep(0.1)
            yield (profile / "DevToolsActivePort").read_text().split()[0]
        finally:
            process.terminate()


def look(port: str, page: Path, width: int, scheme: str) -> dict[str, Any]:
    """Open a page with all that is folded in it: what MEASURE says, ``requested`` URLs and ``complaints``."""
    return asyncio.run(_look(port, page, width, scheme))


async def _look(port: str, page: Path, width: int, scheme: str) -> dict[str, Any]:
    requested, complaints = [], []
    async with aiohttp.ClientSession() as session:
        async with session.put(f"http://127.0.0.1:{port}/json/new?about:blank") as answer:
            target = await answer.json()
        async with session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=1 << 26) as socket:
            number = 0

            async def call(method: str, wait: str = "", **parameters) -> dict[str, Any]:
                nonlocal number
                number += 1
                await socket.send_json({"id": number, "method": method, "params": parameters})
                result = None
                while result is None or wait:
                    message = await asyncio.wait_for(socket.receive_json(), 60)
                    event = message.get("method")
                    if event == "Network.requestWillBeSent":
                        requested.append(message["params"]["request"]["url"])
                    if event in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):
                        complaints.append(message["params"])
                    if message.get("id") == number:
                        result = message["result"]
                    if event == wait:
                        wait = ""
                return result

            for domain in ("Page", "Network", "Runtime", "Log"):
                await call(f"{domain}.enable")
            await call("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=True)
            await call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
            await call("Page.navigate", wait="Page.loadEventFired", url=page.as_uri())
            unfold = "document.querySelectorAll('details').forEach(one => one.open = true)"
            await call("Runtime.evaluate", expression=unfold)
            measured = await call("Runtime.evaluate", expression=MEASURE, returnByValue=True)
            return measured["result"]["value"] | {"requested": requested, "complaints": complaints}
