"""``errata score``, ``errata trace`` and ``errata benchmarks`` with benchmarks in files, on a tiny trained model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import FRANCE, write_piqa

from errata.cli import main

SAMPLES = Path(__file__).parent / "data" / "benchmarks"


def document(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    code = main([*argv, "--json"])
    out, err = capsys.readouterr()
    assert code == 0, err
    return json.loads(out)


@pytest.mark.parametrize("sample", ["counterfact-original.json", "mquake.json", "qaedit.json"])
def test_score_reads_a_file(sample: str, roomy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name, data, out = sample.partition(".")[0].partition("-")[0], SAMPLES / sample, tmp_path / "out"
    settings = ("--set", "reft.rank=2", "--set", "reft.steps=2", "--set", "reft.batched_steps=2")
    argv = ("score", roomy, "--benchmark", name, "--data", str(data), "--n", "2", "--method", "none,reft", "--no-known")
    found = document(capsys, *argv, *settings, "--out", str(out))
    assert found["n"] == 2 and found["split"] is None and found["data"] == str(data) and found["records"]["records"] == 5
    assert {r["method"] for r in found["summary"]} == {"none", "reft"}
    assert all(r["value"] == pytest.approx(r["before"], abs=1e-5) for r in found["summary"] if r["method"] == "none")  # other batches
    assert {"records.jsonl", "report.html", "report.md", "summary.json"} == {p.name for p in out.iterdir()}
    assert "5 records (" in (out / "report.md").read_text()


def test_score_takes_what_there_is_without_n_and_says_what_was_left_out(roomy: str, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["score", roomy, "--benchmark", "convsent", "--data", str(SAMPLES / "convsent.json"), "--method", "none", "--seed", "file"]
    assert main(argv) == 0
    out, _ = capsys.readouterr()
    assert "5 records (KnowEdit), 4 cases" in out and "dropped 1 record: set aside as a bystander" in out and "ES of ConvSent" in out


def test_choices_of_the_command_are_scored_under_patches(tiny: str, good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["score", tiny, "--benchmark", "piqa", "--data", str(write_piqa(tmp_path))]
    found = document(capsys, *argv)
    assert [(r["method"], r["value"], r["before"]) for r in found["summary"]] == [("unedited", 1.0, 1.0)] and found["patches"] == []
    found = document(capsys, *argv, "--patch", str(good), "--out", str(tmp_path / "out"))
    assert len(found["patches"]) == 1 and found["summary"][0]["before"] == 1.0
    assert (tmp_path / "out" / "report.html").exists()
    for wrong, message in ((["--method", "reft"], "--method: piqa has no edits to make"), (["--fluency"], "--fluency: piqa has no edits")):
        assert main([*argv, *wrong]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--benchmark", "zsre"], "'zsre' is not in the package; give its file with --data"),
        (["--data", "x.json"], "'almanac' is in the package and takes no data"),
        (["--benchmark", "qaedit", "--data", str(SAMPLES / "qaedit.json"), "--n", "9"], "9 asked for, but"),
        (["--benchmark", "qaedit", "--data", str(SAMPLES / "qaedit.json"), "--split", "test"], "is one file, which has no splits"),
        (["--benchmark", "qaedit", "--data", str(SAMPLES / "qaedit.json"), "--patch", "x"], "--patch: qaedit makes its own edits"),
        (["--benchmark", "known1000", "--data", str(SAMPLES / "known1000.json")], "has no edits to score; try `errata trace"),
        (["--seed", "first"], "must be a whole number, or 'file'"),
        (["--seed", "file"], "the almanac has no order of its own"),
    ],
)
def test_wrong_arguments_are_told(argv: list[str], message: str, tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["score", tiny, "--method", "none", *argv]) == 2
    assert message in capsys.readouterr().err


def test_methods_that_need_a_subject_say_so(tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = {"id": 0, "question": "The capital of", "para_question": "Capital", "answer": "Rome", "sub_question": [], "sub_answer": []}
    (tmp_path / "unke.json").write_text(json.dumps([record]))
    argv = ["score", tiny, "--benchmark", "unke", "--data", str(tmp_path / "unke.json"), "--method", "rome", "--set", "stats_tokens=200"]
    assert main(argv[:-2]) != 0
    assert "edits at the subject's last token; give the subject" in capsys.readouterr().err


def test_fluency_without_prompts_is_refused(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["score", tiny, "--benchmark", "counterfact", "--method", "none", "--fluency", "--n", "1", "--no-known", "--data"]
    assert main([*argv, str(SAMPLES / "counterfact-flattened.json")]) == 2
    assert "no case has a prompt to sample from" in capsys.readouterr().err
    found = document(capsys, *argv, str(SAMPLES / "counterfact-original.json"))
    assert {"GE"} == {r["metric"] for r in found["summary"] if r["protocol"] == "sampled"}  # no references, no RS


def test_trace_reads_facts_and_edits(tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fact = {
        "known_id": 0,
        "subject": "France",
        "attribute": "Paris",
        "template": "…",
        "prediction": "…",
        "prompt": FRANCE,
        "relation_id": "P",
    }
    (tmp_path / "known.json").write_text(json.dumps([fact]))
    found = document(capsys, "trace", tiny, "--benchmark", "known1000", "--data", str(tmp_path), "--samples", "1", "--kinds", "hidden")
    assert [f["prompt"] for f in found["facts"]] == [FRANCE]
    argv = ["trace", tiny, "--benchmark", "counterfact", "--data", str(SAMPLES / "counterfact-flattened.json"), "--n", "2"]
    assert main(argv) == 2  # the tiny model knows none of them
    assert "none of 2 fact(s) can be traced" in capsys.readouterr().err
    assert main(["trace", tiny, "--benchmark", "nq-open", "--data", str(SAMPLES / "nq-open.jsonl")]) == 2
    assert "nq-open has no facts with a subject to trace" in capsys.readouterr().err
    assert main(["trace", tiny, "--data", "x", "--prompt", "a", "--subject", "a"]) == 2
    assert "--data has no meaning without --benchmark" in capsys.readouterr().err


def test_benchmarks_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    found = {row["name"]: row for row in document(capsys, "benchmarks")["benchmarks"]}
    assert found["zsre"]["forms"] == ["MEND", "KnowEdit"] and "two_hop" in found["zsre"]["probes"] and found["piqa"]["kind"] == "choices"
    assert not found["almanac"]["needs_data"] and all(row["licence"] for row in found.values())
    assert main(["benchmarks"]) == 0
    assert "qaedit (edits, needs --data)" in capsys.readouterr().out
