"""Drawings of the page: points and lines stand where the numbers say, and the Pareto front is the front."""

from __future__ import annotations

import itertools
import re

import pytest
from test_report import row

from errata.report import svg
from errata.report.retention import panels
from errata.report.scatter import pareto_front, scatter


def test_scatter_points_stand_where_the_numbers_say() -> None:
    assert scatter([row()], "generated") == ""
    rows = [row("a", value=0.9), row("a", "locality_agreement", value=0.6), row("b", value=0.6), row("b", "locality_agreement", value=0.9)]
    (ax, ay), (bx, by) = [
        tuple(map(float, pair)) for pair in re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', scatter(rows, "generated"))
    ]
    assert ax > bx, "more reliable is further right"
    assert ay > by, "more local is further up"
    assert scatter(rows, "teacher_forced") == ""
    perfect = [row("a", k, value=1.0, low=1.0, high=1.0) for k in ("reliability", "locality_correct")]
    assert 'cx="388.0" cy="14.0"' in scatter(perfect, "generated")


def test_the_front_is_what_no_other_beats() -> None:
    points = [(0.0, 1.0), (0.9, 0.9), (0.8, 0.9), (1.0, 0.5), (0.9, 0.4), (0.9, 0.9)]
    assert pareto_front(points) == [0, 1, 5, 3], "equal points are both on it"
    rows = [row(f"m{i}", k, value=v) for i, p in enumerate(points) for k, v in zip(("reliability", "locality_agreement"), p, strict=True)]
    drawn = scatter(rows, "generated")
    assert "the Pareto front (m0, m1, m5, m3)" in drawn and drawn.count('class="front"') == 1 and drawn.count("<circle") == 6


def test_numbers_beside_lines_do_not_cover_each_other() -> None:
    area = svg.Axes(400, 260)
    _, top, _, bottom = area.box
    for heights in ([100.0] * 10, [bottom] * 10, [top, top, bottom], [50.0]):
        at = [float(y) - 4 for y in re.findall(r'<text x="[\d.]+" y="([\d.]+)"', "".join(svg.stacked(heights, range(len(heights)), area)))]
        assert len(at) == len(heights) and all(b - a >= svg.STEP - 0.11 for a, b in itertools.pairwise(at))
        assert at[0] >= top - 0.1 and at[-1] <= bottom + 0.1


def test_retention_panels_have_a_point_a_mark_and_a_panel_a_metric() -> None:
    rows = [
        row(m, k, T=t, value=v - less)
        for m in ("a", "b")
        for k, less in (("reliability", 0.0), ("generality", 0.1), ("locality_correct", 0.1))
        for t, v in ((1, 0.9), (10, 0.7), (100, 0.6))
    ]
    found = panels([*rows, row("a", "alias", T=1), row("a", "reliability", "teacher_forced", T=1)], "generated")
    assert len(found) == 2, "one T is no curve, protocols are apart, and equal metrics are one"
    assert "generality = locality (true), Generated" in found[1]
    assert found[0].count("<circle") == 6 and "a T 1 0.900, T 10 0.700, T 100 0.600; b T 1" in found[0]
    xs = [float(x) for x in re.findall(r'<circle cx="([\d.]+)"', found[0])][:3]
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=0.11), "T is logarithmic"
