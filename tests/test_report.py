"""Reports: right numbers in the right table, and a page that loads nothing and runs nothing it was given."""

from __future__ import annotations

import builtins
import html.parser
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from errata.errors import ErrataError, InputError, StorageError
from errata.report import curves, tables
from errata.report.curves import retention, sweep
from errata.report.page import page
from errata.report.tables import escape, markdown, terminal

VOID = {"meta", "input", "line", "circle"}


def row(method: str = "baft", metric: str = "reliability", protocol: str = "generated", value: float = 0.9, **more: Any) -> dict[str, Any]:
    base = {"method": method, "metric": metric, "protocol": protocol, "value": value, "low": value - 0.05, "high": value + 0.05}
    return {**base, "n_cases": 30, "n_probes": 90, "before": 0.125, "version": 1, **more}


def record(kind: str = "rewrite", method: str = "baft", case: str = "c0", **changes: Any) -> dict[str, Any]:
    base = {
        "method": method, "case": case, "kind": kind, "prompt": f"{kind} of {case}", "target": "Rome",
        "gen_before": "Paris", "gen_after": "Rome",
        "gen_match_before": False, "gen_match_after": True, "gen_agree": False,
    }  # fmt: skip
    return {**base, **changes}


ROWS = [
    row(m, k, p, v)
    for p, shift in (("teacher_forced", 0.0), ("generated", 0.2))
    for m, k, v in (
        ("baft", "locality_agreement", 0.911 - shift),
        ("baft", "reliability", 0.822 - shift),
        ("reft", "reliability", 0.733 - shift),
        ("reft", "locality_agreement", 0.644 - shift),
    )
]


def island(text: str) -> dict[str, Any]:
    """What the page's browser of cases is given."""
    (found,) = re.findall(r'<script type="application/json" id="cases-data">(.*?)</script>', text, re.S)
    return json.loads(found)


def shown(text: str, case: int = 0) -> list[tuple[str, str, str, str, list[tuple[str, str]]]]:
    """A case as the browser shows it: kind, prompt, wanted, before, and of each column the mark and the answer."""
    data = island(text)
    said = {-1: "-", -2: "–", **dict(enumerate(data["texts"]))}
    (section,) = data["sections"]
    return [
        (
            kind,
            said[prompt],
            "as before" if wanted == -1 else said[wanted],
            marks[0] + said[before],
            [*zip(marks[1:], map(said.get, answers), strict=True)],
        )
        for kind, prompt, wanted, before, marks, answers, _ in section["cases"][case][2]
    ]


class Reader(html.parser.HTMLParser):
    """Checks nesting and keeps tags with attributes, and the text outside style and script."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, (tag, self.getpos())

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.text += data

    def count(self, tag: str, **attributes: str) -> int:
        return sum(t == tag and all(a.get(k.rstrip("_")) == v for k, v in attributes.items()) for t, a in self.tags)


@pytest.mark.parametrize("write", [terminal, markdown])
def test_protocols_never_share_a_table(write: Callable[[Any], str]) -> None:
    text = write(ROWS)
    generated, forced = text.split("Teacher-forced:")
    assert "Generated:" in generated, "free text comes first"
    assert "82.2 [77.2, 87.2]" in forced
    assert "82.2" not in generated
    assert "62.2 [57.2, 67.2]" in generated
    assert "62.2" not in forced
    assert write([]) == ""


def test_a_base_model_that_goes_on_is_marked_right() -> None:
    free = {"starts_before": False, "starts_after": True, "gen_match_after": False, "answer_agree": True, "gen_after": "Rome, and so on"}
    (edit, stays) = shown(page("t", [], [record(**free), record("neighbour", target=None, **free)], {}))
    assert edit[4] == [("y", "Rome, and so on")] and stays[4] == [("y", "Rome, and so on")]


LIKELIHOOD = [row("baft", "EM", "likelihood", 0.44), row("baft", "S", "likelihood", 0.33, before=None)]
SAMPLED = [row("baft", "GE", "sampled", 6.266, before=6.2), row("baft", "RS", "sampled", 0.319)]


def test_likelihoods_and_sampled_text_have_tables_of_their_own() -> None:
    text = terminal([*SAMPLED, *LIKELIHOOD, *ROWS])
    generated, forced, likelihood, sampled = (
        text.replace("Likelihood:", "|").replace("Teacher-forced:", "|").replace("Sampled:", "|").split("|")
    )
    assert "S (harmonic mean)  EM (edited prompt)" in likelihood
    assert "33.0 [28.0, 38.0]   44.0 [39.0, 49.0]" in likelihood and "44.0" not in forced + generated + sampled
    assert "626.6 [621.6, 631.6]" in sampled and "31.9 [26.9, 36.9]" in sampled
    assert "Times 100, 95 %" in sampled and "Percent, 95 %" in likelihood
    read = Reader(page("t", [*ROWS, *LIKELIHOOD, *SAMPLED], [], {}))
    assert read.count("table", class_="scores") == 4 and read.count("svg") == 2
    assert read.text.index("Generated scores") < read.text.index("Likelihood scores") < read.text.index("NS share")
    assert "in bits (GE) and likeness to texts about the new answer (RS)." in read.text and "Times 100, 95 % intervals" in read.text


def test_curves_hold_what_is_below_zero_and_above_one(tmp_path: Path) -> None:
    assert curves._limits([row()]) == pytest.approx((-0.03, 1.03))
    assert curves._limits([row(value=-0.4), row()]) == pytest.approx((-0.48, 1.03))
    assert curves._limits([row(value=6.0)]) == pytest.approx((-0.03, 6.08))
    retention([row("m", "NM", "likelihood", -0.4, T=1), row("m", "GE", "sampled", 6.0, T=1), row("m", T=1)], tmp_path / "c.png")
    assert (tmp_path / "c.png").stat().st_size > 5000


def test_markdown_lines_hold_methods_and_metrics_in_reading_order() -> None:
    lines = [line for line in markdown(ROWS[:4]).splitlines() if line.startswith("|")]
    assert lines == [
        "| method | reliability | locality (as before) |",
        "| --- | ---: | ---: |",
        "| unedited model | 12.5 | 12.5 |",
        "| baft | 82.2 [77.2, 87.2] | 91.1 [86.1, 96.1] |",
        "| reft | 73.3 [68.3, 78.3] | 64.4 [59.4, 69.4] |",
    ]


def test_a_table_says_how_it_averages_probes_of_several_kinds() -> None:
    footer = lambda *names: tables.scores([row(metric=name) for name in names])[0].note  # noqa: E731
    assert "Portability and locality" not in footer("reliability")
    assert footer("reliability", "portability").endswith("Portability and locality of a case: the mean over all its probes.")
    both = footer("locality_agreement", "locality_agreement_by_kind")
    assert both.endswith(
        "the mean over all its probes; (mean of kinds): over its kinds of probe, of each kind's mean, as EasyEdit averages."
    )
    assert "locality (as before, mean of kinds)" in tables.markdown([row(metric="locality_agreement_by_kind")])


def test_missing_cells_counts_and_differing_before() -> None:
    text = markdown([row("a"), row("b", before=0.5, n_cases=28), row("b", "alias", before=None)])
    assert "| unedited model, cases of a | 12.5 | – |" in text
    assert "| unedited model, cases of b | 50.0 | – |" in text
    assert "| a | 90.0 [85.0, 95.0] | – |" in text
    assert "reliability 28–30 cases, 90 probes" in text


def test_markdown_cells_cannot_break_the_table() -> None:
    (line,) = (line for line in markdown([row("a|b\n<i>\\")]).splitlines() if "90.0" in line)
    assert line.startswith("| a\\|b &lt;i>\\\\ | 90.0")


def test_terminal_columns_align_with_wide_letters() -> None:
    lines = terminal([row("方法"), row("m")]).splitlines()
    (wide,) = (line for line in lines if line.startswith("方法"))
    (plain,) = (line for line in lines if line.startswith("m "))
    assert wide.index("90.0") + 2 == plain.index("90.0")


EVIL = "<script>alert('x')</script>\"><img src=http://evil.example/x.png onerror=alert(1)>"


def test_page_escapes_everything_it_was_given() -> None:
    records = [record(k, EVIL, EVIL, prompt=EVIL, target=EVIL, gen_before=EVIL, gen_after=EVIL) for k in ("rewrite", "odd" + EVIL)]
    rows = [row(EVIL, k, EVIL if k == "x" else "generated") for k in ("reliability", "locality_agreement", "x", EVIL)]
    text = page(EVIL, rows, records, {EVIL: EVIL})
    read = Reader(text)
    assert read.count("script") == text.count("<script") == 2, "the page's own, and its data"
    assert read.count("img") == 0 and "<img" not in text
    assert not [a for _, attrs in read.tags for a in attrs if a.startswith("on")]
    assert read.text.count("<script>alert('x')</script>") >= 8, "shown as text"
    assert [line[1] for line in shown(text)] == [EVIL, EVIL], "and as it is in the data"


def test_page_loads_nothing() -> None:
    text = page("t", ROWS, [record()], {"model": "almanac"})
    assert not re.search(r"https?:|//[a-z]|url\(|@import|fetch\(|XMLHttpRequest", text)
    read = Reader(text)
    assert not [(tag, a) for tag, attrs in read.tags for a in attrs if a in ("src", "srcset", "data", "action")]
    assert all(str(attrs["href"]).startswith("#") for _, attrs in read.tags if "href" in attrs), "links stay in the page"
    (policy,) = (a["content"] for tag, a in read.tags if tag == "meta" and a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'")


def test_page_fits_dark_and_narrow_screens() -> None:
    text = page("t", ROWS, [record()], {})
    assert "prefers-color-scheme: dark" in text
    assert re.search(r"@media \(max-width: \d+rem\)", text)
    assert Reader(text).count("meta", name="viewport") == 1
    used = set(re.findall(r"var\((--[\w-]+)\)", text))
    given = {"--h", "--w", "--k"}  # of a cell or a bar, by its own style
    assert used - given <= set(re.findall(r"(--[\w-]+):", text))


def test_page_shows_scores_by_protocol_and_notes() -> None:
    read = Reader(page("A run", ROWS, [], {"model": "almanac", "cases": 30}))
    generated, forced = read.text.split("Teacher-forced scores")
    assert "Generated scores" in generated
    assert "[77.2, 87.2]" in forced
    assert "[57.2, 67.2]" in generated
    assert read.count("table", class_="scores") == 2
    assert read.count("svg") == 2
    assert "almanac" in read.text
    assert read.count("script") == 1 and not [a for _, a in read.tags if "data-cases" in a], "no cases, no browser"


def test_page_groups_probes_by_case_with_a_column_a_method() -> None:
    records = [
        record(kind, method, case, gen_after=f"{method} on {kind}", gen_match_after=method == "baft")
        for method in ("baft", "reft")
        for case in ("c0", "c1")
        for kind in ("neighbour", "rewrite", "rephrase")
        if (method, case, kind) != ("reft", "c1", "rephrase")
    ]
    text = page("t", [], records, {})
    (section,) = island(text)["sections"]
    assert len(section["cases"]) == 2
    assert section["columns"] == [["baft", "after all edits"], ["reft", "after all edits"]]
    assert [line[0] for line in shown(text)] == ["rewrite", "rephrase", "neighbour"], "in reading order"
    assert shown(text)[2] == (
        *("neighbour", "neighbour of c0", "Rome", "nParis"),
        [("y", "baft on neighbour"), ("n", "reft on neighbour")],
    )
    assert shown(text, 1)[1][4] == [("y", "baft on rephrase"), (" ", "-")], "reft was not asked"
    texts = island(text)["texts"]
    assert len(texts) == len(set(texts)), "a text is there once"
    assert 'data-cases="0"' in text


def test_probe_without_a_target_is_judged_by_agreement() -> None:
    text = page("t", [], [record("neighbour", target=None, gen_match_after=False, gen_agree=True, gen_after="")], {})
    assert shown(text) == [("neighbour", "neighbour of c0", "as before", "-Paris", [("y", "")])]


def test_page_says_how_many_cases_it_leaves_out() -> None:
    (section,) = island(page("t", [], [record(case=f"c{i}") for i in range(12)], {}, max_cases=5))["sections"]
    assert (len(section["cases"]), section["left_out"]) == (5, 7)


def test_text_no_file_can_hold() -> None:
    assert escape("a\x00b\ud800c\x1b") == "a�b�c�"
    assert escape("\"'<&\n") == "&quot;&#x27;&lt;&amp;\n"
    page("t", [row("m\ud800"), row("m\ud800", "locality_agreement")], [record(gen_after="\udfff")], {}).encode("utf-8")


CURVE = [
    row(m, k, p, v, T=t, setting="rank_$r$", x=x)
    for m in ("baft", "_reft")
    for k in ("reliability", "locality_agreement")
    for p in ("teacher_forced", "generated")
    for t, x, v in ((1, 0.001, 0.9), (100, 0.1, 0.5))
]


@pytest.mark.parametrize("draw", [retention, sweep])
def test_curves_are_drawn(draw: Callable[[Any, Path], None], tmp_path: Path) -> None:
    path = tmp_path / "curve.png"
    draw(CURVE, path)
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG")
    assert len(content) > 5000


@pytest.mark.parametrize(
    ("draw", "rows", "says"),
    [
        (retention, [], "no row to draw"),
        (retention, [row()], "row 0 of the curve has no 'T'"),
        (retention, [row(T=0)], "must be at least 1"),
        (retention, [row(T=1, low=float("nan"))], "row 0 of the curve: low must be a finite number, not nan"),
        (sweep, [row(x=1, setting="a"), row(x=1, setting="b")], "shows one setting, not a, b"),
    ],
)
def test_bad_curves(draw: Callable[[Any, Path], None], rows: list[Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=says):
        draw(rows, tmp_path / "c.png")
    assert not (tmp_path / "c.png").exists()


def test_curves_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"gone.*cannot be written"):
        retention(CURVE[:1], tmp_path / "gone" / "c.png")
    with pytest.raises(InputError, match=r"c\.xyz: "):
        retention(CURVE[:1], tmp_path / "c.xyz")


def test_curves_without_matplotlib_say_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ErrataError, match=r"plots need matplotlib.*pip install matplotlib"):
        retention(CURVE, tmp_path / "c.png")
