"""The page in a real Chromium: chat, stop, keys, the live view, and accessibility.

pip install -e '.[dev,browser]' && apt-get install chromium && pytest -m browser tests/server/test_page.py
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.door.fake_models import model, running_door
from tests.server.fake_engine import FakeEngine, serving
from tests.server.fake_load import ANSWER
from tinyvllm.config import MemoryUse, SamplingParams
from tinyvllm.scheduling.request import Request

pytestmark = pytest.mark.browser

DESKTOP = {"viewport": {"width": 1280, "height": 860}}
PHONE = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True, "device_scale_factor": 2}


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    from playwright.sync_api import sync_playwright  # imported here: other test runs need not have it

    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with sync_playwright() as driver:
        # --no-sandbox: containers run tests as root, and only our own page is loaded
        browser = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


class Visit:
    """An open page, with all its requests and console errors."""

    def __init__(self, browser: Any, url: str, options: dict[str, Any]) -> None:
        self.url = url
        self.context = browser.new_context(**options)
        self.page = self.context.new_page()
        self.errors: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", self._hear)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(url)

    def _hear(self, message: Any) -> None:
        if message.type == "error":
            self.errors.append(message.text)

    def ask(self, text: str) -> None:
        self.page.fill("#prompt", text)
        self.page.keyboard.press("Enter")

    def wait_for(self, selector: str) -> object:
        return self.page.wait_for_selector(selector, timeout=20_000)

    def until(self, claim: str) -> None:
        """Wait until the JavaScript expression is true. Polled from here, since the page may not evaluate strings."""
        for _ in range(400):
            if self.page.evaluate(claim):
                return
            self.page.wait_for_timeout(50)
        raise AssertionError(f"never true: {claim}")

    def text(self, selector: str) -> str:
        return str(self.page.inner_text(selector))


def ready(browser: object, url: str, **options: object) -> Visit:
    visit = Visit(browser, url, {**DESKTOP, **options})
    visit.wait_for("#status[data-status=ready]")
    return visit


@pytest.fixture
def engine() -> FakeEngine:
    """An engine with blocks in use, shared and cached."""
    engine = FakeEngine()
    manager = engine.inner.core.scheduler.block_manager
    for name, first, length in (("a", 7, 700), ("b", 7, 90), ("c", 9, 200)):
        request = Request(name, list(range(first, first + length)), SamplingParams())
        request.num_computed = manager.match_prefix(request)
        assert manager.grow(request, length)
        request.num_computed = length
        manager.seal(request)
        if name == "c":
            manager.free(request)
    return engine


def run_steps(engine: FakeEngine, count: int) -> None:
    for number in range(1, count + 1):
        stats = dataclasses.replace(
            engine.statistics,
            schedule_s=0.0002,
            pack_s=0.0005,
            device_s=0.004,
            commit_s=0.0003,
            num_tokens=4,
            num_seqs=4,
            extra={"num_steps": number},
        )
        engine.complete_step(stats)


def test_an_answer_is_streamed_and_counted(browser: object, engine: FakeEngine) -> None:
    with serving(engine) as url:
        visit = ready(browser, url)
        visit.page.click(".settings summary")
        for name, value in (("temperature", "0.5"), ("top_p", "0.9"), ("max_tokens", "50"), ("seed", "7")):
            visit.page.fill(f"#{name}", value)
        visit.page.fill("#system", "Be brief.")
        visit.ask("Say <b>hello</b>")
        visit.wait_for(".message.assistant .facts")
        assert visit.text(".message.user .text") == "Say <b>hello</b>"  # as text, not as HTML
        assert visit.text(".message.assistant .text") == engine.reply
        assert "13 tokens" in visit.text(".message.assistant .facts")
        assert engine.reply in visit.page.text_content("#announce")
        params = engine.calls[0].params
        assert (params.temperature, params.top_p, params.max_tokens, params.seed) == (0.5, 0.9, 50, 7)
        assert engine.calls[0].prompt == "<system>Be brief.\n<user>Say <b>hello</b>\n<assistant>"
        visit.ask("And again")
        visit.until("document.querySelectorAll('.facts').length === 2")
        assert engine.reply in engine.calls[1].prompt  # the conversation continues
        visit.page.click("#fresh")
        visit.ask("Anew")
        visit.wait_for(".message.assistant .facts")
        assert engine.reply not in engine.calls[2].prompt
        assert not visit.errors and all(request.startswith(url) for request in visit.requests)
        visit.context.close()


@pytest.mark.parametrize("how", ["button", "key"])
def test_stop_ends_the_request(browser: object, engine: FakeEngine, how: str) -> None:
    engine.hang_after = 5
    with serving(engine) as url:
        visit = ready(browser, url)
        visit.ask("hi")
        visit.until("document.querySelector('.assistant .text')?.textContent === 'Hello'")
        if how == "button":
            visit.page.click("#stop")
        else:
            visit.page.keyboard.press("Escape")
        engine.wait_until(lambda: not engine.running)
        visit.wait_for(".message.assistant .facts")
        assert "stopped by you" in visit.text(".facts") and visit.page.is_visible("#send")
        visit.context.close()


def test_a_failure_is_shown(browser: object, engine: FakeEngine) -> None:
    engine.fail_after = 3
    with serving(engine) as url:
        visit = ready(browser, url)
        visit.ask("hi")
        visit.wait_for(".message.assistant .error")
        assert "logits are not finite" in visit.text(".message.assistant .error")
        visit.context.close()


def test_a_model_without_a_template_completes(browser: object, engine: FakeEngine) -> None:
    engine.chat_template = None
    with serving(engine) as url:
        visit = ready(browser, url)
        visit.ask("Once upon")
        visit.wait_for(".message.assistant .facts")
        assert visit.text(".message.assistant .text") == engine.reply and engine.calls[0].prompt == "Once upon"
        visit.context.close()


def test_a_key_is_requested_and_kept_for_the_tab(browser: object, engine: FakeEngine) -> None:
    with serving(engine, api_keys=("the-right-key",)) as url:
        visit = Visit(browser, url, DESKTOP)
        visit.wait_for("#key-form:not([hidden])")
        visit.page.fill("#key", "a-wrong-key")
        visit.page.keyboard.press("Enter")
        visit.wait_for("#key-form:not([hidden])")
        visit.page.fill("#key", "the-right-key")
        visit.page.keyboard.press("Enter")
        visit.wait_for("#status[data-status=ready]")
        visit.ask("hi")
        visit.wait_for(".message.assistant .facts")
        assert visit.page.evaluate("Object.values(localStorage).join().includes('key')") is False
        visit.context.close()


def test_the_engine_view_shows_its_state(browser: object, engine: FakeEngine) -> None:
    with serving(engine) as url:
        run_steps(engine, 70)
        visit = ready(browser, url)
        visit.until("document.querySelectorAll('#steps rect').length === 240")
        assert (visit.text("#running"), visit.text("#waiting")) == ("2", "1")
        label = visit.page.get_attribute("#pool", "aria-label")
        assert "45 % of 100 blocks in use, 5 of them shared; 12 cached" in label
        visit.page.click("figure summary")
        visit.until("document.querySelectorAll('#step-rows tr').length === 20")
        assert visit.text("#step-rows tr:first-child").split() == ["70", "4", "4", "0.20", "0.50", "4.00", "0.30"]
        painted = visit.page.evaluate(
            "new Set(new Uint32Array(document.getElementById('pool').getContext('2d')"
            ".getImageData(0, 0, 300, 60).data.buffer)).size"
        )
        assert painted >= 4  # in use, cached, free, and nothing
        assert not visit.page.is_visible("#memory"), "it is not known"
        memory = MemoryUse(weights=3 << 30, kv_groups=(1 << 30,), state_slot=1 << 20)
        engine.capacity = dataclasses.replace(engine.capacity, num_state_slots=9, memory=memory)
        engine.statistics.num_live_states = 2
        visit.wait_for("#states-text:not([hidden])")
        assert "2 states in use, 0 checkpoints" in visit.text("#states-text")
        assert visit.text("#memory-rows").split("\n")[0].split("\t") == ["Weights", "3.0 GiB"]
        assert visit.text("#memory-text") == "4.0 GiB"
        visit.context.close()


def test_the_page_follows_a_server_that_loads_and_goes_away(browser: object, engine: FakeEngine) -> None:
    engine.is_ready = False
    with serving(engine) as url:
        visit = Visit(browser, url, DESKTOP)
        visit.until("document.getElementById('status').textContent === 'loading'")
        assert visit.page.is_disabled("#send")
        engine.is_ready = True
        visit.wait_for("#status[data-status=ready]")
    visit.wait_for("#status[data-status=unreachable]")
    visit.context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("device", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_the_page_is_accessible(
    browser: object, engine: FakeEngine, scheme: str, device: dict[str, object], tmp_path: Path
) -> None:
    """axe's rules (WCAG 2.2 AA), no horizontal scrolling, and no motion where users prefer none."""
    from axe_playwright_python.sync_playwright import Axe

    with serving(engine) as url:
        visit = ready(browser, url, **device, color_scheme=scheme, reduced_motion="reduce")
        run_steps(engine, 30)
        engine.hang_after = 5
        visit.page.click(".settings summary")
        visit.page.click("figure summary")
        visit.ask("hi")
        visit.wait_for("#stop:not([hidden])")
        visit.until("document.querySelectorAll('#step-rows tr').length === 20")
        cursor = "getComputedStyle(document.querySelector('.assistant .text'), '::after').animationName"
        assert visit.page.evaluate(cursor) == "none"
        found = Axe().run(visit.page, options={"runOnly": ["wcag2a", "wcag2aa", "wcag21aa", "wcag22aa"]})
        assert found.violations_count == 0, found.generate_report()
        assert visit.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        visit.page.screenshot(path=tmp_path / "page.png", full_page=True)
        visit.context.close()


def test_the_keyboard_reaches_everything_in_order(browser: object, engine: FakeEngine) -> None:
    with serving(engine) as url:
        visit = ready(browser, url)
        visit.page.evaluate("document.querySelector('.skip').focus()")
        reached = []
        for _ in range(16):
            visit.page.keyboard.press("Tab")
            reached.append(
                visit.page.evaluate("document.activeElement.id || document.activeElement.textContent.trim()")
            )
            shown = "getComputedStyle(document.activeElement.closest('.composer textarea') ? "
            shown += "document.querySelector('.composer') : document.activeElement)"
            style = visit.page.evaluate(f"[{shown}.outlineStyle, {shown}.boxShadow]")
            assert style[0] != "none" or style[1] != "none", reached[-1]
            if reached[-1] == "As a table":
                break
        named = [
            name for name in reached if name in ("theme", "log", "prompt", "fresh", "send", "Settings", "As a table")
        ]
        assert named == ["theme", "log", "prompt", "fresh", "send", "Settings", "As a table"]
        visit.context.close()


def test_a_model_is_chosen_and_loaded_by_the_first_message(browser: object) -> None:
    with running_door(model("one"), model("two"), door={"max_loaded": 1}) as door:
        visit = Visit(browser, door.url, DESKTOP)
        visit.until("document.querySelectorAll('#models option').length === 2")
        visit.wait_for("#status[data-status=unloaded]")
        visit.page.select_option("#models", "two")
        visit.ask("hi")
        visit.wait_for(".message.assistant .facts")
        assert visit.text(".message.assistant .text") == ANSWER
        assert door.states() == {"one": "unloaded", "two": "ready"}
        visit.wait_for("#status[data-status=ready]")
        visit.page.select_option("#models", "one")
        visit.wait_for("#status[data-status=unloaded]")
        assert not visit.errors and visit.page.title() == "one – tinyvllm"
        visit.context.close()
