"""The report in a real browser: light, dark and printed, with prompts full of HTML and no requests to elsewhere."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browsers import CONTRAST, chromium, needs_chromium
from made_report import HOSTILE, write_job

from moray.batch.report import write_report
from moray.batch.report.words import escape_invisible

pytestmark = needs_chromium
SIZES = {"32x16": (32, 16), "4x8": (4, 8), "8x64": (8, 64)}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("reports")
    for name, size in SIZES.items():
        write_job(folder / name, f"<script>document.title = 'owned'</script> {name}", *size)
    return {name: Path(write_report(str(folder / name))) for name in SIZES}


@pytest.fixture
def show(browser: Any) -> Iterator[Any]:
    """Open a report. Any error in the console, and any request to elsewhere, fails the test."""
    contexts: list[Any] = []
    complaints: list[str] = []

    def open_report(path: Path, **options: Any) -> Any:
        contexts.append(browser.new_context(viewport={"width": 1020, "height": 800}, **options))
        page = contexts[-1].new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: complaints.append(dialog.message))
        page.on("request", lambda request: complaints.append(request.url) if request.url != path.as_uri() else None)
        page.goto(path.as_uri())
        return page

    yield open_report
    for context in contexts:
        context.close()
    assert [text for text in complaints if not text.startswith("data:,")] == []


@pytest.mark.parametrize("name", SIZES)
def test_it_is_readable(show: Any, reports: dict[str, Path], name: str) -> None:
    page = show(reports[name])
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        for ink in ("--text", "--faint", "--accent", "--bad", "--good", "--second"):
            assert page.evaluate(CONTRAST, [ink, "--panel"]) >= 4.5, f"{ink} in {scheme}"
        for level in range(9):
            assert page.evaluate(CONTRAST, [f"--on{level}", f"--heat{level}"]) >= 4.5, f"level {level} in {scheme}"
    for width in (1020, 380):
        page.set_viewport_size({"width": width, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") <= width, "nothing sticks out"
        assert page.evaluate(OVERLAPS) == []
        if folder := os.environ.get("MORAY_SCREENSHOTS"):
            page.screenshot(path=f"{folder}/report-{name}-{width}.png", full_page=True)


def test_what_rows_hold_does_nothing_and_shows_as_text(show: Any, reports: dict[str, Path]) -> None:
    page = show(reports["4x8"])
    assert page.title() == "<script>document.title = 'owned'</script> 4x8: SUCCEEDED"
    assert page.locator("script, img, iframe, object, link:not([rel=icon]), [onerror]").count() == 0
    assert page.locator("style").count() == 1
    said = page.locator("#errors .said").all_inner_texts()
    for text in HOSTILE[:3]:
        assert said.count(text) == 2, "as the message and as the prompt"
    assert escape_invisible(HOSTILE[3], 240) in said


def test_it_says_in_words_what_its_pictures_show(show: Any, reports: dict[str, Path]) -> None:
    page = show(reports["32x16"])
    pictures = page.locator("svg[role=img]")
    assert pictures.count() == 4 + 3 + 1 + 1
    for picture in pictures.all():
        assert picture.locator("> title").text_content() and picture.locator("> desc").text_content()
    cells = page.locator("#experts svg rect")
    assert cells.count() == 32 * 16
    assert cells.first.locator("title").text_content().startswith("layer 0, expert 0: ")
    assert page.locator("#workers .death").count() == 1 + 2


def test_on_paper_it_is_light(show: Any, reports: dict[str, Path]) -> None:
    page = show(reports["4x8"], color_scheme="dark")
    assert page.evaluate(CONTRAST, ["--panel", "--text"]) > 10
    dark = page.evaluate(GROUND)
    page.emulate_media(media="print")
    assert page.evaluate(GROUND) == "#ffffff" != dark
    assert len(page.pdf()) > 10_000


GROUND = "getComputedStyle(document.documentElement).getPropertyValue('--panel').trim()"

# Texts of one picture that lie over each other.
OVERLAPS = """() => {
  const found = [];
  for (const picture of document.querySelectorAll("svg[role=img]")) {
    const texts = [...picture.querySelectorAll("text")].map((text) => [text.textContent, text.getBoundingClientRect()]);
    texts.forEach(([a, one], i) => texts.slice(i + 1).forEach(([b, other]) => {
      if (one.left < other.right - 1 && other.left < one.right - 1 &&
          one.top < other.bottom - 4 && other.top < one.bottom - 4) found.push([a, b]);
    }));
  }
  return found;
}"""
