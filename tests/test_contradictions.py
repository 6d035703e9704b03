"""Streams of edits that contradict themselves: what a perfect editor can score, what was last written, and the stream without them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from runs import done, records, spec_of, summary

from errata.benchmarks.files import open_benchmark
from errata.benchmarks.streams import one_a_fact, overwritten
from errata.cli import main
from errata.errors import ConfigError, InputError
from errata.request import Case, EditRequest, Probe
from errata.run import grid
from errata.score.last_written import add_last_written
from errata.score.metrics import summarise

FACTS = [  # subject, true answer, question, rephrased, new answer: the first fact three times, the second twice with one answer
    ("Leedstown", "Bethlehem Steel", "Who built Leedstown?", "By whom was Leedstown built?", "Todd"),
    ("Rhine", "North Sea", "Where does the Rhine end?", "The Rhine flows into what?", "Black Sea"),
    ("Leedstown", "Bethlehem Steel", "Which yard made Leedstown?", "Leedstown is from which yard?", "Cramp"),
    ("Rhine", "North Sea", "What is the mouth of the Rhine?", "The mouth of the Rhine is where?", "Black Sea"),
    ("Leedstown", "Newark", "Where is Leedstown?", "Leedstown lies where?", "Genoa"),
    ("Leedstown", "Bethlehem Steel", "What firm made Leedstown?", "What is the maker of Leedstown?", "Ansaldo"),
]
ZSRE = [
    {"subject": s, "src": q, "rephrase": r, "alt": new, "answers": [old], "loc": f"what is {i}", "loc_ans": "one"}
    for i, (s, old, q, r, new) in enumerate(FACTS)
]
CASES = [
    Case(EditRequest(q, new, s, old), (Probe("rewrite", q, new), Probe("rephrase", r, new), Probe("unrelated", f"what is {i}", "one")))
    for i, (s, old, q, r, new) in enumerate(FACTS)
]
RUN = """
methods: [{name: reft, set: {rank: 2, lr: 0.02, steps: 4, layers: [3]}}]
benchmark: {name: zsre, data: DATA, seed: file}
scenario: {kind: continual, marks: [2, 6]}
score: {latency: false, watch: 0}
threads: 1
"""


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "zsre.json"
    path.write_text(json.dumps(ZSRE))
    return path


def _record(case: Case, probe: Probe, said: str) -> dict[str, Any]:
    right = {f"{k}_{w}": w == "after" and said == probe.target for k in ("gen_match", "starts", "contains") for w in ("before", "after")}
    asked = {"method": "m", "case": case.id, "kind": probe.kind, "prompt": probe.prompt, "target": probe.target, "tf_before": 0.0}
    agree = {"tf_agree": 0.0, "gen_agree": False, "known": False, "tf_after": 0.0}
    return {**asked, **agree, "gen_before": "nothing", "gen_after": said, **right}


def _values(answer: dict[str, str] | None) -> dict[tuple[str, str], float]:
    """Metrics of an editor that says ``answer[true answer]`` in whichever words, or (None) to each prompt what was written for it."""
    found = [_record(c, p, str(p.target) if answer is None else answer[str(c.request.old)]) for c in CASES for p in c.probes[:2]]
    return {(row["metric"], row["protocol"]): row["value"] for row in summarise(add_last_written(found, CASES))}


def test_a_perfect_generaliser_scores_the_ceiling_and_all_of_what_was_last_written() -> None:
    found = _values({"Bethlehem Steel": "Ansaldo", "North Sea": "Black Sea", "Newark": "Genoa"})
    for protocol in ("starts", "generated", "contains"):
        assert found["reliability_last", protocol] == found["generality_last", protocol] == 1.0
        assert found["reliability", protocol] == found["generality", protocol] == found["reliability_ceiling", "starts"] == 4 / 6


def test_an_editor_that_remembers_each_prompt_by_itself_scores_the_other_way_round() -> None:
    found = _values(None)
    assert found["reliability", "starts"] == 1.0 and found["reliability_last", "starts"] == found["reliability_ceiling", "starts"] == 4 / 6


def test_a_stream_without_contradictions_has_no_such_fields() -> None:
    found = [_record(c, p, "x") for c in CASES[:2] for p in c.probes]
    assert add_last_written(found, CASES[:2]) == found
    assert [c.request.target for c in overwritten(CASES)] == ["Todd", "Cramp"]
    assert [c.request.target for c in one_a_fact(CASES)] == ["Todd", "Black Sea", "Genoa"]


def test_accepted_spellings_count_for_the_own_answer() -> None:
    """Where a record's answer is the last one, the fields are those of the record, which know its other spellings."""
    found = {**_record(CASES[5], CASES[5].probes[0], "Ansaldo Co"), "starts_after": True}
    assert add_last_written([found], CASES)[0]["starts_last_after"] is True


def test_the_loader_says_so_and_offers_one_case_a_fact(data: Path) -> None:
    plain = open_benchmark("zsre", data)
    assert len(list(plain.load(None, None, None))) == 6
    assert any("2 cases: a later case writes the same fact otherwise" in line for line in plain.report.lines())
    chosen = open_benchmark("zsre", data, consistent=True)
    cases = list(chosen.load(None, None, None))
    assert [c.request.target for c in cases] == ["Todd", "Black Sea", "Genoa"] and not overwritten(cases)
    assert any("left out 3 cases of a fact" in line for line in chosen.report.lines()) and chosen.report.to_dict()["repeated"] == 3
    assert not any("later case" in line for line in chosen.report.lines())
    for seed in (0, 1, None):
        every = [c.id for c in chosen.load(None, None, seed)]
        assert [c.id for c in chosen.load(None, 2, seed)] == every[:2] and len(every) == 3
    for name in ("everyday", "almanac"):
        with pytest.raises(InputError, match="consistent"):
            open_benchmark(name, consistent=True)


def test_a_run_scores_both_at_a_mark_and_neither_right_after(data: Path, tmp_path: Path, tiny: str) -> None:
    root = done(tmp_path / "run", spec_of(tmp_path, tiny, text=RUN.replace("DATA", str(data))))
    found = records(root)
    assert {r["edits"] for r in found if "is_last" in r} == {6}
    late = [r for r in found if r["edits"] == 6 and r["kind"] in ("rewrite", "rephrase")]
    last = ("Ansaldo", "Black Sea", "Ansaldo", "Black Sea", "Genoa", "Ansaldo")
    assert [r["last_target"] for r in late] == [target for target in last for _ in range(2)]
    rows = {(r["metric"], r["T"]): r["value"] for r in summary(root)["retention"] if r["protocol"] == "starts"}
    assert rows["reliability_ceiling", 6] == 4 / 6 and ("reliability_ceiling", 2) not in rows and ("reliability_last", 6) in rows
    assert not any("last" in row["metric"] for row in summary(root)["right_after"])


def test_a_run_file_asks_for_the_consistent_stream_and_older_runs_keep_their_names(data: Path, tmp_path: Path, tiny: str) -> None:
    text = RUN.replace("DATA", "facts.json")
    plain = spec_of(tmp_path, "m", text=text)
    asked = spec_of(tmp_path, "m", "benchmark.consistent=true", text=text)
    # as they were before `consistent` existed: a run begun then goes on in its folder
    assert plain.digest == "7826642b1b209afa"
    assert grid.cells(plain)[0].id == "m-reft-zsre-continual-s0-887cc6" and grid.cells(plain)[0].base == "m-zsre-oNone-c54ec5"
    assert asked.digest != plain.digest and grid.cells(asked)[0].id != grid.cells(plain)[0].id
    assert grid.from_dict(json.loads(json.dumps(grid.to_dict(asked)))) == asked
    spec = spec_of(tmp_path, tiny, "benchmark.consistent=true", "scenario.marks=[3]", text=RUN.replace("DATA", str(data)))
    root = done(tmp_path / "run", spec)
    assert len({r["case"] for r in records(root)}) == 3 and not any("is_last" in r for r in records(root))
    with pytest.raises(ConfigError, match="consistent"):
        grid.benchmark(grid.BenchmarkSpec("own:Tiny", consistent=True))


def test_the_command_takes_it(data: Path, tmp_path: Path, roomy: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["score", roomy, "--benchmark", "zsre", "--data", str(data), "--seed", "file", "--mode", "continual", "--method", "ft-m"]
    assert main([*line, "--set", "steps=2", "--set", "layers=[3]"]) == 0
    said = capsys.readouterr()
    assert "as last written" in said.out + said.err and "a later case writes the same fact otherwise" in said.out + said.err
    assert main([*line, "--set", "steps=2", "--set", "layers=[3]", "--consistent", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["n"] == 3
    assert main(["score", roomy, "--consistent", "--n", "1"]) != 0
