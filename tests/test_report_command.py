"""`errata report` on real records (see `reports`): every format, hostile names, the page, parts that are missing, bad arguments."""

from __future__ import annotations

import csv
import errno
import io
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from reports import RUN, SCORED, SINGLE, cell, copy, edited, report, written
from test_import import fresh
from test_report import EVIL, Reader, island

from errata import storage
from errata.errors import InputError
from errata.report import contents, csv_export, gate_maps, layout
from errata.report.folders import read
from errata.report.sections import Section, gather
from errata.score.metrics import summarise

__all__ = ["copy"]  # a fixture

# -- every format ------------------------------------------------------------------------------------------------


def test_every_format_has_the_same_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report(RUN, SCORED, "--out", tmp_path / "all") == 0
    assert {p.name for p in (tmp_path / "all").iterdir()} == {f"report.{e}" for e in ("txt", "md", "tex", "csv", "html")}
    (section,) = gather([read(RUN), read(SCORED)])
    (row,) = (r for r in section.rows if (r["method"], r["metric"], r["protocol"]) == ("grace", "locality_agreement", "teacher_forced"))
    value, interval = f"{100 * row['value']:.1f}", f"[{100 * row['low']:.1f}, {100 * row['high']:.1f}]"
    for ending in ("txt", "md", "tex", "html"):
        text = (tmp_path / "all" / f"report.{ending}").read_text()
        between = {"tex": r"\\{\tiny ", "html": "<small>"}.get(ending, " ")
        assert f"{value}{between}{interval}" in text, ending
    lines = list(csv.DictReader(io.StringIO((tmp_path / "all" / "report.csv").read_text())))
    keys = {"what": "after all edits", "method": "grace", "metric": "locality_agreement", "protocol": "teacher_forced"}
    (line,) = (line for line in lines if all(line[k] == v for k, v in keys.items()))
    assert float(line["value"]) == row["value"] and line["fingerprint"] == "efbef8b556f82cea"
    aged = [line for line in lines if line["metric"] == "retained" and line["protocol"] == "generated" and line["method"] == "grace"]
    assert [float(line["value"]) for line in aged if line["value"]] == [
        r["retained"] for r in section.forgetting if (r["method"], r["protocol"]) == ("grace", "generated") and r["retained"] is not None
    ]
    capsys.readouterr()
    assert report(RUN, SCORED) == 0
    assert f"{value} {interval}" in capsys.readouterr().out


def test_a_table_holds_one_protocol(tmp_path: Path) -> None:
    (section,) = gather([read(RUN), read(SCORED)])
    every = contents.tables(section)
    assert {t.key for t in every} >= {"teacher_forced", "generated", "likelihood", "judged contains@1", "time", "memory", "health"}
    for table in every:
        mine = [row for row in section.rows if row["protocol"] == table.key]
        assert len({len(line) for line in (table.headings, *table.lines)}) == 1, table.title
        if table.pinned:
            assert len(table.lines) - table.pinned == len({row["method"] for row in mine})
    text = written(tmp_path, "md", RUN, SCORED, "--protocol", "generated")
    assert "Generated:" in text and "Teacher-forced:" not in text and "Likelihood" not in text


def test_differences_are_paired_from_the_records(tmp_path: Path) -> None:
    text = written(tmp_path, "md", SCORED)
    (table,) = (b for b in text.split("**Paired differences. ") if b.startswith("Teacher-forced"))
    (section,) = gather([read(SCORED)])
    at = {r["method"]: r["value"] for r in section.rows if (r["metric"], r["protocol"]) == ("reliability", "teacher_forced")}
    assert f"| baft − none | {100 * (at['baft'] - at['none']):+.1f} [" in table
    three = written(tmp_path, "txt", RUN, SCORED, "--against", "baft")
    assert "rome − baft" in three and "rome − none" not in three and "grace − rome" not in three


def test_what_comes_after_t_edits_and_what_it_cost(tmp_path: Path) -> None:
    text = written(tmp_path, "md", RUN)
    assert "| metric | method | right after | T = 1 | T = 3 |" in text
    assert "**Forgetting by age. Generated: the model's own text equals the answer**" in text
    assert re.search(r"\| rome \| the stack \| \d+ \| [\d.]+ \| \d+ \|", text)
    cost = json.loads((cell(RUN, "rome") / "cost.json").read_text())["seconds"]
    (line,) = (line for line in text.split("**Time**")[1].split("**Size")[0].splitlines() if line.startswith("| rome"))
    assert f"| {cost['editing']:.2f} | {cost['scoring']:.2f} |" in line
    assert "**What the guard saw**" in text


def test_latex_is_booktabs_and_balanced(tmp_path: Path) -> None:
    text = written(tmp_path, "tex", RUN, SCORED)
    for rule in ("toprule", "midrule", "bottomrule", r"begin{tabular}", r"end{tabular}", r"begin{table}", r"end{table}"):
        assert text.count("\\" + rule) == text.count(r"\toprule")
    for body in re.findall(r"\\begin\{tabular\}\{([lr]+)\}(.*?)\\end\{tabular\}", text, re.S):
        lines = [line for line in body[1].splitlines() if line.endswith(r"\\")]
        assert {len(re.findall(r"(?<!\\)&", line)) + 1 for line in lines} == {len(body[0])}
    assert not re.search(r"(?<![\\\w])[%#_]", re.sub(r"^%.*$", "", text, flags=re.M)), "specials are escaped"


# -- hostile text ------------------------------------------------------------------------------------------------

NAMES = ["=cmd()", "+1", "@x", "a|b\n<i>", r"\input{/etc/passwd}", "50 % & #1_x ~^{}$", EVIL, "\x1b[2Jgone\x07"]


@pytest.fixture
def hostile(copy: Callable[[Path], Path]) -> Path:
    """A folder whose methods have such names and whose records hold such texts."""
    out = copy(SINGLE)
    lines = [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]
    mine = [r for r in lines if r["method"] == "none"]
    records = [{**r, "method": name, "prompt": name + r["prompt"], "gen_after": name} for name in NAMES for r in mine]
    (out / "records.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    edited(out / "summary.json", lambda d: d.update(summary=summarise(records), model=EVIL, retention=[], right_after=[]))
    return out


def test_hostile_names_stay_text_in_every_format(hostile: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fields = [f for line in csv.reader(io.StringIO(written(tmp_path, "csv", hostile))) for f in line]
    numbers = re.compile(r"-?[\d.e-]+")
    assert not [f for f in fields if f[:1] in tuple("=+-@\t\r") and f and not numbers.fullmatch(f)]
    assert {"'=cmd()", "'+1", "'@x"} <= set(fields)
    latex = written(tmp_path, "tex", hostile)
    assert r"\input" not in latex and r"\textbackslash{}input\{/etc/passwd\}" in latex
    assert r"50 \% \& \#1\_x \textasciitilde{}\textasciicircum{}\{\}\$" in latex
    text = written(tmp_path, "html", hostile)
    parsed = Reader(text)
    assert parsed.count("script") == text.count("<script") == 2 and parsed.count("img") == 0
    assert EVIL in json.dumps(island(text)).replace('\\"', '"') and "\x1b" not in text
    lines = [line for line in written(tmp_path, "md", hostile).splitlines() if line.startswith("| a\\|b")]
    assert lines and all("&lt;i>" in line for line in lines)
    capsys.readouterr()
    assert report(hostile) == 0
    assert "\x1b" not in capsys.readouterr().out


@pytest.mark.parametrize("text", NAMES)
def test_escaping_by_itself(text: str) -> None:
    assert "\n" not in layout.plain(text) and "\x1b" not in layout.plain(text)
    assert not re.search(r"(?<!\\)[&%$#_]", layout.escaped(text).replace("$-$", ""))
    assert csv_export.text(text)[:1] not in tuple("=+-@")
    assert csv_export.field(-0.5) == -0.5 and csv_export.field(None) == ""


# -- the page ----------------------------------------------------------------------------------------------------


def test_the_page_is_alone_and_whole(tmp_path: Path) -> None:
    text = written(tmp_path, "html", RUN, SCORED, SINGLE)
    parsed = Reader(text)
    asked = [(tag, a) for tag, attrs in parsed.tags for a in attrs if a in ("src", "srcset", "action", "data", "background")]
    assert asked == [] and parsed.count("link") == 0 and parsed.count("iframe") == 0
    assert not re.search(r"https?://|@import|url\(|fetch\(|XMLHttpRequest|import\(|WebSocket|sendBeacon", text)
    anchors = {a["id"] for _, a in parsed.tags if a.get("id")}
    links = [str(a["href"]) for _, a in parsed.tags if "href" in a]
    assert links and all(link.startswith("#") and link[1:] in anchors for link in links)
    for what in ("Reliability against locality", "After T edits", "Paired differences", "Where the time went", "Manifest"):
        assert what in parsed.text
    assert '"config_hash"' in parsed.text, "the manifest"


def test_the_data_of_the_page_are_those_of_the_records(tmp_path: Path) -> None:
    data = island(written(tmp_path, "html", RUN, SCORED))
    texts, (section,) = data["texts"], data["sections"]
    whens = ["after all edits", "right after its own edit"]
    assert section["columns"] == [[m, w] for w in whens for m in ("rome", "grace", "none", "baft")]
    found = {}
    for _, _, probes in section["cases"]:
        for kind, prompt, _, before, marks, answers, _ in probes:
            for (method, when), mark, answer in zip(section["columns"], marks[1:], answers, strict=True):
                found[method, when, kind, texts[prompt]] = (mark, texts[answer], texts[before])
    (said,) = gather([read(RUN), read(SCORED)])
    count = 0
    for when, readers in ((whens[0], said.records), (whens[1], said.right_after_records)):
        for method, records in readers.items():
            for r in records():
                right = r["gen_agree"] if r["target"] is None else r["gen_match_after"]
                assert found[method, when, r["kind"], r["prompt"]] == ("y" if right else "n", r["gen_after"], r["gen_before"])
                count += 1
    assert count == len(found), "no more and no less"


def test_the_page_may_be_cut(tmp_path: Path) -> None:
    (section,) = island(written(tmp_path, "html", RUN, "--cases", 2))["sections"]
    assert (len(section["cases"]), section["left_out"]) == (2, 1)


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_the_script_is_javascript(tmp_path: Path) -> None:
    path = tmp_path / "page.js"
    path.write_text(resources.files("errata.report").joinpath("page.js").read_text())
    subprocess.run(["node", "--check", str(path)], check=True, timeout=60)


# -- parts that are missing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("gone", ["records.jsonl", "cost.json"])
def test_a_cell_with_less_shows_less(gone: str, copy: Callable[[Path], Path], tmp_path: Path) -> None:
    other = copy(RUN)
    for path in other.glob(f"cells/*/{gone}"):
        path.unlink()
    text = written(tmp_path, "html", other)
    assert "Generated scores" in text
    assert ("cases-data" not in text.partition("<script>\n")[0]) == (gone == "records.jsonl")
    assert ("Where the time went" not in text) == (gone == "cost.json")
    for ending in ("md", "tex", "csv", "txt"):
        assert "grace" in written(tmp_path, ending, other)


def test_cells_without_a_result_are_named(copy: Callable[[Path], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = copy(RUN)
    (cell(other, "rome") / "summary.json").unlink()
    (cell(other, "rome") / "error.txt").write_text("Traceback\nModelError: out of memory\n")
    text = written(tmp_path, "md", other)
    assert "failed: ModelError: out of memory" in text and "| grace |" in text and "| rome |" not in text
    assert "Left out" in capsys.readouterr().out
    (cell(other, "grace") / "summary.json").unlink()
    assert report(other) == 2
    assert "no cell is complete" in capsys.readouterr().err


GATES = {
    "source": "runs/x",
    "summary": [{"block": 3, "kind": kind, "inputs": 4, "bases": [0.25, 0.5]} for kind in ("edited", "neighbour")],
    "signs": [{"sign": "collapse", "block": 3, "value": 0.4, "bound": 0.01, "fires": False, "says": "no <b>collapse"}],
    "tests": [{"block": 3, "a": "edited", "b": "neighbour", "n": 12, "p": 0.001, "gap": 0.3, "adjusted": 0.002}],
    "redundancy": [{"method": "reft", "block": 3, "M": m, "count": 12 * m, "rank": 12} for m in (0.1, 0.5)],
}


def test_gates_are_shown_where_they_were_computed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "g").mkdir()
    (tmp_path / "g" / "gates.json").write_text(json.dumps(GATES))
    text = written(tmp_path, "html", SINGLE, tmp_path / "g")
    parsed = Reader(text)
    assert "Gates of runs/x" in parsed.text and "Dimensions of an edit, of 12" in parsed.text and "no <b>collapse" in parsed.text
    assert re.findall(r'class="heat" style="--h: (\d+)%">([\d.]+)<', text) == [
        *[("50", "0.25"), ("100", "0.50")] * 2,
        *(("10", "1.2"), ("50", "6.0")),
    ]
    assert 'id="gates"' not in written(tmp_path, "html", SINGLE, "--force")
    assert report(tmp_path / "g") == 0
    assert "edited against neighbour" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"runs/x: row 0 of 'signs' has no 'says'"):
        gate_maps.tables({**GATES, "signs": [{"sign": "collapse"}]})


# -- bad input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--format", "pdf"), "no format 'pdf'; there are terminal"),
        (("--format", "csv,html"), "give --out a folder"),
        (("--format", "csv,html", "--out", "x.csv"), "give a folder"),
        (("--against", "memit"), "these runs have rome, grace, and all"),
        (("--protocol", "said"), "--protocol 'said': these runs have"),
    ],
)
def test_bad_arguments(arguments: tuple[str, ...], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert report(RUN, *arguments) == 2
    assert says in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_nothing_is_replaced_without_force(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "mine.md"
    out.write_text("mine")
    assert report(SINGLE, "--out", out) == 6
    assert out.read_text() == "mine" and "exists already" in capsys.readouterr().err
    assert report(SINGLE, "--out", out, "--force") == 0
    assert out.read_text().startswith("# errata report: single")


def test_a_full_disk_leaves_the_earlier_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "r.md"
    out.write_text("earlier")

    def full(path: Path, content: bytes) -> None:
        path.write_bytes(content[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(storage, "write", full)
    assert report(SINGLE, "--out", out, "--force") == 6
    assert "the disk is full" in capsys.readouterr().err
    assert out.read_text() == "earlier" and [p.name for p in tmp_path.iterdir()] == ["r.md"]


def test_one_format_may_go_to_the_screen(capsys: pytest.CaptureFixture[str]) -> None:
    assert report(SINGLE, "--format", "csv") == 0
    assert capsys.readouterr().out.startswith("section,model,")


def test_json_holds_all_but_the_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report(RUN, SINGLE, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [s["scenario"] for s in found["sections"]] == ["continual", "single"]
    summaries = [json.loads((cell(RUN, m) / "summary.json").read_text())["summary"] for m in ("rome", "grace")]
    assert found["sections"][0]["rows"] == [row for rows in summaries for row in rows]
    assert report(SINGLE, "--json", "--out", tmp_path / "x.csv") == 0
    assert json.loads(capsys.readouterr().out)["saved"] == {"csv": str(tmp_path / "x.csv")}
    assert report(SINGLE, "--json", "--format", "csv") == 2


def test_it_needs_no_torch() -> None:
    code = f"""
import contextlib, io, json, sys
import errata.cli
with contextlib.redirect_stdout(io.StringIO()):
    code = errata.cli.main(["report", {str(RUN)!r}, "--format", "html"])
print(json.dumps({{"code": code, "modules": sorted(sys.modules)}}))
"""
    found = fresh(code)
    assert found["code"] == 0 and not {"torch", "transformers"} & set(found["modules"])


def test_a_section_may_be_empty() -> None:
    assert contents.tables(Section("")) == [] and csv_export.write([Section("")]).count("\n") == 1
