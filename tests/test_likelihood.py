"""ES, PS, NS, S and EM, PM, NM: the arithmetic by hand, and the likelihoods against a plain forward pass of the model."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from families import lm
from test_score import CASES, EDITOR, Counter

from errata.core.model import LM
from errata.errors import InputError
from errata.request import Case, EditRequest, Probe
from errata.score import teacher_forcing
from errata.score.evaluator import AnswerCache, score, teacher_force
from errata.score.metrics import difference, summarise

log = math.log


def record(kind: str, case: str, own: float | None, rival: float | None, method: str = "m", before: tuple[Any, Any] = (3.0, 1.0)) -> Any:
    old = {
        "method": method, "case": case, "kind": kind, "prompt": "p", "target": "t",
        "tf_before": 0.0, "tf_after": 1.0, "tf_agree": 0.5, "gen_before": "x", "gen_after": "t",
        "gen_match_before": False, "gen_match_after": True, "gen_agree": False, "known": True,
    }  # fmt: skip
    return {**old, "nll_before": before[0], "nll_rival_before": before[1], "nll_after": own, "nll_rival_after": rival}


def values(records: list[Any], key: str = "value") -> dict[str, Any]:
    return {r["metric"]: r[key] for r in summarise(records, resamples=50) if r["protocol"] == "likelihood"}


CLOSED = [
    record("rewrite", "a", log(2), log(4)),  # won by 1/2 − 1/4
    record("rewrite", "b", log(10), log(5)),  # lost by 1/5 − 1/10
    record("rephrase", "a", log(2), log(8)),  # 1/2 − 1/8
    record("rephrase", "a", log(8), log(8)),  # a tie is no win
    record("rephrase", "b", log(4), log(5)),  # 1/4 − 1/5
    record("neighbour", "a", log(1), log(2)),  # the neighbour's own answer wins by 1 − 1/2
    record("neighbour", "b", log(4), log(2)),  # the new answer spilled over: 1/4 − 1/2
]


def test_each_metric_by_hand() -> None:
    found = values(CLOSED)
    assert found == pytest.approx(
        {
            "ES": 1 / 2,
            "PS": (1 / 2 + 1) / 2,
            "NS": 1 / 2,
            "S": 3 / (2 + 4 / 3 + 2),
            "EM": (1 / 4 - 1 / 10) / 2,
            "PM": (3 / 16 + 1 / 20) / 2,
            "NM": (1 / 2 - 1 / 4) / 2,
        }
    )
    assert values(CLOSED, "before") == pytest.approx(
        dict.fromkeys(("ES", "PS", "NS", "S"), 0.0) | dict.fromkeys(("EM", "PM", "NM"), math.exp(-3) - math.exp(-1))
    )
    assert values(CLOSED, "n_cases") == dict.fromkeys(found, 2)
    assert values(CLOSED, "n_probes")["S"] == 7


def test_harmonic_mean_is_zero_with_a_zero_and_absent_without_a_kind() -> None:
    assert values([record("rewrite", "a", 2.0, 1.0), *CLOSED[2:]])["S"] == 0.0
    assert set(values(CLOSED[:5])) == {"ES", "PS", "EM", "PM"}
    uneven = [*CLOSED, record("rewrite", "c", 1.0, 2.0)]  # a case with one kind counts for that kind
    assert values(uneven)["S"] == pytest.approx(3 / (3 / 2 + 4 / 3 + 2))
    assert values(uneven, "n_cases")["S"] == 3


def test_records_without_rival_or_older_than_the_fields() -> None:
    none = [record("rewrite", "a", 1.0, None, before=(1.0, None))]
    assert values(none) == {}
    old = [{k: v for k, v in r.items() if not k.startswith("nll")} for r in CLOSED]
    rows = summarise(old)
    assert {r["protocol"] for r in rows} == {"generated", "teacher_forced"} and rows
    mixed = values([*({**r, "case": "old " + r["case"]} for r in old), *none, *CLOSED])
    assert mixed == values(CLOSED)
    no_before = [{k: v for k, v in r.items() if not k.endswith("before") or not k.startswith("nll")} for r in CLOSED]
    assert values(no_before) == values(CLOSED) and set(values(no_before, "before").values()) == {None}


def many(method: str = "m", shift: float = 0.0) -> list[Any]:
    return [
        record(kind, f"c{i:03}", 1.0 + (i * step % 7) / 7 - shift, 1.4, method)
        for i in range(60)
        for kind, step in (("rewrite", 1), ("rephrase", 3), ("neighbour", 5))
    ]


def test_interval_of_s_is_joint_and_the_same_each_time() -> None:
    rows = [r for r in summarise(many()) if r["metric"] == "S"]
    assert rows == [r for r in summarise(list(reversed(many()))) if r["metric"] == "S"]
    (row,) = rows
    assert row["low"] < row["value"] < row["high"]
    # with equal kinds every resample has ES = PS = NS = S, so S has ES's interval, up to Wilson's for the bootstrap's: drawn together
    equal = [record(kind, f"c{i}", 1.0, 1.0 + (-1) ** i) for i in range(30) for kind in ("rewrite", "rephrase", "neighbour")]
    found = {r["metric"]: (r["low"], r["high"]) for r in summarise(equal) if r["protocol"] == "likelihood"}
    assert found["S"] == pytest.approx(found["ES"], abs=0.005) and found["ES"][0] < 0.4


def test_few_cases_with_different_kinds_still_have_an_interval() -> None:
    for resamples in (1, 2, 50):
        for r in summarise([record(k, k, 1.0, 2.0) for k in ("rewrite", "rephrase", "neighbour")], resamples=resamples):
            assert all(math.isfinite(r[key]) for key in ("value", "low", "high"))


def test_difference_of_s_is_paired() -> None:
    same = difference(many("a"), many("b"), "S", "likelihood")
    assert (same["value"], same["low"], same["high"], same["n_cases"]) == (0.0, 0.0, 0.0, 60)
    found = difference(many("a", 0.2), many("b"), "S", "likelihood")
    assert 0 < found["low"] <= found["value"] <= found["high"]
    assert found["value"] == pytest.approx(values(many("a", 0.2))["S"] - values(many("b"))["S"])
    with pytest.raises(InputError, match="no case has S on both sides"):
        difference(CLOSED, [{**r, "case": "z" if r["kind"] == "neighbour" else r["case"]} for r in CLOSED], "S", "likelihood")


# -- the likelihoods themselves ----------------------------------------------------------------------------------


def plain(base: LM, prompt: str, answer: str) -> float:
    """Mean −log p of the answer's tokens, in nats, from one unpadded row through the model itself."""
    tokenizer = base.tokenizer
    whole, start = tokenizer(f"{prompt} {answer}")["input_ids"], len(tokenizer(prompt)["input_ids"])
    with torch.no_grad():
        logs = base.hf(input_ids=torch.tensor([whole])).logits[0].log_softmax(-1)
    return -sum(float(logs[t - 1, whole[t]]) for t in range(start, len(whole))) / (len(whole) - start)


@pytest.mark.parametrize("numbers", [1, 1 << 24])
def test_nll_is_that_of_a_plain_forward(numbers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Targets of one to several tokens in one batch, base and patched rows side by side; also a slice of positions at a time."""
    monkeypatch.setattr(teacher_forcing, "NUMBERS", numbers)
    base = lm("llama", torch.float64)
    patch = EDITOR.edit(base, [CASES[0].request])
    asked = [(c.request.prompt, t) for c in CASES for t in ("Rome", "Tokyo", "Madrid", "Italian")]
    answers = AnswerCache()
    teacher_force(base, [(s, p, t) for p, t in asked for s in ((), (patch,))], answers)
    for prompt, target in asked:
        assert answers.forced["", prompt, target].nll == pytest.approx(plain(base, prompt, target), abs=1e-9)
    with base.under(patch):
        for prompt, target in asked:
            # a raw call takes the whole row for the prompt; the model's own call knows where the answer begins
            encoded = base.encode([prompt], [target])
            logs = base.logits(base.batch(encoded), [(patch,)])[0].log_softmax(-1)
            n = len(encoded[0].target)
            picked = [float(logs[-n - 1 + t, token]) for t, token in enumerate(encoded[0].target)]
            assert answers.forced[patch.id, prompt, target].nll == pytest.approx(-sum(picked) / n, abs=1e-9)
    assert answers.forced["", CASES[0].request.prompt, "Rome"].nll > 1 > answers.forced[patch.id, CASES[0].request.prompt, "Rome"].nll


def test_half_precision_is_summed_in_single() -> None:
    base, half = lm("llama"), lm("llama", torch.bfloat16)
    a, b = AnswerCache(), AnswerCache()
    asked = [((), c.request.prompt, c.request.target) for c in CASES]
    teacher_force(base, asked, a)
    teacher_force(half, asked, b)
    for name, found in a.forced.items():
        assert b.forced[name].nll == pytest.approx(found.nll, rel=0.05, abs=0.05)


def test_a_model_that_says_nan_has_finite_records() -> None:
    base = lm("llama")
    with torch.no_grad():
        base.hf.get_output_embeddings().weight.fill_(math.nan)
    answers = AnswerCache()
    teacher_force(base, [((), "The capital of France is", "Rome")], answers)
    assert answers.forced["", "The capital of France is", "Rome"].nll == teacher_forcing.WORST


def test_which_answer_stands_against_which() -> None:
    base = lm("llama")
    records = {(r["kind"], r["prompt"]): r for r in score(base, CASES, [()] * 3, "none")}
    edited = records["rewrite", "The capital of France is"]
    assert edited["rival"] == "Paris"
    assert edited["nll_after"] == pytest.approx(plain(base, "The capital of France is", "Rome"), abs=1e-4)
    assert (
        edited["nll_rival_after"] == edited["nll_rival_before"] == pytest.approx(plain(base, "The capital of France is", "Paris"), abs=1e-4)
    )
    near = records["neighbour", "The capital of Japan is"]
    assert near["rival"] == "Rome"
    assert near["nll_after"] == pytest.approx(plain(base, "The capital of Japan is", "Tokyo"), abs=1e-4)
    assert near["nll_rival_after"] == pytest.approx(plain(base, "The capital of Japan is", "Rome"), abs=1e-4)
    other = records["unrelated", "The capital of Japan is"]
    assert other["rival"] is None and other["nll_rival_after"] is None and other["nll_after"] == near["nll_after"]
    same = records["neighbour", "The language of Spain is"]  # its own answer is the edit's new one: nothing to compare
    assert same["rival"] is None and same["nll_after"] is not None


def test_each_of_two_edits_of_a_case_stands_against_its_own_old_answer() -> None:
    requests = [EditRequest("The capital of France is", "Lyon", old="Paris"), EditRequest("The capital of Italy is", "Lyon", old="Rome")]
    case = Case(requests[0], tuple(Probe("rewrite", r.prompt, r.target) for r in requests), (requests[1],))
    assert [r["rival"] for r in score(lm("llama"), [case], [()], "none")] == ["Paris", "Rome"]


def test_without_a_rival_and_without_a_target() -> None:
    case = Case(
        EditRequest("The capital of France is", "Rome"),
        (
            Probe("rewrite", "The capital of France is", "Rome"),
            Probe("rephrase", "The capital of Spain is"),
            Probe("neighbour", "The capital of Japan is"),
        ),
    )
    records = score(lm("llama"), [case], [()], "none")
    assert [r["rival"] for r in records] == [None] * 3
    assert all(math.isfinite(r["nll_after"]) and r["nll_rival_after"] is None for r in records)
    assert {r["protocol"] for r in summarise(records)} == {"starts", "generated", "contains", "teacher_forced"}


def test_rivals_cost_rows_not_passes() -> None:
    base = lm("llama")
    patches = EDITOR.edit_each(base, [c.request for c in CASES])
    bare = [Case(EditRequest(c.request.prompt, c.request.target, c.request.subject), c.probes) for c in CASES]
    counter = Counter(base)
    score(base, bare, [(p,) for p in patches], "reft")
    without, counter.passes = counter.passes, 0
    records = score(base, CASES, [(p,) for p in patches], "reft")
    assert counter.passes == without
    found = {r["metric"]: r for r in summarise(records) if r["protocol"] == "likelihood"}
    assert found["ES"]["value"] == 1.0 and found["ES"]["before"] == 0.0 and found["EM"]["value"] > 0.5 > found["EM"]["before"]
    assert "S" not in found, "no rephrase was asked"
