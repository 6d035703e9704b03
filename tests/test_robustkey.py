"""RobustKeyEdit's records: which names train, which score, and that what is dirty is counted.

The published files state no licence, so the records here are our own, with the flaws of theirs; the real files are read where present.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

import errata
from errata.benchmarks.files import open_benchmark
from errata.benchmarks.robustkey import without_chatter
from errata.errors import InputError
from errata.request import Case
from errata.score.robustness import add_robustness_probes

REAL = Path(os.environ.get("ERRATA_DATA", "")) / "robustkey"
SUBJECT = "Ada Lovelace"
RECORD: dict[str, Any] = {
    "case_id": 7,
    "prompt": "The mother tongue of Ada Lovelace is",
    "target_new": " French",
    "target_true": "English",
    "subject": SUBJECT,
    "rephrase_prompt": [
        "Ada Lovelace spoke",
        "Ada Lovelace spoke",
        "",
        "The mother tongue of Ada Lovelace is",
        "Her language is",
        "Lady Ada spoke",
    ],
    "rephrase_target": "French",
    "locality_prompt": ["The mother tongue of Charles Babbage is", "Babbage spoke"],
    "locality_ground_truth": "English",
    "subject_rephrase": [
        *("Countess \nof Lovelace", "ada lovelace", "Countess of Lovelace", "Lady Ada", "Ada, the French Countess"),
        *("A. Lovelace", "Lady Ada", "", "Ada L.", "The noted Ada KingThese variations maintain the reference while using other words."),
    ],
}
QUESTION = {
    **RECORD,
    "case_id": 8,
    "prompt": "Which language did Ada Lovelace speak?",
    "rephrase_prompt": None,
    "locality_prompt": ["nq question: who"],
}


def read(tmp_path: Path, *records: dict[str, Any]) -> tuple[Any, list[Case]]:
    path = tmp_path / "test.json"
    path.write_text(json.dumps(records), encoding="utf-8")
    benchmark = open_benchmark("robustkey", path)
    return benchmark, list(benchmark.load(seed=None))


def test_names_go_to_their_halves_and_flaws_are_counted(tmp_path: Path) -> None:
    benchmark, (case,) = read(tmp_path, RECORD)
    request = case.request
    assert (request.target, request.old, request.subject) == ("French", "English", SUBJECT)
    assert request.aliases == ("Countess of Lovelace", "Lady Ada")
    found = [(p.kind, p.prompt) for p in case.probes]
    assert found == [
        ("rewrite", RECORD["prompt"]),
        *(("rephrase", p) for p in ("Ada Lovelace spoke", "Her language is", "Lady Ada spoke")),
        *(("neighbour", p) for p in RECORD["locality_prompt"]),
        *(("subject_unseen", f"The mother tongue of {n} is") for n in ("A. Lovelace", "Ada L.", "The noted Ada King")),
    ]
    assert {p.target for p in case.probes if p.kind == "neighbour"} == {"English"}
    assert dict(benchmark.report.left_out) == {
        "rephrase: its prompt is empty": 1,
        "rephrase: it is the edited prompt itself": 1,
        "rephrase: asked twice of one edit": 1,
        "subject_seen: the name is the subject itself": 1,
        "subject_seen: the name stands there twice": 1,
        "subject_seen: the name gives the new answer away": 1,
        "subject_unseen: the name stands there twice": 1,
        "subject_unseen: the name is empty": 1,
    }
    remarks = " ".join(benchmark.report.lines())
    assert "words of the chat model" in remarks and "does not name the subject" in remarks


def test_zsre_records_have_no_rephrase_and_unrelated_locality(tmp_path: Path) -> None:
    _, (case,) = read(tmp_path, QUESTION)
    assert [p.kind for p in case.probes if not p.kind.startswith("subject")] == ["rewrite", "unrelated"]


def test_bad_records(tmp_path: Path) -> None:
    benchmark, cases = read(tmp_path, RECORD, {**RECORD, "subject": "Grace Hopper"})
    assert len(cases) == 1 and benchmark.report.dropped == {"the subject does not occur in the prompt": 1}
    with pytest.raises(InputError, match=r"test\.json: record 2: subject_rephrase\[0\] must be a text, not int"):
        read(tmp_path, RECORD, {**QUESTION, "subject_rephrase": [3]})
    renamed = {("aliases" if k == "subject_rephrase" else k): v for k, v in QUESTION.items()}
    with pytest.raises(InputError, match=r"record 2: field 'subject_rephrase' is missing"):
        read(tmp_path, RECORD, renamed)


def test_a_rephrase_under_an_alias_is_training_text(tmp_path: Path) -> None:
    benchmark, (case,) = read(tmp_path, {**RECORD, "rephrase_prompt": ["The mother tongue of Lady Ada is", "Ada Lovelace spoke"]})
    assert [p.prompt for p in case.probes if p.kind == "rephrase"] == ["Ada Lovelace spoke"]
    assert benchmark.report.left_out["rephrase: it is the prompt under an alias, which may be trained on"] == 1


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("Ada, film starPlease let me know if you need more!", "Ada, film star"),
        ("Fiat styling If you need further information, ask!", "Fiat styling"),
        ("Sultan(Note: the last name is missing.)", "Sultan"),
        ("P. PlatonovNote that these differ", "P. Platonov"),
        ("Google Keep Notes", "Google Keep Notes"),
        ("If I Were You", "If I Were You"),
        ("The \nTitaness", "The Titaness"),
    ],
)
def test_chatter(written: str, name: str) -> None:
    assert without_chatter(written) == name


def test_widened(tmp_path: Path) -> None:
    _, cases = read(tmp_path, RECORD, QUESTION)
    first, second = add_robustness_probes(errata.load("almanac"), cases)
    prompts = [p.prompt for p in first.probes if p.kind == "subject_seen"]
    assert prompts == ["The mother tongue of Countess of Lovelace is", "The mother tongue of Lady Ada is"]
    assert sum(p.kind == "subject_unseen" for p in first.probes) == 3, "the file's own, none by rule"
    assert {"completion_form", "long_unseen", "shuffled_unseen"} <= {p.kind for p in second.probes}


@pytest.mark.skipif(not REAL.is_dir(), reason="ERRATA_DATA names no folder with the real files")
@pytest.mark.parametrize(("name", "count", "cut"), [("valid.counterfact", 100, 6), ("test.counterfact", 400, 20), ("test.zsre", 400, 50)])
def test_the_published_files(name: str, count: int, cut: int) -> None:
    (path,) = REAL.glob(f"{name}_*.json")
    benchmark = open_benchmark("robustkey", path)
    cases = list(benchmark.load())
    assert len(cases) == count == benchmark.report.records
    assert next(n for remark, n in benchmark.report.remarks.items() if "chat model" in remark) == cut
    for case in cases:
        assert 1 <= len(case.request.aliases) <= 5 and 1 <= sum(p.kind == "subject_unseen" for p in case.probes) <= 5
        assert not any("let me know" in text or "variations" in text for text in case.request.aliases)
        assert {p.kind for p in case.probes} <= set(benchmark.probes)
