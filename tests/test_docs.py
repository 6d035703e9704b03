"""Computed pages are up to date and say what is so; the site builds, without a broken link or a foreign host."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import docs_choice
import docs_methods
import docs_results
import make_docs
import pytest
from docs_fields import described
from pages import ROOT, blocks, run

from errata import registry
from errata.core.patch import WEIGHT_LIKE

METHODS = registry.names("method")
LOADED = re.compile(r"<(?:script|link|img|iframe|source)\b[^>]*(?:src|href)=[\"']?(https?:)?//", re.I)


def test_computed_pages_are_up_to_date() -> None:
    assert make_docs.stale() == [], "run `make docs`"


def test_a_changed_figure_makes_pages_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    real = docs_results.cells

    def other(name: str) -> tuple[docs_results.Cell, ...]:
        def changed(cell: docs_results.Cell) -> docs_results.Cell:
            if cell["method"] != "baft":
                return cell
            return {**cell, "rows": [{**r, "value": 0.5} if r["metric"] == "reliability" else r for r in cell["rows"]]}

        return tuple(map(changed, real(name)))

    monkeypatch.setattr(docs_results, "cells", other)
    assert set(make_docs.stale()) == {"methods/baft.md", "choose.md", "results/real.md"}
    assert "BaFT" not in docs_choice.decisions().splitlines()[2]  # it is no longer sure


def test_a_choice_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """The surest two by what the rule counts, not one that misses its least reliability, and no method by settings that are not its own."""

    def cell(label: str, reliability: float, kept: float) -> docs_results.Cell:
        rows = [{"metric": m, "protocol": "starts", "value": v} for m, v in (("reliability", reliability), ("locality_first_word", kept))]
        return {"model": "smollm2-135m", "method": label, "rows": rows, "patch_bytes": 1000, "seconds": {"editing": 4.0}, "edits": 2}

    found = (
        cell("rome", 0.96, 0.8),
        cell("memit", 0.95, 0.9),
        cell("baft", 0.94, 1.0),
        cell("lora published", 1.0, 1.0),
        cell("wise", 1.0, 0.7),
    )
    monkeypatch.setattr(docs_results, "cells", lambda name: found)
    first, *_ = docs_choice.CHOICES
    assert docs_choice.best("smollm2", first).count("**") == 4
    assert docs_choice.best("smollm2", first).startswith("**[MEMIT](methods/memit.md)** (kept 90%") and "ROME" in docs_choice.best(
        "smollm2", first
    )
    assert docs_choice.best("gemma", first) == "none"


@pytest.mark.parametrize("name", METHODS)
def test_every_setting_is_explained(name: str) -> None:
    method = registry.get("method", name)
    meanings, _ = described(method)
    assert [f.name for f in dataclasses.fields(method) if not meanings.get(f.name)] == []


def test_every_method_has_notes_and_a_place() -> None:
    notes = docs_methods.notes()
    assert sorted(notes) == METHODS == sorted(n for names in docs_methods.GROUPS.values() for n in names)
    assert all(all(parts) for parts in notes.values())
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert [n for n in METHODS if f" methods/{n}.md\n" not in nav] == []


@pytest.mark.parametrize("name", METHODS)
def test_the_example_of_a_method(name: str, tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs and says what it says; and what the page says of exporting is true of its patch."""
    monkeypatch.chdir(tmp_path)
    page = f"docs/methods/{name}.md"
    patch = run(page, tiny, only=[b for b in blocks(page) if b.language == "python"])["patch"]
    kinds = {op.kind for op in patch.ops}
    assert (name in docs_methods.WEIGHTS) == bool(kinds and kinds <= set(WEIGHT_LIKE))


def test_figures_are_those_of_the_files() -> None:
    """One by hand: both pages and the file agree."""
    (cell,) = [c for c in docs_results.cells("single") if (c["method"], c["model"]) == ("baft", "smollm2-135m")]
    (row,) = [r for r in cell["rows"] if (r["metric"], r["protocol"]) == ("generality", "starts")]
    want = f"| {100 * row['value']:.0f} [{100 * row['low']:.0f}, {100 * row['high']:.0f}] |"
    assert cell["n"] == 100 and want in (ROOT / "docs" / "methods" / "baft.md").read_text(encoding="utf-8")
    assert want in (ROOT / "docs" / "results" / "real.md").read_text(encoding="utf-8")


def test_the_site_builds(tmp_path: Path) -> None:
    """Strictly: a broken link, a page nobody reaches, is an error.  Nothing on a page is loaded from elsewhere."""
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    pages = sorted((tmp_path / "site").rglob("*.html"))
    assert len(pages) > 40 and (tmp_path / "site" / "results" / "real" / "single.json").exists()
    for page in pages:
        assert not LOADED.search(page.read_text(encoding="utf-8")), page
