"""Queries and scenarios: the same answers as one at a time, in far fewer passes, scored at the right moment."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import lm

from errata import run
from errata.core.model import LM
from errata.errors import ConfigError
from errata.methods.subspace.baft import BaFT
from errata.methods.subspace.reft import ReFT
from errata.request import Case, EditRequest, Probe
from errata.score import evaluator
from errata.score.evaluator import AnswerCache, ask, score, tokens_to_ask

CASES = [
    Case(
        EditRequest("The capital of France is", "Rome", "France", "Paris"),
        (
            Probe("rewrite", "The capital of France is", "Rome"),
            Probe("neighbour", "The capital of Japan is", "Tokyo"),
            Probe("unrelated", "In Rome people speak"),
        ),
    ),
    Case(
        EditRequest("The language of Italy is", "Spanish", "Italy", "Italian"),
        (
            Probe("rewrite", "The language of Italy is", "Spanish"),
            Probe("neighbour", "The language of Spain is", "Spanish"),
            Probe("unrelated", "The capital of Japan is", "Tokyo"),
        ),
    ),
    Case(
        EditRequest("The capital of Spain is", "Tokyo", "Spain", "Madrid"),
        (Probe("rewrite", "The capital of Spain is", "Tokyo"), Probe("neighbour", "The capital of France is", "Paris")),
    ),
]
# A likelihood rounds differently in a batch of another shape; everything else is equal to the last bit.
LIKELIHOODS = ("nll_before", "nll_after", "nll_rival_before", "nll_rival_after")
EDITOR = ReFT(rank=4, lr=0.02, end=".", layers=(3,))


def same(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> bool:
    def exact(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{k: v for k, v in r.items() if k not in LIKELIHOODS} for r in records]

    close = all(r[k] == pytest.approx(s[k], abs=1e-4) for r, s in zip(one, other, strict=True) for k in LIKELIHOODS)
    return close and exact(one) == exact(other)


class Counter:
    """Forward passes of a model."""

    def __init__(self, base: LM) -> None:
        self.passes = 0
        self.handle = base.hf.register_forward_pre_hook(self.count)

    def count(self, *_: object) -> None:
        self.passes += 1


def test_routed_scores_are_those_of_each_case_alone() -> None:
    base = lm("llama")
    patches = EDITOR.edit_each(base, [c.request for c in CASES])
    together = score(base, CASES, [(p,) for p in patches], "reft")
    alone = [r for case, patch in zip(CASES, patches, strict=True) for r in score(base, [case], [(patch,)], "reft")]
    assert same(together, alone)
    rewrite = [r for r in together if r["kind"] == "rewrite"]
    assert all(r["tf_after"] == 1.0 and r["gen_match_after"] and not r["gen_match_before"] and r["known"] for r in rewrite)
    assert all(r["tf_before"] == 1.0 and r["gen_match_before"] for r in together if r["kind"] == "neighbour")


def test_an_empty_stack_agrees_with_the_base() -> None:
    for record in score(lm("llama"), CASES, [()] * 3, "none"):
        assert record["tf_agree"] == 1.0 and record["gen_agree"] and record["tf_before"] == record["tf_after"]


def test_many_edits_do_not_take_many_times_the_passes() -> None:
    base = lm("llama")
    patches = EDITOR.edit_each(base, [c.request for c in CASES])
    counter = Counter(base)
    score(base, CASES[:1], [(patches[0],)], "reft")
    one, counter.passes = counter.passes, 0
    score(base, CASES, [(p,) for p in patches], "reft")
    assert counter.passes <= one + 4  # a few more tokens until the longest answer ends; not three times as many


def test_the_base_is_asked_once_for_all_methods() -> None:
    base = lm("llama")
    patches = EDITOR.edit_each(base, [c.request for c in CASES])
    answers = AnswerCache()
    first = score(base, CASES, [(p,) for p in patches], "a", answers=answers)
    counter = Counter(base)
    again = score(base, CASES, [(p,) for p in patches], "b", answers=answers)
    assert counter.passes == 0
    assert [{**r, "method": "b"} for r in first] == again


def test_single() -> None:
    base = lm("llama")
    told: list[tuple[str, int, int]] = []
    patches, records = run.single(base, EDITOR, CASES, lambda *step: told.append(step))
    assert [p.requests for p in patches] == [(c.request,) for c in CASES]
    assert len(records) == 8 and {r["case"] for r in records} == {c.request.id for c in CASES}
    assert ("editing", 3, 3) in told and told[-1][0] == "scoring"
    assert all(0 <= done <= total for _, done, total in told)


def test_free_tokens_are_those_of_plain_greedy_decoding() -> None:
    """As EasyEdit's vanilla generation: n greedy tokens beside the n tokens of the target (no target here holds a full stop)."""
    base = lm("llama")
    patches = EDITOR.edit_each(base, [c.request for c in CASES])
    records = score(base, CASES, [(p,) for p in patches], "reft", answers=AnswerCache(free_tokens=True))
    pairs = [(patch, probe) for patch, case in zip(patches, CASES, strict=True) for probe in case.probes if probe.target]
    checked = [r for r in records if r["target"]]
    for (patch, probe), record in zip(pairs, checked, strict=True):
        row = base.encode([probe.prompt], [probe.target])[0]
        ids = torch.tensor([row.ids[: row.prompt_length]])
        n = len(row.target)
        said = {}
        for when, on in (("before", ()), ("after", (patch,))):
            with base.under(*on):
                said[when] = base.hf.generate(ids, max_new_tokens=n, min_new_tokens=n, do_sample=False)[0, ids.shape[1] :].tolist()
            assert record[f"free_{when}"] == sum(a == b for a, b in zip(said[when], row.target, strict=True)) / n
        assert record["free_agree"] == sum(a == b for a, b in zip(said["before"], said["after"], strict=True)) / n
    assert {r["free_after"] for r in checked if r["kind"] == "rewrite"} == {1.0}
    assert "free_after" not in score(base, CASES, [(p,) for p in patches], "reft")[0]


@pytest.mark.parametrize("editor", [EDITOR, BaFT(**{**BaFT.PRESETS["published"], "rank": 4, "lr": 0.02, "end": "."})], ids=["reft", "baft"])
def test_continual_scores_the_final_stack_and_right_after(editor: ReFT | BaFT) -> None:
    base = lm("llama")
    stack, at, immediate = run.continual(base, editor, CASES, [1, 3])
    assert len(stack) == 1 and len(stack[0].requests) == 3  # each patch went on from the last and replaced it
    assert {m: len({r["case"] for r in records}) for m, records in at.items()} == {1: 1, 3: 3}
    assert same(at[3], score(base, CASES, [stack] * 3, editor.name))
    right_after = [r for r in immediate if r["kind"] == "rewrite"]
    assert len(right_after) == 3 and all(r["tf_after"] == 1.0 for r in right_after)
    assert at[1] == immediate[: len(at[1])]


def test_batched_edits_jointly_on_the_growing_stack() -> None:
    base = lm("llama")
    stack, records = run.batched(base, ReFT(rank=6, batched_lr=0.02, end="."), CASES, 2)
    assert stack[0].requests == tuple(c.request for c in CASES) and len(records) == 8
    assert sum(r["gen_match_after"] for r in records if r["kind"] == "rewrite") >= 2


@pytest.mark.parametrize("marks", [[], [0], [2, 1], [1, 9], [1, 1]])
def test_marks_that_cannot_be(marks: list[int]) -> None:
    with pytest.raises(ConfigError, match="marks must rise"):
        run.continual(lm("llama"), EDITOR, CASES, marks)


def test_a_batch_of_nothing() -> None:
    with pytest.raises(ConfigError, match="at least one edit"):
        run.batched(lm("llama"), EDITOR, CASES, 0)
    assert run.single(lm("llama"), EDITOR, []) == ([], [])


# -- free text, read as people read it --------------------------------------------------------------------------------

LONG = "Rome " * 30


class Says:
    """The words a model says after any prompt, whatever it would have said."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, base: LM, before: str, after: str) -> None:
        real, ids = evaluator.decode, {k: base.tokenizer(v, add_special_tokens=False)["input_ids"] for k, v in (("", before), ("p", after))}
        self.limits: list[int] = []

        def decode(prefilled: Any, limits: Any, stop: Any) -> list[list[int]]:
            assert len(real(prefilled, limits, stop)) == len(limits)
            self.limits += limits
            return [ids[self.stack][:limit] for limit in limits]

        monkeypatch.setattr(evaluator, "decode", decode)
        self.stack = ""


def free(monkeypatch: pytest.MonkeyPatch, before: str, after: str, *probes: Probe) -> list[dict[str, Any]]:
    """Records of a model that says ``before`` unedited and ``after`` edited, and never stops."""
    base = lm("llama")
    (patch,) = EDITOR.edit_each(base, [CASES[0].request])
    says, answers = Says(monkeypatch, base, before, after), AnswerCache()
    case = Case(CASES[0].request, probes)
    evaluator.cache_base_answers(base, [case], answers)
    says.stack = "p"
    return score(base, [case], [(patch,)], "m", answers=answers)


def test_a_base_model_that_says_the_answer_and_goes_on_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = CASES[0].request.prompt
    (record,) = free(monkeypatch, "Paris and Rome and Tokyo", "Rome and Paris", Probe("rewrite", prompt, "Rome"))
    assert (record["starts_before"], record["starts_after"]) == (False, True)
    assert (record["gen_match_before"], record["gen_match_after"]) == (False, False)
    assert (record["contains_before"], record["contains_after"]) == (True, True)
    assert record["known"], "the base's answer begins with the truth"
    assert not record["answer_agree"] and not record["first_word_agree"]


def test_locality_is_on_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    probes = (
        Probe("neighbour", "The capital of Japan is", "Tokyo", ("Kyoto", "Tokyo and Rome")),
        Probe("unrelated", "The capital of Spain is", "Tokyo and Rome"),
        Probe("unrelated", "In Rome people speak"),
    )
    short, long, none = free(monkeypatch, "Tokyo and Paris", "Tokyo and Rome", *probes)
    assert short["answer_agree"] and short["known"] and not short["gen_agree"] and short["first_word_agree"]
    assert not long["answer_agree"] and not long["known"] and long["starts_after"] and long["first_word_agree"]
    assert not none["answer_agree"], "where nothing is wanted, the base's whole answer is"


def test_a_long_answer_has_room(monkeypatch: pytest.MonkeyPatch) -> None:
    base, prompt = lm("llama"), "The capital of Japan is"
    needed = len(base.tokenizer(LONG, add_special_tokens=False)["input_ids"])
    assert tokens_to_ask(base, [LONG, "Rome"]) == needed + 4 > evaluator.MAX_NEW_TOKENS == tokens_to_ask(base, ["Rome"])
    long, short = free(monkeypatch, LONG + "and", LONG + "Rome", Probe("neighbour", prompt, LONG.strip()), Probe("alias", prompt, "Rome"))
    assert long["starts_before"] and long["starts_after"] and long["answer_agree"] and not long["gen_agree"]
    assert short["starts_after"] and short["gen_agree"], "a probe with a short answer sees no more than if it had been asked alone"
    assert len(short["gen_after"]) < len(long["gen_after"])


def test_rows_of_a_batch_end_at_their_own_limit() -> None:
    base, answers = lm("llama"), AnswerCache()
    ask(base, [((), c.request.prompt, (), n) for c, n in zip(CASES, (1, 2, 30), strict=True)], answers)
    whole = AnswerCache()
    ask(base, [((), c.request.prompt, (), 30) for c in CASES], whole)
    for case, n in zip(CASES, (1, 2, 30), strict=True):
        name = "", case.request.prompt
        assert answers.ids[name] == whole.ids[name][:n] and answers.said(base, name, n) == whole.said(base, name, n)
        assert answers.has(name, n) and answers.limits[name] == n
    before = dict(answers.ids)
    ask(base, [((), c.request.prompt, (), 1) for c in CASES], answers)
    assert answers.ids == before, "what is there is not asked again"
