"""The page at /, in a real browser that can reach nothing but the endpoint."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browsers import CONTRAST, chromium, needs_chromium
from served import Served, served

pytestmark = needs_chromium


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def page(browser: Any, local: Served) -> Iterator[Any]:
    """The page, loaded. Anything it complains of, and anything it wants from elsewhere, fails the test."""
    context = browser.new_context()
    page = context.new_page()
    page.set_default_timeout(20_000)
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: request.url.startswith(local.url) or complaints.append(request.url))
    page.goto(local.url)
    page.wait_for_function("document.getElementById('model').textContent.includes('tiny-phimoe')")
    yield page
    context.close()
    assert complaints == []


def ask(page: Any, text: str) -> None:
    page.fill("#input", text)
    page.click("#send")
    page.wait_for_function("document.getElementById('figures').textContent.includes('first after')")


def test_a_chat_of_two_turns(page: Any) -> None:
    ask(page, "Add 86 and 16.")
    assert page.inner_text("#answer").split("\n") == ["user", "Add 86 and 16.", "assistant", "102"]
    assert page.input_value("#input") == ""
    with page.expect_request("**/v1/chat/completions") as sent:
        ask(page, "Add 40 and 17.")
    messages = sent.value.post_data_json["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant", "user"]
    assert messages[1]["content"] == "102"
    assert page.inner_text("#answer").split("\n")[4:6] == ["user", "Add 40 and 17."]


def test_a_completion_with_settings(page: Any) -> None:
    page.select_option("#mode", "completion")
    page.fill("#max_tokens", "2")
    ask(page, "The sum of 86 and 16 is")
    assert page.inner_text("#answer") == "The sum of 86 and 16 is 1"
    page.fill("#max_tokens", "60")
    page.fill("#temperature", "3")
    page.fill("#seed", "5")
    page.fill("#stop_string", "e")
    with page.expect_request("**/v1/completions") as sent:
        ask(page, "In")
    wanted = {"max_tokens": 60, "temperature": 3, "top_p": 1, "seed": 5, "stop": "e", "prompt": "In"}
    assert wanted.items() <= sent.value.post_data_json.items()


# In the page, since the answer may be whole before a process outside of it has looked twice: note how long the text is
# whenever it grows, and press Stop when that was five times.
STOP_SOON = """() => {
  const [answer, send, stop] = ["answer", "send", "stop"].map((id) => document.getElementById(id));
  window.seen = [];
  new MutationObserver(() => {
    seen.push([answer.textContent.length, send.disabled]);
    if (seen.filter(([length]) => length > 0).length === 5) stop.click();
  }).observe(answer, { childList: true, characterData: true, subtree: true });
}"""


def test_text_comes_while_it_is_made_and_can_be_stopped(page: Any, local: Served) -> None:
    page.select_option("#mode", "completion")
    page.fill("#max_tokens", "1900")
    page.fill("#temperature", "10")
    page.fill("#seed", "1")
    page.fill("#input", "The")
    page.evaluate(STOP_SOON)
    page.click("#send")
    page.wait_for_function("document.getElementById('figures').textContent === 'stopped'")
    seen = page.evaluate("seen")
    lengths = [length for length, is_sending in seen if length > 0 and is_sending][:5]
    assert len(lengths) == 5 and lengths == sorted(set(lengths)), seen
    assert page.is_enabled("#send")
    while local.endpoint.engine.num_seqs > 0:
        page.wait_for_timeout(20)
    assert "stopped" in page.inner_text("#figures")


def test_what_is_refused_is_shown(browser: Any, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("secret\n")
    with served(keys_file=str(keys)) as local:
        page = browser.new_page()
        page.goto(local.url)
        page.wait_for_function("document.getElementById('error').textContent.startsWith('send a key')")
        page.fill("#key", "secret")
        page.fill("#input", "Add 86 and 16.")
        page.fill("#max_tokens", "5000")
        page.click("#send")
        page.wait_for_function("document.getElementById('error').textContent.startsWith('needs 5,0')")
        page.fill("#max_tokens", "50")
        ask(page, "Add 86 and 16.")
        assert page.inner_text("#answer").endswith("102") and page.inner_text("#error") == ""
        page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_readable(browser: Any, local: Served, scheme: str) -> None:
    """Contrast of text to ground is at least 4.5 : 1 (WCAG 2 AA), wide and narrow; nothing sticks out of the window."""
    for width in (1200, 380):
        page = browser.new_page(color_scheme=scheme, viewport={"width": width, "height": 800})
        for path in ("", "/docs"):
            page.goto(local.url + path)
            page.wait_for_load_state("networkidle")
            if path == "":
                ask(page, "Add 86 and 16.")
            for name in ("--text", "--faint", "--accent"):
                assert page.evaluate(CONTRAST, [name, "--panel"]) >= 4.5, f"{name} in {scheme}"
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            if folder := os.environ.get("MORAY_SCREENSHOTS"):
                page.screenshot(path=f"{folder}/{scheme}-{width}{path.replace('/', '-')}.png", full_page=True)
        page.close()


def test_the_docs_list_every_path(browser: Any, local: Served) -> None:
    page = browser.new_page()
    page.goto(f"{local.url}/docs")
    page.wait_for_selector("details")
    paths = page.locator("summary code").all_inner_texts()
    assert {"/v1/completions", "/v1/chat/completions", "/score", "/metrics"} <= set(paths)
    page.click("summary:has-text('/v1/completions')")
    assert "max_tokens" in page.locator("details[open]").inner_text()
    page.close()
