"""The report in headless Chromium, as a reader opens it: a committed example, and one with every kind of trouble."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from layerif.report import write_report
from tests.records import failure, record, with_before, written

EXAMPLES = sorted((Path(__file__).parents[2] / "experiments").glob("*/report.html"))
QUIET = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=program, args=list(QUIET))
        yield chromium
        chromium.close()


@pytest.fixture
def difficult(tmp_path) -> Path:
    """A sweep with long names, many arms, failures, holes and foreign files."""
    settings = {"method.target": "a_name_without_any_place_to_break_it_" * 3}
    runs = [record(f"estimator{n}", [True] * (n + seed) + [False] * 9, seed=seed) for n in range(6) for seed in (0, 1)]
    runs.append(record("datainf", [True] * 9, settings=settings, notes=["a_warning_without_a_place_to_break_it" * 5]))
    with_before(runs[0], [False] * 9)
    for one in runs:
        one.routing = {"block.1": {"load": [0.9, 0.1, 0.0], "entropy": 0.4}}
    written(tmp_path, [*runs, failure("datainf", seed=1, error="out of memory, " * 20, settings=settings)])
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "record.json").write_text('{"name": "x", "se')
    write_report(tmp_path, Console(quiet=True))
    return tmp_path / "report.html"


def opened(browser: Any, file: Path, said: list[str], width: int = 1200) -> Any:
    """The page; `said` collects its complaints and its requests."""
    page = browser.new_page(viewport={"width": width, "height": 800})
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: said.append(request.url) if not request.url.startswith("data:") else None)
    page.goto(file.as_uri())
    return page


def check(browser: Any, file: Path) -> None:
    said: list[str] = []
    page = opened(browser, file, said)
    assert said == [file.as_uri()]  # no complaint, no request but the page itself
    assert page.title().endswith("layerif report")
    assert page.locator("h1").count() == 1
    assert page.locator("h2").count() == page.locator("nav a").count() > 3
    assert page.locator("h2").first.inner_text().startswith(("What was found", "Results"))  # Results: before 0.2.0
    assert page.evaluate("[...document.images].every(image => image.naturalWidth > 0 && image.alt)")
    assert page.evaluate("[...document.querySelectorAll('table')].every(table => table.caption.innerText)")
    for width in (375, 768, 1200):
        page.set_viewport_size({"width": width, "height": 800})
        scroll, client = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
        assert scroll <= client, f"{scroll} pixels at {width}"
    assert page.pdf(prefer_css_page_size=True).startswith(b"%PDF")
    page.emulate_media(media="print")
    page.set_viewport_size({"width": 690, "height": 1000})  # 182 mm, the width of A4 between its margins
    over = "[...document.querySelectorAll('table, img')].filter(e => e.getBoundingClientRect().right > 700).length"
    assert page.evaluate(over) == 0
    page.close()


def test_there_is_an_example():
    assert EXAMPLES
    assert all(file.stat().st_size < 500_000 for file in EXAMPLES)


@pytest.mark.slow
@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.parent.name)
def test_the_committed_example_opens(browser, file):
    check(browser, file)


def test_a_report_of_everything_that_can_go_wrong_opens_and_no_table_is_cut(browser, difficult):
    check(browser, difficult)
    page, cut = opened(browser, difficult, []), "box => box.scrollWidth > box.clientWidth + 1"
    for width in (1280, 390):
        page.set_viewport_size({"width": width, "height": 800})
        tables = "[...document.querySelectorAll('.scroll:has(table)')]"
        assert page.evaluate(f"{tables}.filter({cut}).map(box => box.ariaLabel)") == []
    page.close()
