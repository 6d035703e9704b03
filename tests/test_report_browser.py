"""The report's page in a real browser: it asks the network for nothing, sorts, shows what was said, and fits every screen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from browser import NARROW, WIDE, View
from reports import RUN, SCORED, SINGLE, report

Opener = Callable[..., View]
TABLET, VERY_WIDE = (760, 1000), (2560, 1200)


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("report") / "report.html"
    assert report(RUN, SCORED, SINGLE, "--out", out) == 0
    return out.as_uri()


@pytest.fixture(scope="module")
def shorter(tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("report") / "report.html"
    assert report(SINGLE, "--cases", 1, "--out", out) == 0
    return out.as_uri()


def column(table: Any, number: int) -> list[float]:
    """Numbers of a column from the top, without the row of the unedited model."""
    return table.locator("tbody tr:not(.first)").evaluate_all("(rows, n) => rows.map(r => parseFloat(r.cells[n].textContent))", number)


def test_it_asks_for_nothing_and_complains_of_nothing(address: str, view: Opener) -> None:
    opened = view(address)
    opened.page.wait_for_load_state("networkidle")
    assert opened.asked == [address]
    assert opened.complaints == []
    opened.page.evaluate("fetch('http://127.0.0.1:9/').catch(() => 0)")
    assert any("Content Security Policy" in c for c in opened.complaints), "its policy forbids asking, and a complaint would be seen"


def test_tables_sort_on_click_and_by_keyboard(address: str, view: Opener) -> None:
    opened = view(address)
    table = opened.page.locator("table.scores").first
    heads = table.locator("thead th")
    before = column(table, 2)
    assert len(set(before)) > 1, "a column in which sorting shows"
    button = heads.nth(2).get_by_role("button")
    button.click()
    assert heads.nth(2).get_attribute("aria-sort") == "descending"
    assert column(table, 2) == sorted(before, reverse=True)
    assert table.locator("tbody tr").first.get_attribute("class") == "first", "the unedited model stays above"
    button.press("Enter")
    assert heads.nth(2).get_attribute("aria-sort") == "ascending"
    assert column(table, 2) == sorted(before)
    opened.page.keyboard.press("Tab")
    opened.page.keyboard.press("Space")
    assert heads.nth(3).get_attribute("aria-sort") == "descending" and heads.nth(2).get_attribute("aria-sort") is None


def test_the_case_browser_shows_before_and_after_of_a_case(address: str, view: Opener) -> None:
    opened = view(address)
    cases = opened.page.locator("[data-cases='0']")
    assert cases.locator("details.case").count() == 3
    chosen = cases.locator("details.case").nth(1)
    prompt = chosen.locator("summary > span").first.inner_text()
    chosen.locator("summary").press("Enter")
    rewrite = chosen.locator("tbody tr").first
    assert rewrite.locator("td.question").inner_text() == prompt
    wanted, before, *after = rewrite.locator("td:not(.kind):not(.question)").all_inner_texts()
    assert wanted == chosen.locator("summary .new").inner_text() and before and before != wanted
    marks = rewrite.locator("td:not(.kind):not(.question)").evaluate_all("cells => cells.slice(2).map(c => c.className)")
    names = chosen.locator("thead th").all_inner_texts()
    assert len(after) == len(marks) == len(names) - 4 >= 4
    for text, mark in zip(after, marks, strict=True):
        assert (wanted in text.splitlines()[0]) == (mark == "yes"), (text, mark)
    assert {"yes", "no"} <= set(marks), "one method holds the edit, and the unedited model does not"

    cases.get_by_label("Search prompts and answers").fill(prompt)
    cases.get_by_text("1 of 3 cases").wait_for()
    assert cases.locator("details.case summary > span").first.inner_text() == prompt
    cases.get_by_label("Search prompts and answers").fill("no such words")
    cases.get_by_text("0 of 3 cases").wait_for()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_can_be_read(shorter: str, view: Opener, scheme: str) -> None:
    opened = view(shorter, scheme=scheme)
    back = opened.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert back == {"light": "rgb(255, 255, 255)", "dark": "rgb(13, 17, 23)"}[scheme]
    assert opened.faults("color-contrast" if scheme == "dark" else "") == []


@pytest.mark.parametrize("size", [NARROW, TABLET, WIDE, VERY_WIDE], ids=["narrow", "tablet", "wide", "very wide"])
def test_it_fits(address: str, view: Opener, size: tuple[int, int]) -> None:
    opened = view(address, size=size)
    opened.page.get_by_label("Asked").first.select_option(label="both")  # the most columns
    opened.page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    assert opened.overflow() == []
    opened.picture(f"report-{size[0]}.png")
    assert opened.complaints == []
