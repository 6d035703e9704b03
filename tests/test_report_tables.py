"""What is shown of summary rows: equal metrics once, and the headline first."""

from __future__ import annotations

from typing import Any

from errata.report import contents, tables


def row(method: str = "baft", metric: str = "reliability", protocol: str = "generated", value: float = 0.9, **more: Any) -> dict[str, Any]:
    base = {"method": method, "metric": metric, "protocol": protocol, "value": value, "low": value - 0.05, "high": value + 0.05}
    return {**base, "n_cases": 30, "n_probes": 90, "before": 0.125, "version": 1, **more}


def test_metrics_that_are_equal_everywhere_are_one_column_with_both_names() -> None:
    """By hand: true and true, known agree for both methods; reliability agrees with them in one method only."""
    same = [row(m, k, value=v) for m, v in (("a", 0.5), ("b", 0.6)) for k in ("locality_correct", "locality_correct_known")]
    other = [row("a", "reliability", value=0.5), row("b", "reliability", value=0.7)]
    headings, lines = tables.grid([*same, *other], "generated")
    assert headings == ["method", "reliability", "locality (true) = locality (true, known)"]
    assert lines[1:] == [["a", "50.0 [45.0, 55.0]", "50.0 [45.0, 55.0]"], ["b", "70.0 [65.0, 75.0]", "60.0 [55.0, 65.0]"]]
    assert tables.counts(same, "generated") == "locality (true) = locality (true, known) 30 cases, 90 probes"
    fewer = [*same[:-1], {**same[-1], "n_probes": 80}]
    assert len(tables.grid(fewer, "generated")[0]) == 3, "over other probes they are two numbers"
    (after,) = contents.after([{**r, "T": t} for r in same for t in (1, 3)], same)
    assert [line[:2] for line in after.lines] == [["locality (true) = locality (true, known)", m] for m in ("a", "b")]
    assert contents.differences([{**r, "minus": "c"} for r in same])[0].headings[1:] == ["locality (true) = locality (true, known)"]


def test_the_headline_is_what_a_text_begins_with_where_that_was_measured() -> None:
    assert tables.headline([row(), row(protocol="starts")]) == "starts"
    assert tables.headline([row(), row(protocol="teacher_forced")]) == "generated"
    assert tables.protocols([row(protocol=p) for p in reversed(tables.PROTOCOLS)])[:4] == [
        "starts",
        "generated",
        "contains",
        "teacher_forced",
    ]
