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


def test_a_changed_default_or_figure_makes_pages_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    real = docs_results.measured

    def other(source: docs_results.Source) -> object:
        found = real(source)
        if source.file != "editors/single-grace.json" or found is None:
            return found
        rows = [{**r, "value": 0.5} if r["metric"] == "reliability" else r for r in found["rows"]]
        return {**found, "rows": rows}

    for module in (docs_methods, docs_choice):
        monkeypatch.setattr(module, "measured", other)
    assert set(make_docs.stale()) == {"methods/grace.md", "choose.md"}
    assert "GRACE" not in docs_choice.decisions().splitlines()[2]  # it is no longer sure


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
    """One by hand: the page, the table and the file agree."""
    found = docs_results.measured(docs_results.single("rome"))
    assert found is not None
    (row,) = [r for r in found["rows"] if r["metric"] == "reliability" and r["protocol"] == "generated"]
    page = (ROOT / "docs" / "methods" / "rome.md").read_text(encoding="utf-8")
    assert f"{row['value']:.3f} [{row['low']:.2f}, {row['high']:.2f}]" in page
    table = (ROOT / "docs" / "choose.md").read_text(encoding="utf-8")
    assert re.search(rf"\[ROME\]\(methods/rome.md\) \| {row['value']:.2f} \|", table)
    for source in re.findall(r"\]\((results/[\w/.-]+\.json)\)", table):
        assert (ROOT / "docs" / source).exists()


def test_harmonic_means_by_hand() -> None:
    assert docs_choice.harmonic(0.5, 1.0) == pytest.approx(2 / 3)
    assert docs_choice.harmonic(0.0, 1.0) == docs_choice.harmonic(None, 1.0) == 0.0


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
    assert len(pages) > 40 and (tmp_path / "site" / "results" / "editors" / "single-rome.json").exists()
    for page in pages:
        assert not LOADED.search(page.read_text(encoding="utf-8")), page
