"""Folders of `errata run` and `errata score` on real records (see `reports`): what is read, and what may stand in one table."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from reports import RUN, SCORED, SINGLE, cell, copy, edited, report

from errata.errors import InputError
from errata.report import folders
from errata.report.folders import RIGHT_AFTER, Records, read
from errata.report.sections import gather
from errata.score.metrics import get_metric, summarise

__all__ = ["copy"]  # a fixture

# -- what is read ------------------------------------------------------------------------------------------------


def test_both_kinds_of_folder_are_read_as_one() -> None:
    (section,) = gather([read(RUN), read(SCORED)])
    assert [r.method for r in section.results] == ["rome", "grace", "none", "baft"]
    assert {r.fingerprint for r in section.results} == {"efbef8b556f82cea"}
    assert len({(row["method"], row["metric"], row["protocol"]) for row in section.rows}) == len(section.rows)
    alone = gather([read(cell(RUN, "rome"))])[0]
    assert alone.rows == [row for row in section.rows if row["method"] == "rome"]


def test_the_numbers_are_those_of_the_records() -> None:
    def again(records: Callable[[], Any]) -> list[dict[str, Any]]:
        """The metrics there were when the folder was written."""
        return values([row for row in summarise(list(records())) if not get_metric(row["metric"]).by_kind])

    def values(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        """Without intervals, which were all bootstrapped then, and in one order."""
        found = [{k: v for k, v in row.items() if k not in ("low", "high", "version")} for row in rows]
        return sorted(found, key=lambda row: (row["metric"], row["protocol"]))

    (section,) = gather([read(SCORED)])
    for name in ("none", "baft"):
        assert again(section.records[name]) == values(row for row in section.rows if row["method"] == name)
        assert again(section.right_after_records[name]) == values(row for row in section.right_after if row["method"] == name)


def test_records_are_told_apart_by_when_they_were_made() -> None:
    records = Records(cell(RUN, "rome") / "records.jsonl")
    assert {when for _, when in records.places} == {1, 3, RIGHT_AFTER}
    assert records.last("rome") == 3
    assert {r["case"] for r in records.of("rome", 1)} < {r["case"] for r in records.of("rome", 3)}
    assert all(r["edits"] == 3 for r in records.of("rome", 3))


def test_the_same_folder_twice_is_there_once() -> None:
    (section,) = gather([read(RUN), read(RUN / "." / "")])
    assert [r.method for r in section.results] == ["rome", "grace"]


# -- what may stand in one table ---------------------------------------------------------------------------------


def test_scenarios_are_apart() -> None:
    first, second = gather([read(RUN), read(SINGLE)])
    assert {r.scenario for r in first.results} == {"continual"} and {r.scenario for r in second.results} == {"single"}
    assert second.apart == ["section 1: another scenario (single, not continual)"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda d: d.update(base="other"), "another model (almanac other, not almanac efbef8b556f82cea)"),
        (lambda d: [row.update(version=2) for row in d["summary"] if row["metric"] == "generality"], "the metric generality (2, not 1)"),
    ],
)
def test_other_models_and_metric_versions_are_apart(change: Any, says: str, copy: Callable[[Path], Path]) -> None:
    other = copy(SCORED)
    edited(other / "summary.json", change)
    first, second = gather([read(RUN), read(other)])
    assert says in " ".join(second.apart) and first.apart == []
    assert [r.method for r in first.results] == ["rome", "grace"]


def test_other_cases_are_apart_whatever_the_folder_says(copy: Callable[[Path], Path]) -> None:
    other = copy(SCORED)
    path = other / "records.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    prompt = json.loads(lines[0])["prompt"]
    path.write_text("".join(lines).replace(json.dumps(prompt, ensure_ascii=False), '"Another prompt"'))
    assert "other cases or probes (digest" in " ".join(gather([read(SCORED), read(other)])[1].apart)
    path.unlink()  # without records, by what the folder names
    assert len(gather([read(other), read(other)])) == 1 and len(gather([read(SCORED), read(other)])) == 2


def test_one_name_for_two_results_is_made_two(copy: Callable[[Path], Path], tmp_path: Path) -> None:
    other = copy(SCORED)
    renamed = other.rename(tmp_path / "later")
    (section,) = gather([read(SCORED), read(renamed)])
    names = ["none (scored)", "baft (scored)", "none (later)", "baft (later)"]
    assert [*section.records] == names and list(dict.fromkeys(row["method"] for row in section.rows)) == names
    assert {r["method"] for r in section.records["baft (later)"]()} == {"baft (later)"}


def test_other_numbers_of_edits_and_other_dtypes_are_apart(copy: Callable[[Path], Path]) -> None:
    fewer = copy(RUN)
    for name in ("rome", "grace"):
        edited(cell(fewer, name) / "summary.json", lambda d: d.update(edits=2))
    first, second = gather([read(RUN), read(fewer)])
    assert [r.method for r in first.results] == ["rome", "grace"] and "another number of edits (2, 3)" in " ".join(second.apart)
    for kind, name in (("float32", "rome"), ("bfloat16", "grace")):
        edited(cell(fewer, name) / "cell.json", lambda d, kind=kind: d.update(dtype=kind))
    one, two = gather([read(fewer)])
    assert len(one.results) == len(two.results) == 1 and "another dtype (bfloat16, not float32)" in " ".join(two.apart)


def test_a_run_that_the_guard_stopped_says_so(copy: Callable[[Path], Path]) -> None:
    other = copy(RUN)
    edited(cell(other, "grace") / "summary.json", lambda d: d.update(stopped=True))
    assert [*gather([read(other)])[0].records] == ["rome", "grace (stopped at T = 3)"]


def test_bad_folders_say_where(tmp_path: Path, copy: Callable[[Path], Path], capsys: pytest.CaptureFixture[str]) -> None:
    for path, says in (
        (tmp_path / "none", "is not there"),
        (tmp_path, "has no manifest.json and no summary.json"),
        (Path(__file__), "is not a folder"),
    ):
        assert report(path) == 2
        assert says in capsys.readouterr().err
    other = copy(SCORED)
    path = other / "records.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    for bad, says in (
        ('{"method": "x"\n', "not a line of JSON"),
        ('{"method": "x"}\n', "a record without 'case'"),
        ("[]\n", "not a record"),
    ):
        path.write_text("".join([*lines[:4], bad, *lines[4:]]))
        assert report(other) == 2
        err = capsys.readouterr().err
        assert f"{path}:5: " in err and says in err
    edited(other / "summary.json", lambda d: d["summary"][2].pop("low"))
    with pytest.raises(InputError, match=r"row 2 of 'summary' has no 'low'"):
        folders.read(other)
    (other / "summary.json").write_text("{")
    with pytest.raises(InputError, match=r"summary\.json: not valid JSON"):
        folders.read(other)
