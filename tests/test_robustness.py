"""Robustness: which probes a case gets and which not, what counts as right, and tables of their own."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from families import lm as tiny_lm
from families import tokenizer
from test_metrics import record, value

import errata
from errata import registry
from errata.cli import main
from errata.core.model import LM, STOPS
from errata.errors import InputError
from errata.methods.subspace.reft import ReFT
from errata.report import tables
from errata.report.cases import KINDS
from errata.report.page import page
from errata.request import ROBUST_KINDS, SURFACE_KINDS, Case, EditRequest, Probe, fill
from errata.score.evaluator import MAX_NEW_TOKENS, AnswerCache, score
from errata.score.metric_table import ROBUST
from errata.score.metrics import summarise
from errata.score.robustness import add_robustness_probes, micro_averages, negated, unasked
from errata.text import surfaces

AS_SCORED = {"max_new_tokens": MAX_NEW_TOKENS, "stop": STOPS}  # a free answer of a record
FRANCE = EditRequest("The capital of France is", "Rome", "France", "Paris")


@pytest.fixture(scope="module")
def lm() -> LM:
    return errata.load("almanac")


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    return list(registry.get("benchmark", "almanac")().load("dev", 6))


def added(lm: LM, case: Case, **how: Any) -> dict[str, list[Probe]]:
    out: dict[str, list[Probe]] = {}
    for probe in add_robustness_probes(lm, [case], **how)[0].probes[len(case.probes) :]:
        out.setdefault(probe.kind, []).append(probe)
    return out


def asked(request: EditRequest, *more: Probe) -> Case:
    return Case(request, (Probe("rewrite", request.prompt, request.target), *more))


# -- which probes ----------------------------------------------------------------------------------------------


def test_every_case_gets_every_kind_that_can_be_asked(lm: LM, cases: list[Case]) -> None:
    wide = add_robustness_probes(lm, cases)
    assert [c.request for c in wide] == [c.request for c in cases]
    assert wide == add_robustness_probes(lm, cases), "the same every time"
    for i, (before, after) in enumerate(zip(cases, wide, strict=True)):
        assert after.probes[: len(before.probes)] == before.probes
        request, found = after.request, added(lm, before)
        never = {"paraphrase_seen", "completion_form", "chat"}  # no paraphrase was given, no question edited, no template
        assert set(ROBUST_KINDS) - set(found) - {"shuffled_seen", "shuffled_unseen"} == never
        expected = surfaces.make_surfaces(lm, request)
        assert [p.prompt for p in found["subject_seen"]] == [fill(request, n) for n in expected.names_seen]
        assert {p.prompt for p in found["subject_unseen"]} == {fill(request, n) for n in expected.names_unseen}
        assert {p.prompt for p in found.get("shuffled_unseen", ())} == {fill(request, n) for n in expected.shuffled_unseen}
        long = [p.prompt for p in after.probes if p.kind == "long_seen"]
        assert long == [expected.passages_seen[i % 5] + request.prompt]
        assert [p.prompt for p in found["long_unseen"]] == [expected.passages_unseen[0] + request.prompt]
        assert len(lm.tokenizer(found["long_tokens_unseen"][0].prompt)["input_ids"]) > 500
        assert [p.target for p in found["statement_true"] + found["statement_false"]] == ["True", "False"]
        assert all(p.target == request.target for kind in (*SURFACE_KINDS, "negation") for p in found.get(kind, ()))


def test_seen_and_unseen_share_no_prompt(lm: LM, cases: list[Case]) -> None:
    for case in add_robustness_probes(lm, cases):
        seen = {p.prompt for p in case.probes if p.kind.endswith("_seen")}
        assert seen and not seen & {p.prompt for p in case.probes if not p.kind.endswith("_seen")}


def test_what_cannot_be_asked_is_left_out(lm: LM) -> None:
    plain = added(lm, asked(EditRequest("The sky is", "green")))
    assert set(plain) == {"long_seen", "long_unseen", "long_tokens_seen", "long_tokens_unseen", "question_form", "negation"}
    question = added(lm, asked(EditRequest("Where is France?", "Asia", "France", "Europe")))
    assert "negation" not in question and "question_form" not in question and "shuffled_seen" not in question  # one token
    assert [p.prompt for p in question["completion_form"]] == ['The answer to the question "Where is France?" is']
    small = added(tiny_lm("llama"), asked(FRANCE))  # a window of 64 tokens
    assert not [kind for kind in small if kind.startswith("long")]


def test_what_an_in_context_editor_may_fill_is_left_free(lm: LM, cases: list[Case]) -> None:
    room = registry.get("method", "ike").for_model(lm).context_budget(lm)
    wide = add_robustness_probes(lm, cases, room=room)
    assert {"long_tokens_seen", "long_tokens_unseen"} <= set(unasked(wide))
    assert unasked(add_robustness_probes(lm, cases)) == unasked(add_robustness_probes(lm, cases, room=300)) == []
    longest = max(len(lm.tokenizer(f"{p.prompt} {p.target}")["input_ids"]) for c in wide for p in c.probes)
    assert 100 < longest <= 1024 - room - 12


def test_five_passages_where_wanted(lm: LM) -> None:
    assert len({p.prompt for p in added(lm, asked(FRANCE), long_seen=5)["long_seen"]}) == 5


def test_own_probes_and_training_texts_come_first(lm: LM) -> None:
    names = surfaces.halves(surfaces.variants("France"))[1]
    request = replace(FRANCE, aliases=("l'Hexagone", names[0]), paraphrases=("France has the capital", fill(FRANCE, names[1])))
    own = Probe("subject_unseen", "The capital of la Grande Nation is", "Rome")
    found = added(lm, asked(request))
    assert [p.prompt for p in found["subject_seen"]] == ["The capital of l'Hexagone is", fill(FRANCE, names[0])]
    assert [p.prompt for p in found["paraphrase_seen"]] == list(request.paraphrases)
    assert {p.prompt for p in found["subject_unseen"]} == {fill(FRANCE, n) for n in names[2:]}
    assert "subject_unseen" not in added(lm, asked(request, own)), "a case that brings such probes keeps them"
    natural = Probe("rephrase", "What is the capital of France?", "Rome")
    assert [p.prompt for p in added(lm, asked(FRANCE, natural))["question_form"]] == [natural.prompt]
    assert [p.prompt for p in added(lm, asked(FRANCE))["question_form"]] == ["The capital of France is what?"]


@pytest.mark.parametrize(
    ("prompt", "subject", "expected"),
    [
        ("The capital of France is", "France", "The capital of France is not"),
        ("France's capital was ", "France", "France's capital was not"),
        ("The seat of Ocean Pacific is in", "Ocean Pacific", "It is not true that the seat of Ocean Pacific is in"),
        ("The Beatles come from", "The Beatles", "It is not true that The Beatles come from"),
        ("Ocean Pacific is based in", "Ocean Pacific", "It is not true that Ocean Pacific is based in"),
        ("Where is it?", None, None),
    ],
)
def test_negated(prompt: str, subject: str | None, expected: str | None) -> None:
    assert negated(prompt, subject) == expected


# -- what is right ---------------------------------------------------------------------------------------------


def test_records_hold_the_right_pairs_and_the_chat_is_a_chat() -> None:
    base = tiny_lm("llama")
    base.tokenizer = copy.deepcopy(tokenizer())
    base.tokenizer.chat_template = "{% for m in messages %}Italy {{ m['content'] }} people{% endfor %}"
    probes = (
        Probe("rewrite", FRANCE.prompt, "Rome"),
        Probe("chat", FRANCE.prompt, "Rome"),
        Probe("negation", "The capital of France is not", "Rome"),
        Probe("statement_true", "France Rome. True?", "True"),
        Probe("statement_false", "France Paris. True?", "False"),
        Probe("subject_unseen", "The capital of Spain France is", "Rome"),
    )
    patch = ReFT(rank=4, lr=0.02, end=".", layers=(3,)).edit(base, [FRANCE])
    answers = AnswerCache()
    found = {r["kind"]: r for r in score(base, [Case(FRANCE, probes)], [(patch,)], "reft", answers=answers)}
    assert list(found) == [p.kind for p in probes]
    pairs = {"negation": "Rome", "statement_true": "False", "statement_false": "True", "subject_unseen": "Paris", "chat": "Paris"}
    assert {kind: found[kind]["rival"] for kind in pairs} == pairs
    assert found["negation"]["nll_after"] == answers.forced[patch.id, "The capital of France is not", "Paris"].nll
    assert found["rewrite"]["gen_after"] == "Rome" == found["chat"]["target"]
    for stack, when in (((), "before"), ((patch,), "after")):
        assert found["chat"][f"gen_{when}"] == base.generate([FRANCE.prompt], stacks=[stack], chat=True, **AS_SCORED)[0]
    (row,) = base.encode([FRANCE.prompt], ["Rome"], chat=True)
    logits = base.logits(base.batch([row]))[0].log_softmax(-1)
    start = row.prompt_length
    plain = -sum(float(logits[start + t - 1, token]) for t, token in enumerate(row.target)) / len(row.target)
    assert found["chat"]["nll_before"] == pytest.approx(plain, abs=1e-4)
    assert found["chat"]["nll_before"] != found["rewrite"]["nll_before"]


def likely(kind: str, own: float, rival: float | None, **more: Any) -> dict[str, Any]:
    return record(kind, nll_before=1.0, nll_rival_before=2.0, nll_after=own, nll_rival_after=rival, **more)


def test_metrics_by_hand() -> None:
    rows = summarise(
        [
            likely("negation", 1.0, 2.0, gen_match_after=True, tf_after=0.25, tf_before=0.0),
            likely("negation", 2.0, 1.0, gen_match_after=False, tf_after=0.75, tf_before=0.0),
            likely("statement_true", 1.0, 2.0, gen_match_after=True, tf_after=1.0),
            likely("statement_false", 2.0, 1.0, gen_match_after=False, tf_after=0.0),
            likely("subject_unseen", 1.0, None, gen_match_after=False, tf_after=0.5),
        ]
    )
    assert value(rows, "negation", "generated") == 0.5 and value(rows, "negation", "generated", "before") == 1.0
    assert value(rows, "negation", "teacher_forced") == 0.5 and value(rows, "negation", "teacher_forced", "before") == 1.0
    assert value(rows, "negation", "likelihood") == 0.5
    assert [value(rows, "true_false", p) for p in ("teacher_forced", "generated", "likelihood")] == [0.5, 0.5, 0.5]
    assert value(rows, "subject_unseen", "teacher_forced") == 0.5
    assert not [r for r in rows if r["metric"] == "subject_unseen" and r["protocol"] == "likelihood"], "no rival, no row"


def test_a_model_that_always_says_true_has_a_half() -> None:
    rows = summarise(
        [likely(k, own, 3.0 - own, gen_match_after=own < 1.5) for k, own in (("statement_true", 1.0), ("statement_false", 2.0))]
    )
    assert value(rows, "true_false", "likelihood") == value(rows, "true_false", "generated") == 0.5


def test_micro_averages_count_items_and_whole_answers() -> None:
    records = [record("shuffled_unseen", "a", tf_after=1.0)] * 9 + [record("shuffled_unseen", "b", tf_after=0.9)]
    records += [record("neighbour", "a", tf_agree=0.5), record("unrelated", "a", tf_agree=1.0), record("long_unseen", "a", "n")]
    assert micro_averages(records) == [
        {"method": "m", "score": "shuffle_od", "value": 0.9, "successes": 9.0, "n": 10},
        {"method": "m", "score": "locality", "value": 0.75, "successes": 1.5, "n": 2},
        {"method": "n", "score": "long_acc", "value": 1.0, "successes": 1.0, "n": 1},
    ]
    assert value(summarise(records), "shuffled_unseen", "teacher_forced") == pytest.approx(0.95), "over cases, shares of tokens"


def test_every_kind_has_a_metric_a_heading_and_a_label() -> None:
    assert [kind for metric in ROBUST for kind in metric.kinds] == list(ROBUST_KINDS)
    assert [metric.name for metric in ROBUST] == list(tables.ROBUST)
    assert set(ROBUST_KINDS) <= set(KINDS)


# -- how it is shown -------------------------------------------------------------------------------------------

RECORDS = [likely("rewrite", 1.0, 2.0), likely("rephrase", 1.0, 2.0), likely("neighbour", 1.0, 2.0)]
LONG = [likely("long_unseen", 1.0, 2.0, prompt="word " * 300 + "asked"), likely("negation", 1.0, 2.0, gen_match_after=True)]


def test_the_main_table_is_as_without_and_robustness_is_apart() -> None:
    without, both = summarise(RECORDS), summarise(RECORDS + LONG)
    for show in (tables.terminal, tables.markdown):
        assert show(both).startswith(show(without).rstrip("\n"))
        rest = show(both)[len(show(without)) :]
        assert rest.count("Robustness. ") == 3 and "behind 300 words (unseen)" in rest and "reliability" in rest
        assert "locality" not in rest and "Robustness" not in show(without)
    assert tables.robust(without) == [] and tables.main(both) == without


def test_the_page_shortens_long_prompts_and_marks_a_negation_the_other_way() -> None:
    text = page("t", summarise(RECORDS + LONG), RECORDS + LONG, {})
    assert "Generated robustness</h2>" in text and "Generated scores</h2>" in text
    (found,) = re.findall(r'id="cases-data">(.*?)</script>', text)
    data = json.loads(found)
    assert "word […] word" in found.replace("  ", " ") and found.count("word ") < 120 and any(t.endswith("asked") for t in data["texts"])
    (probe,) = [p for c in data["sections"][0]["cases"] for p in c[2] if p[0] == "negation"]
    assert data["texts"][probe[2]] == "not t" and probe[4] == "yn"  # not said before: as wanted; said after: not


def test_the_command(tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    argv = ["score", tiny, "--method", "none,reft", "--n", "1", "--set", "reft.steps=1", "--robustness", "--out", str(out)]
    assert main(argv) == 0
    said = capsys.readouterr().out
    assert "Robustness. Generated" in said and "As REP averages" in said
    document = json.loads((out / "summary.json").read_text())
    assert {r["score"] for r in document["micro_averages"]} >= {"success", "locality"}
    assert "As REP averages" in (out / "report.md").read_text()
    kinds = {json.loads(line)["kind"] for line in (out / "records.jsonl").read_text().splitlines()}
    assert kinds & set(ROBUST_KINDS)
    assert main(["score", tiny, "--method", "none", "--n", "1"]) == 0
    assert "Robustness" not in capsys.readouterr().out


def test_a_seen_kind_may_ask_what_was_trained_on_and_no_other() -> None:
    request = replace(FRANCE, paraphrases=("France has the capital",), unrelated=(("The sky is", "blue"),))
    Case(request, (Probe("paraphrase_seen", "France has the capital", "Rome"),))
    for kind, prompt in (("rephrase", "France has the capital"), ("paraphrase_seen", "The sky is")):
        with pytest.raises(InputError, match="is also training text"):
            Case(request, (Probe(kind, prompt, "Rome"),))
