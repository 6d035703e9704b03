"""Published figures: every row is what the specification prints, and what contradicts itself is named as a misprint."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from errata import published
from errata.errors import UnknownNameError

SPEC = Path(__file__).resolve().parents[2] / "shared" / "spec" / "methods.md"
NAMES = ["baft-batched", "baft-fig1", "baft-fig2", "baft-table1", "baft-table2", "baft-table4", "baft-table8", "rep-main"]


def test_there_are_the_named_tables() -> None:
    assert published.names() == NAMES
    with pytest.raises(UnknownNameError, match="did you mean 'baft-table2'"):
        published.get("baft-tabel2")


@pytest.mark.parametrize("name", NAMES)
def test_tables_say_where_they_are_from_and_hold_shares(name: str) -> None:
    table = published.get(name)
    assert table.paper and table.where and table.read and table.protocol["scenario"] in ("single", "batched", "continual")
    assert table.rows or table.remarks
    seen = set()
    for row in table.rows:
        key = tuple(row.get(k) for k in ("model", "method", "part", "T", "batch"))
        assert key not in seen
        seen.add(key)
        assert all(0 <= row[c] <= 1 for c in table.columns if c in row)


@pytest.mark.parametrize("name", ["baft-table1", "baft-table2", "baft-table4", "baft-batched"])
def test_averages_are_means_but_for_the_named_misprints(name: str) -> None:
    """A printed average of rounded figures lies within .01 of their mean; where it lies farther off, the row is listed."""
    table, odd = published.get(name), []
    for row in table.rows:
        if "average" in row:
            parts = [row[c] for c in table.columns if c in row and c != "average"]
            mean = sum(parts) / len(parts)
            if abs(mean - row["average"]) > 0.0151:
                odd.append((row["model"], row["method"], row["part"], row.get("T"), row["average"], round(mean, 2)))
                assert table.misprint(row, "average")["mean"] == pytest.approx(mean, abs=0.006)
            else:
                assert table.misprint(row, "average") is None
    assert sorted(odd) == sorted((m["model"], m["method"], m["part"], m.get("T"), m["printed"], m["mean"]) for m in table.misprints)


def test_figures_known_by_heart() -> None:
    """Rows of the paper, typed here a second time."""
    at = {(r["model"], r["method"], r["T"]): r for r in published.get("baft-table2").rows}
    assert len(at) == (10 + 9 + 8) * 4
    four = lambda r: [r[k] for k in ("reliability", "generality", "locality", "average")]  # noqa: E731
    assert four(at["LLaMA-2-7b", "baft", 1000]) == [0.63, 0.60, 0.98, 0.74]
    assert four(at["LLaMA-3-8b-Instruct", "grace", 10]) == [0.33, 0.02, 0.56, 0.30]
    assert four(at["Gemma-1.1-7b-it", "reft", 100]) == [0.66, 0.58, 0.69, 0.64]
    (row,) = [
        r for r in published.get("baft-batched").rows if (r["model"], r["method"], r["batch"], r["T"]) == ("LLaMA-2-7b", "baft", 50, 20)
    ]
    assert four(row) == [0.62, 0.57, 0.92, 0.70]
    assert [r["accuracy"] for r in published.get("baft-table8").rows if r["method"] in ("none", "adalora")] == [0.77, 0.48]
    assert {r["method"]: r["scrambled"] for r in published.get("rep-main").rows} == {"rome": 0.13, "memit": 0.30}


@pytest.mark.skipif(not SPEC.exists(), reason="the specification lies beside the repository, not in it")
@pytest.mark.parametrize(
    ("name", "heading", "tables"), [("baft-table1", "Table 1", 1), ("baft-table2", "Table 2", 1), ("baft-batched", "Table 6", 1)]
)
def test_tables_agree_with_the_specification(name: str, heading: str, tables: int) -> None:
    """All figures of a table, in reading order; a dash is no figure and a lone 0 stands for four."""
    text = SPEC.read_text(encoding="utf-8")
    lines = text[text.index(f"**{heading}") :].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|"))
    printed: list[float] = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        for cell in line.strip().strip("|").split("|")[2:]:
            figures = [float(f) for f in re.findall(r"\d*\.?\d+", cell)]
            printed += figures * 4 if cell.strip() == "0" else figures
    table = published.get(name)
    assert [row[c] for row in table.rows for c in table.columns if c in row] == printed


def test_a_model_is_found_by_its_name() -> None:
    table = published.get("baft-table2")
    assert table.nearest("meta-llama/Llama-2-7b-hf") == ("LLaMA-2-7b", True)
    assert table.nearest("google/gemma-1.1-7b-it") == ("Gemma-1.1-7b-it", True)
    assert table.nearest("tiny_llama_3") == ("LLaMA-3-8b-Instruct", False)
    assert table.nearest("almanac") == ("LLaMA-2-7b", False)
    assert published.get("baft-table1").nearest("Llama-2-7b-chat-hf") == ("LLaMA-2-7b-chat", True)
    assert published.get("baft-table1").nearest("Llama-2-7b-hf") == ("LLaMA-2-7b-chat", False)
    assert table.nearest("Llama-2-7b-chat-hf") == ("LLaMA-2-7b", False) and not table.nearest("Llama-3.1-8B-Instruct")[1]
    assert published.get("baft-fig1").nearest("almanac") == (None, False)
