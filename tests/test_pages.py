"""Every code block of the documentation runs; what cannot is marked with its reason, counted here."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from pages import PAGES, PLAIN, REASONS, RUN, blocks, run

ELSEWHERE = "docs/methods/"  # run by tests/test_docs.py, which looks at what they leave behind
WITH_CODE = [
    page for page in PAGES if not page.startswith(ELSEWHERE) and any(b.language in RUN and not b.told("not") for b in blocks(page))
]
SMALL = [page for page in PAGES if any(b.told("small") for b in blocks(page))]
# Blocks that are not run, by page.  A new one is a decision: change this number with it.
NOT_RUN = {
    "README.md": 2,
    "docs/benchmarks.md": 1,
    "docs/engines.md": 6,
    "docs/families.md": 1,
    "docs/gates.md": 2,
    "docs/index.md": 1,
    "docs/models.md": 4,
    "docs/page.md": 1,
    "docs/robustness.md": 2,
    "docs/runs.md": 2,
    "docs/serving.md": 3,
    "docs/tune.md": 1,
}


@pytest.mark.parametrize("page", WITH_CODE)
def test_every_block_runs(page: str, roomy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))  # a page may write a module of its own
    run(page, roomy)


@pytest.mark.slow
@pytest.mark.parametrize("page", SMALL)
def test_as_printed(page: str, roomy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same with the sizes that the page has."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    run(page, roomy, small=False)


def test_every_block_says_what_it_is() -> None:
    for page in PAGES:
        for block in blocks(page):
            assert block.language in (*RUN, *PLAIN), f"{block.where}: name the block's language, one of {', '.join((*RUN, *PLAIN))}"
            assert (page, "```") not in {(page, line) for line in block.text.splitlines()}


def test_what_is_not_run_is_marked_and_counted() -> None:
    found: Counter[str] = Counter()
    for page in PAGES:
        for block in blocks(page):
            for reason in block.told("not"):
                assert reason.startswith(REASONS), f"{block.where}: {reason!r} is no reason that is known: {REASONS}"
                assert block.language in RUN, f"{block.where}: a {block.language} block is not run anyway"
                found[page] += 1
    assert dict(found) == NOT_RUN


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("```sh\nerrata methods --nonsense\n```", "ended with 2, not 0"),
        ("```sh\nls\n```", "is no errata command"),
        ("```console\n$ errata benchmarks\nnothing of the kind\n```", "did not print 'nothing of the kind'"),
        ("```console\n$ errata benchmarks\nerrata: error: there is none\n```", "ended with 0, not 2"),
        ("```python\nprint('Paris')  # Lyon\n```", "'Lyon' was not printed"),
        ("```python\nx = 1\n```\n\n```python\nassert x == 2\n```", "AssertionError"),
        ("<!-- run: replace MODEL => model -->\n```sh\nerrata methods\n```", "is to be replaced and is not there"),
    ],
)
def test_a_wrong_block_fails(text: str, message: str, tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests above can fail."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AssertionError, match=message):
        run("made.md", tiny, only=blocks("made.md", text))


def test_orders_are_read_in_front_of_a_block_and_for_the_rest_of_a_page() -> None:
    text = "<!-- run all: needs facts -->\n<!-- run: not, needs an endpoint -->\n\n```sh\na\n```\nwords\n```python\nb\n```\n"
    first, second = blocks("made.md", text)
    assert (first.told("needs"), first.told("not")) == (["facts"], ["needs an endpoint"])
    assert (second.told("needs"), second.told("not")) == (["facts"], [])
    assert (first.line, second.line) == (4, 8)
