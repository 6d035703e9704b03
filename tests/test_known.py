"""Only facts that the base knows: how cases are drawn, that nothing is asked twice, and what the command and a run say of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from families import lm
from runs import done, spec_of, summary

from errata.cli import main
from errata.errors import InputError
from errata.request import Case, EditRequest, Probe
from errata.score import evaluator, known
from errata.score.evaluator import AnswerCache, score
from errata.score.known import known_cases

FACTS = (("The capital of France is", "Paris"), ("The capital of Japan is", "Tokyo"), ("The language of Italy is", "Italian"))


def case(prompt: str, old: str | None, target: str = "Rome") -> Case:
    return Case(EditRequest(prompt, target, None, old), (Probe("rewrite", prompt, target),))


KNOWN = [case(prompt, old) for prompt, old in FACTS]
UNKNOWN = [case(prompt, "Madrid") for prompt, _ in FACTS]
UNNAMED = case("In Rome people speak", None)
MIXED = [UNKNOWN[0], KNOWN[0], UNNAMED, UNKNOWN[1], KNOWN[1], KNOWN[2]]


def test_cases_are_drawn_until_enough_are_known() -> None:
    base = lm("llama")
    found = known_cases(base, iter(MIXED), 2, AnswerCache())
    assert found.cases == [KNOWN[0], KNOWN[1]] and (found.looked, found.unnamed) == (5, 1)
    assert found.to_dict() == {"only": True, "cases": 2, "looked_at": 5, "without_old_answer": 1}
    assert known.say(found.to_dict()).startswith("known: 2 of 5 cases looked at") and "1 of them name no old" in known.say(found.to_dict())
    every = known_cases(base, MIXED, None, AnswerCache())
    assert every.cases == KNOWN and every.looked == 6
    assert known_cases(base, MIXED, 9, AnswerCache()).cases == KNOWN, "as many as there are"


def test_no_more_are_looked_at_than_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known, "MOST", 2)
    with pytest.raises(InputError, match="of 2 cases looked at the model answers none"):
        known_cases(lm("llama"), [*UNKNOWN, *KNOWN], 1, AnswerCache())
    with pytest.raises(InputError, match="none of them names an old answer"):
        known_cases(lm("llama"), [UNNAMED], 1, AnswerCache())


def test_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = known_cases(lm("llama"), MIXED, 2, AnswerCache())
    monkeypatch.setattr(known, "AT_ONCE", 1)
    assert known_cases(lm("llama"), MIXED, 2, AnswerCache()) == whole


def test_what_the_base_said_is_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    base, answers = lm("llama"), AnswerCache()
    found = known_cases(base, MIXED, None, answers)
    before, asked = dict(answers.ids), []
    real = evaluator.decode
    monkeypatch.setattr(evaluator, "decode", lambda *arguments: asked.append(arguments) or real(*arguments))
    records = score(base, found.cases, [()] * 3, "none", answers=answers)
    assert not asked and {name: answers.ids[name] for name in before} == before
    assert all(r["known"] for r in records) and records == score(base, found.cases, [()] * 3, "none")


def test_what_is_said_where_all_cases_are_scored() -> None:
    base, answers = lm("llama"), AnswerCache()
    evaluator.cache_base_answers(base, MIXED, answers)
    told = known.all_cases(base, MIXED, answers)
    assert told == {"only": False, "cases": 6, "known": 3}
    assert known.say(told) == "known: all 6 cases, of which the base knows the fact in 3"
    assert known.say(known.all_cases(base, [UNNAMED], answers)) == known.say(None) == ""


# -- the command and runs -----------------------------------------------------------------------------------------


def counterfact(folder: Path) -> Path:
    """Two facts that the tiny model knows, and one it does not, in CounterFact's flattened form."""
    path = folder / "facts.json"
    facts = (("The capital of Spain is", "Rome", "Spain"), *((p, old, p.split()[-2]) for p, old in FACTS[:2]))
    records = [
        {"case_id": i, "prompt": prompt, "target_new": "Madrid" if i else "Tokyo", "subject": subject, "ground_truth": old}
        | {"rephrase_prompt": f"In {subject}: {prompt}", "locality_prompt": "In Rome people speak", "locality_ground_truth": "Italian"}
        for i, (prompt, old, subject) in enumerate(facts)
    ]
    path.write_text(json.dumps(records))
    return path


def test_the_command_says_how_many_are_known(tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["score", tiny, "--benchmark", "counterfact", "--data", str(counterfact(tmp_path)), "--method", "none", "--seed", "file"]

    def said(*more: str) -> dict[str, Any]:
        assert main([*argv, "--json", *more]) == 0
        return json.loads(capsys.readouterr().out)

    only = said()
    assert only["known"] == {"only": True, "cases": 2, "looked_at": 3, "without_old_answer": 0} and only["n"] == 2
    assert said("--n", "1")["known"]["looked_at"] == 2, "--n counts the known"
    every = said("--no-known")
    assert every["known"] == {"only": False, "cases": 3, "known": 2} and every["n"] == 3
    assert main([*argv, "--out", str(tmp_path / "out")]) == main([*argv, "--out", str(tmp_path / "all"), "--no-known"]) == 0
    assert "Known: 2 of 3 cases looked at" in capsys.readouterr().out
    assert "known: 2 of 3 cases looked at" in (tmp_path / "out" / "report.md").read_text()
    assert "known: all 3 cases, of which the base knows the fact in 2" in (tmp_path / "all" / "report.md").read_text()
    for name, told in (("out", "only facts that the base knows: 2 of 3 cases looked at"), ("all", "the base knows the fact in 2")):
        assert main(["report", str(tmp_path / name)]) == 0
        assert told in " ".join(capsys.readouterr().out.split())


def test_a_run_keeps_what_was_found(tiny: str, tmp_path: Path) -> None:
    sets = (f"benchmark=[{{name: counterfact, data: {counterfact(tmp_path)}, seed: file}}]", "scenario=[single]", "methods=[none]")
    one, two = (summary(done(tmp_path / name, spec_of(tmp_path, tiny, *sets))) for name in ("one", "one"))
    assert one == two and one["known"]["cases"] == one["n"] == 2 and one["known"]["looked_at"] == 3
    every = summary(done(tmp_path / "every", spec_of(tmp_path, tiny, *sets, "score.known=false")))
    assert every["known"] is None and every["n"] == 3


# -- judges -------------------------------------------------------------------------------------------------------


def short(question: str, wanted: str, answer: str) -> bool:
    return len(answer) < 100


def test_judges_of_the_command(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["score", tiny, "--n", "2", "--method", "none"]
    assert main([*argv, "--judge", "contains", "test_known:short", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["summary"]
    at = {(r["metric"], r["protocol"]): r["value"] for r in rows}
    assert at["reliability", "judged test_known:short@1"] == 1.0
    assert at["reliability", "judged contains@2"] == at["reliability", "contains"]
    for wrong, message in (
        (["--judge", "nobody"], "no judge named 'nobody'"),
        (["--judge", "contains", "contains"], "names one judge twice"),
        (["--judge-model", "x"], "have no meaning without --judge"),
        (["--judge", "contains", "--judge-endpoint", "http://localhost:1/v1"], "belongs to one judge"),
        (["--judge", "big", "--judge-endpoint", "http://localhost:1/v1"], "an endpoint needs model"),
    ):
        assert main([*argv, *wrong]) == 2
        assert message in capsys.readouterr().err
