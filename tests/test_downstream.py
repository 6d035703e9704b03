"""Scoring what files bring: changes of several edits, accepted answers, new kinds of probes, ConvSent's score, choices, questions."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from families import lm
from tiny import FRANCE, write_piqa

from errata import run
from errata.benchmarks.downstream import MultipleChoice, Question
from errata.benchmarks.files import open_benchmark
from errata.errors import InputError
from errata.methods.subspace.reft import ReFT
from errata.request import Case, EditRequest, Probe
from errata.score import downstream, evaluator
from errata.score.evaluator import AnswerCache, score
from errata.score.metrics import METRICS, summarise
from errata.score.sentiment import scores

SAMPLES = Path(__file__).parent / "data" / "benchmarks"
EDITOR = ReFT(rank=4, lr=0.02, end=".", layers=(3,), batched_lr=0.02)
ROME = EditRequest(FRANCE, "Rome", "France", "Paris")
FRENCH = EditRequest("The language of Italy is", "French", "Italy", "Italian")
TWO = Case(ROME, (Probe("rewrite", FRANCE, "Rome"), Probe("rewrite", FRENCH.prompt, "French")), (FRENCH,))
ONE = Case(EditRequest("The capital of Spain is", "Tokyo", "Spain", "Madrid"), (Probe("rewrite", "The capital of Spain is", "Tokyo"),))


# -- a change of several edits -----------------------------------------------------------------------------------


def test_single_writes_the_edits_of_a_case_together() -> None:
    base = lm("llama")
    patches, records = run.single(base, EDITOR, [ONE, TWO, ONE])
    assert [p.requests for p in patches] == [(ONE.request,), (ROME, FRENCH), (ONE.request,)]
    assert all(r["gen_match_after"] and not r["gen_match_before"] for r in records)


def test_batches_and_continual_runs_write_every_edit() -> None:
    base = lm("llama")
    stack, _ = run.batched(base, EDITOR, [ONE, TWO], 2)
    assert [r for p in stack for r in p.requests] == [ONE.request, ROME, FRENCH]
    stack, at, _ = run.continual(base, EDITOR, [ONE, TWO], [2])
    assert set(stack[-1].requests) >= {ROME, FRENCH} and len(at[2]) == 3


def test_a_change_of_several_edits_is_one_case_in_records() -> None:
    base = lm("llama")
    records = score(base, [TWO, Case(ROME, TWO.probes[:1])], [(), ()], "none")
    assert [r["case"] for r in records] == [TWO.id, TWO.id, ROME.id] and TWO.id != ROME.id
    assert [r["rival"] for r in records] == ["Paris", "Italian", "Paris"]  # each against its own old answer
    assert records[0]["known"]
    unknown = Case(ROME, TWO.probes, (EditRequest(FRENCH.prompt, "French", "Italy", "Spanish"),))
    assert not score(base, [unknown], [()], "none")[0]["known"]  # the base does not say all the old answers


def test_a_probe_may_not_be_any_edited_prompt_or_training_text_of_the_change() -> None:
    with pytest.raises(InputError, match="is the edited prompt itself"):
        Case(ROME, (Probe("rephrase", FRENCH.prompt, "x"),), (FRENCH,))
    taught = EditRequest(FRENCH.prompt, "French", paraphrases=("Italy speaks",))
    with pytest.raises(InputError, match="is also training text"):
        Case(ROME, (Probe("unrelated", "Italy speaks"),), (taught,))


# -- accepted answers ---------------------------------------------------------------------------------------------


def test_a_free_answer_may_be_any_accepted_one() -> None:
    base = lm("llama")
    probes = (Probe("two_hop", FRANCE + " not", "x"), Probe("neighbour", "The capital of Japan is", "Edo", ("Kyoto", "Tokyo")))
    case = Case(ROME, (*probes, Probe("unrelated", "The capital of Spain is", "Edo", ("Kyoto",))))
    _, accepted, wrong = score(base, [case], [()], "none")
    assert accepted["gen_match_before"] and accepted["gen_match_after"] and accepted["known"] and accepted["also"] == ["Kyoto", "Tokyo"]
    assert not wrong["gen_match_before"] and not wrong["known"]
    assert accepted["tf_after"] < 1  # what is forced is the first answer
    with pytest.raises(InputError, match=r"also\[0\] is empty"):
        Probe("alias", "x", "y", ("",))


# -- new kinds ----------------------------------------------------------------------------------------------------


def record(kind: str, case: str = "c", **fields: Any) -> dict[str, Any]:
    base = {"method": "m", "case": case, "kind": kind, "prompt": "p", "target": "t", "known": True}
    for when in ("before", "after"):
        base |= {f"tf_{when}": 0.0, f"gen_match_{when}": False}
    return {**base, "tf_agree": 0.0, "gen_agree": False, **fields}


def table(records: list[dict[str, Any]], protocol: str) -> dict[str, float]:
    return {r["metric"]: r["value"] for r in summarise(records, resamples=10) if r["protocol"] == protocol}


def test_new_kinds_have_their_own_rows_and_join_portability_and_locality() -> None:
    records = [
        record("two_hop", tf_after=1.0),
        record("multi_hop", tf_after=0.5),
        record("logical", tf_after=0.0),
        record("sub_fact", tf_after=0.25),
        record("out_of_domain", tf_after=0.75, gen_match_after=True),
        record("same_subject", tf_agree=1.0, tf_after=0.5),
        record("forgetfulness", tf_agree=0.0, tf_after=0.25),
        record("distracting", tf_agree=1.0, tf_after=0.125),
    ]
    assert table(records, "teacher_forced") == pytest.approx(
        {
            "portability": 0.5, "two_hop": 1.0, "multi_hop": 0.5, "logical": 0.0, "sub_fact": 0.25, "out_of_domain": 0.75,
            "locality_agreement": 0.5, "locality_correct": 0.375, "locality_correct_known": 0.375,
            "same_subject": 1.0, "forgetfulness": 0.0, "distracting": 0.125,
        }
    )  # fmt: skip
    assert "out_of_domain" not in table(records, "generated")  # nobody writes that text word by word


def test_as_before_is_no_truth() -> None:
    local = [record("unrelated", target=None, tf_after=1.0, tf_agree=0.5), record("unrelated", tf_after=0.0, tf_agree=0.5)]
    found = table(local, "teacher_forced")
    assert found["locality_agreement"] == 0.5 and found["locality_correct"] == found["locality_correct_known"] == 0.0
    assert "locality_correct" not in table(local[:1], "teacher_forced")


def test_convsent_by_hand() -> None:
    def reply(kind: str, before: float, after: float) -> dict[str, Any]:
        return record(kind, nll_before=before, nll_after=after, nll_rival_before=None, nll_rival_after=None)

    records = [reply("same_sentiment", 2, 3), reply("same_sentiment", 4, 4), reply("opposite_sentiment", 2, 6)]
    ((before, after),) = [(r["sentiment_before"], r["sentiment_after"]) for r in scores(records)]
    assert before == pytest.approx(1 / (1 + math.exp(1)))  # same −3, opposite −2
    assert after == pytest.approx(1 / (1 + math.exp(-2.5)) * math.exp(-0.5))  # same −3.5, opposite −6; same has lost 0.5
    gained = [reply("same_sentiment", 4, 1), reply("opposite_sentiment", 2, 6)]
    assert scores(gained)[0]["sentiment_after"] == pytest.approx(1 / (1 + math.exp(-5)))  # never more than 1 for what it gained
    assert scores(records[:2]) == []
    far = [reply("same_sentiment", 1, 1000), reply("opposite_sentiment", 1, 1)]
    assert scores(far)[0]["sentiment_after"] == 0.0
    (row,) = [r for r in summarise(records, resamples=10) if r["metric"] == "sentiment"]
    assert (row["protocol"], row["value"], row["before"], row["n_cases"]) == ("likelihood", pytest.approx(after), pytest.approx(before), 1)


# -- without edits ------------------------------------------------------------------------------------------------


def nll(base: Any, prompt: str, text: str) -> float:
    """By a plain forward pass of the one row."""
    row = base.encode([prompt], [text])[0]
    ids = torch.tensor([row.ids])
    logits = base.hf(ids).logits[0, row.prompt_length - 1 : -1].log_softmax(-1)
    return -float(logits.gather(1, torch.tensor(row.target)[:, None]).mean())


def forced(base: Any, patch: Any, prompt: str, text: str) -> float:
    """As a probe of that answer alone is forced."""
    answers = AnswerCache()
    evaluator.teacher_force(base, [((patch,), prompt, text)], answers)
    return next(iter(answers.forced.values())).nll


def test_choices_are_weighed_by_the_mean_over_their_tokens() -> None:
    base = lm("llama")
    items = [
        MultipleChoice(FRANCE, ("Rome", "Paris"), 1),
        MultipleChoice(FRANCE, ("Tokyo", "Rome"), 1),
        MultipleChoice("The capital of Japan is", ("Tokyo", "Paris"), 1),
    ]
    (patch,) = EDITOR.edit_each(base, [ROME])
    answers = AnswerCache()
    records = downstream.choices(base, items, (patch,), "reft", answers)
    for item, r in zip(items, records, strict=True):
        assert r["nll_before"] == pytest.approx([nll(base, item.prompt, text) for text in item.choices], abs=1e-4)
        assert r["nll_after"] == pytest.approx([forced(base, patch, item.prompt, text) for text in item.choices], abs=1e-4)
    assert [r["right_before"] for r in records] == [True, records[1]["right_before"], False]
    assert [r["right_after"] for r in records] == [False, True, False]
    (row,) = summarise(records, resamples=10)
    assert (row["metric"], row["protocol"], row["n_cases"]) == ("choices", "likelihood", 3) and row["value"] == pytest.approx(1 / 3)
    asked = len(answers.forced)
    downstream.choices(base, items, (patch,), "again", answers)
    assert len(answers.forced) == asked


def test_questions_take_any_accepted_answer() -> None:
    base = lm("llama")
    items = [Question(FRANCE, ("Lutetia", "Paris")), Question("The capital of Japan is", ("Kyoto",))]
    (patch,) = EDITOR.edit_each(base, [ROME])
    records = downstream.questions(base, items, (patch,), "reft")
    assert [(r["gen_match_before"], r["gen_match_after"]) for r in records] == [(True, False), (False, False)]
    rows = summarise(records, resamples=10)
    assert [(r["metric"], r["protocol"], r["value"], r["before"]) for r in rows] == [
        ("questions", protocol, 0.0, 0.5) for protocol in ("starts", "generated", "contains")
    ]


def test_piqa_and_its_labels(tmp_path: Path) -> None:
    whole = [MultipleChoice(FRANCE, ("Rome", "Paris"), 1), MultipleChoice("The capital of Japan is", ("Tokyo", "Rome"), 0)]
    assert list(open_benchmark("piqa", write_piqa(tmp_path)).load(seed=None)) == whole
    assert list(open_benchmark("piqa", tmp_path).load("valid", seed=None)) == whole
    for labels, message in (
        ("1\n", r"valid-labels.lst: 1 labels for 2 records"),
        ("1\n2\n", r"valid-labels.lst:2: a label must be 0 or 1, not '2'"),
    ):
        with pytest.raises(InputError, match=message):
            open_benchmark("piqa", write_piqa(tmp_path, labels)).load()
    (tmp_path / "valid-labels.lst").unlink()
    with pytest.raises(InputError, match=r"has no labels; put valid-labels.lst \(0 or 1 a line\) beside it"):
        open_benchmark("piqa", write_piqa(tmp_path, None)).load()
    assert {c.answer for c in open_benchmark("piqa", write_piqa(tmp_path, None, label=1)).load()} == {1}
    with pytest.raises(InputError, match="record 1: label must be 0 or 1, not 2"):
        open_benchmark("piqa", write_piqa(tmp_path, None, label=2)).load()
    with pytest.raises(InputError, match="record 1: label must be 0 or 1, not -1"):
        open_benchmark("piqa", write_piqa(tmp_path, None, label=-1)).load()


def test_piqa_fetches_its_labels_from_where_it_fetched_its_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    folders = {"valid.jsonl": write_piqa(tmp_path).parent, "valid-labels.lst": tmp_path / "elsewhere"}
    folders["valid-labels.lst"].mkdir()
    (tmp_path / "valid-labels.lst").rename(folders["valid-labels.lst"] / "valid-labels.lst")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda _, path, **how: str(folders[path] / path))
    assert [c.answer for c in open_benchmark("piqa", "hub:a/b/valid.jsonl@v1").load(seed=None)] == [1, 0]


@pytest.mark.parametrize("name", ["nq-open", "known1000"])
def test_items_come_in_an_order_of_the_seed(name: str) -> None:
    path = SAMPLES / ("nq-open.jsonl" if name == "nq-open" else "known1000.json")
    every = list(open_benchmark(name, path).load())
    assert len(every) == 5 and every[:3] == list(open_benchmark(name, path).load(n=3))
    own = list(open_benchmark(name, path).load(seed=None))
    assert own != every and [item.prompt for item in own][:1] == [json.loads(path.read_text().strip("[\n]").split("\n")[0].rstrip(","))[
        "question" if name == "nq-open" else "prompt"
    ]]  # fmt: skip


def test_every_kind_of_probe_is_counted_by_some_metric() -> None:
    from errata.request import PROBE_KINDS, SENTIMENT

    counted = {kind for metric in METRICS.values() for kind in metric.kinds}
    assert set(PROBE_KINDS) - set(SENTIMENT) <= counted and "sentiment" in counted
