"""The stand-in's page, as a person uses it: a headless Chromium, by its DevTools protocol."""

import asyncio
import base64
import contextlib
import json
import shutil
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.bot.conftest import Person, Scene
from tests.processes import running

_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
_BROWSER = next((found for name in _BROWSERS if (found := shutil.which(name))), None)
_LISTENING = "DevTools listening on "
pytestmark = pytest.mark.skipif(_BROWSER is None, reason=f"none of {', '.join(_BROWSERS)} is installed")


class Page:
    """A tab."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._calls = 0

    async def call(self, method: str, **parameters: Any) -> Any:
        """One command of the DevTools protocol."""
        self._calls += 1
        await self._socket.send_json({"id": self._calls, "method": method, "params": parameters})
        while (answer := await self._socket.receive_json(timeout=30)).get("id") != self._calls:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    async def evaluate(self, script: str) -> Any:
        """The value of an expression of JavaScript, once it is there."""
        answer = await self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    async def element(self, selector: str, text: str = "") -> None:
        """Wait until there is an element that holds the text."""
        await self.evaluate(
            f"""new Promise((found, failed) => {{
              const look = () => [...document.querySelectorAll({json.dumps(selector)})]
                .some((each) => each.textContent.includes({json.dumps(text)})) && found();
              new MutationObserver(look).observe(document, {{childList: true, subtree: true, attributes: true}});
              look();
              setTimeout(() => failed(new Error({json.dumps(f"no {selector} with {text!r}")})), 20000);
            }})"""
        )

    async def click(self, selector: str) -> None:
        """Click where it is, as a mouse does."""
        await self.element(selector)
        place = await self.evaluate(
            f"""(() => {{ const found = document.querySelector({json.dumps(selector)});
              found.scrollIntoView({{block: "center"}}); const box = found.getBoundingClientRect();
              return {{x: box.x + box.width / 2, y: box.y + box.height / 2}}; }})()"""
        )
        for kind in ("mousePressed", "mouseReleased"):
            await self.call("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **place)

    async def type(self, selector: str, text: str) -> None:
        await self.click(selector)
        await self.call("Input.insertText", text=text)

    async def screenshot(self, path: Path) -> None:
        shot = await self.call("Page.captureScreenshot", format="png")
        path.write_bytes(base64.b64decode(shot["data"]))


@contextlib.asynccontextmanager
async def opened(url: str, address: str) -> AsyncIterator[Page]:
    """A tab of the browser that listens at an address, with a page in it."""
    async with aiohttp.ClientSession() as http:
        async with http.put(f"http://{address}/json/new?about:blank") as answer:
            target = await answer.json()
        async with http.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0) as socket:
            page = Page(socket)
            await page.call(
                "Emulation.setDeviceMetricsOverride", width=1000, height=800, deviceScaleFactor=1, mobile=False
            )
            await page.call("Page.enable")
            await page.call("Page.navigate", url=url)
            yield page


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Where a browser listens."""
    folder = tmp_path_factory.mktemp("browser")
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0"]
    command = [str(_BROWSER), *options, f"--user-data-dir={folder / 'profile'}", "about:blank"]
    with running(command, folder / "browser.log") as process:
        process.await_output(_LISTENING)
        yield process.output().partition(_LISTENING)[2].split("/")[2]


def drive(scene: Scene, browser: str, steps: Callable[[Page], Coroutine[Any, Any, None]]) -> None:
    async def run() -> None:
        async with opened(f"{scene.discord.url}/", browser) as page:
            await steps(page)

    asyncio.run(run())


@pytest.fixture
def ada(scene: Scene) -> Person:
    """Whom the page shows first."""
    return Person(scene, scene.discord.user("ada"), "/ada")


def test_a_person_clicks_and_types(scene: Scene, ada: Person, browser: str, tmp_path: Path) -> None:
    main, alt = ada.keep("EXAMPLE-KEY-1", "EXAMPLE-KEY-2", labels=("main", "alt"))
    ada.ask("clicked")
    ada.prompt()

    async def answer(page: Page) -> None:
        await page.element("#messages", "My super bot!")
        await page.click("[data-menu] button")
        for key in (alt, main):
            await page.click(f'[data-menu] [data-value="{key.id}"]')
        await page.screenshot(tmp_path / "prompt.png")
        await page.click('[data-menu] [data-action="choose"]')
        await page.element('button[data-custom-id^="dw1:share"]:enabled', "(2)")
        await page.click('button[data-custom-id^="dw1:share"]')
        await page.element("#messages", "You shared")
        ada.ask("typed")
        await page.element('button[data-custom-id^="dw1:all"]')
        await page.type("#text", "1")
        await page.click("#send")
        await page.element("#messages", "main")

    drive(scene, browser, answer)
    clicked, typed = scene.receiver.await_callbacks(ada.path, 2)
    assert (clicked.field("state"), clicked.keys) == ("clicked", ["EXAMPLE-KEY-2", "EXAMPLE-KEY-1"])
    assert (typed.field("state"), typed.keys) == ("typed", ["EXAMPLE-KEY-1"])
