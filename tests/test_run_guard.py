"""The health guard, forgetting by age, and judges."""

from __future__ import annotations

import dataclasses
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from families import SENTENCES, lm
from made import made
from own import Tiny
from runs import FILE, cell, differences, done, records, spec_of, stop_at, summary

from errata.cli import main
from errata.core.loading import load
from errata.core.patch import Op, Patch
from errata.errors import ConfigError, JudgeError
from errata.methods.subspace.reft import ReFT
from errata.run import executors
from errata.run.guard import GuardSpec, HealthGuard
from errata.run.parts import settled
from errata.score import judges
from errata.score.forgetting import ages, forgetting
from errata.score.metrics import difference, summarise
from errata.score.perplexity import perplexity, perplexity_and_kl

TEXT = " . ".join(f"{p} {a}" for p, a in SENTENCES) + " ."
VANDAL = FILE.replace("name: reft, label: quick, set: {", "name: 'own:Vandal', label: quick, set: {breaks: [4, 7], ")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "held.txt"
    path.write_text(TEXT)
    return path


def guarded(text: Path, action: str, every: int = 8) -> str:
    return f"guard={{every: {every}, action: {action}, text: {text}, tokens: 40, length: 40, perplexity: 100, kl: 1.0}}"


def names(wrong: list[int]) -> list[tuple[str, str]]:
    cases = list(Tiny().load(n=9))
    return [(cases[i - 1].request.prompt, cases[i - 1].request.target) for i in wrong]


# -- what is measured ------------------------------------------------------------------------------------------


def test_health_is_perplexity_and_the_divergence_of_whole_distributions() -> None:
    base, patch = lm("llama"), made(lm("llama"), 3)
    first, edited, kl = perplexity_and_kl(base, TEXT, (patch,), 40, 20)
    for mine, stack in ((first, ()), (edited, (patch,))):
        (other,) = perplexity(base, TEXT, [stack], 40, 20)
        assert mine.nll == pytest.approx(other.nll, abs=1e-6) and mine.tokens == other.tokens
    ids = base.tokenizer([TEXT], add_special_tokens=False)["input_ids"][0]
    total = count = 0.0
    for start in range(0, len(ids[:40]) - 19, 20):
        row = torch.tensor([[1, *ids[start : start + 20]]])
        with torch.no_grad():
            p = base.hf(row).logits[0, :-1].double().softmax(-1)
            with base.under(patch):
                q = base.hf(row, attention_mask=torch.ones_like(row)).logits[0, :-1].double().softmax(-1)
        total += float((p * (p.log() - q.log())).sum())
        count += len(p)
    # a raw call takes the prompt to end where its mask ends; a change of weights runs everywhere all the same
    assert kl == pytest.approx(total / count, rel=1e-3) and kl > 0.005
    assert perplexity_and_kl(base, TEXT, (), 40, 20)[2] == pytest.approx(0.0, abs=1e-7)


def test_numbers_that_are_not_finite_are_not_healthy(text: Path) -> None:
    base = lm("llama", torch.float16)  # in float32 no patch that may be attached leaves what is finite
    guard = HealthGuard(base, GuardSpec(text=str(text), tokens=40, length=40))
    wild = made(base, 1)
    wild = dataclasses.replace(wild, ops=tuple(Op(o.kind, o.site, {k: t * 1e10 for k, t in o.tensors.items()}) for o in wild.ops))
    found = guard((wild,))
    assert not found.healthy and "not finite" in str(found) and json.loads(json.dumps(found.to_dict()))["kl"] is None
    assert guard(()).healthy
    assert not HealthGuard(base, GuardSpec(text=str(text), tokens=40, length=40, perplexity=1e9, kl=1e-6))((made(base, 2),)).healthy


# -- what is done about it -------------------------------------------------------------------------------------


def test_rollback_takes_back_the_edits_that_broke_the_model_by_name(
    tiny: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"model: {tiny}\n{VANDAL}")
    assert main(["run", str(path), "--out", str(tmp_path / "guarded"), "--set", guarded(text, "rollback")]) == 0
    said = capsys.readouterr().out
    found = summary(tmp_path / "guarded")
    assert [(u["edit"], (u["prompt"], u["target"])) for u in found["undone"]] == [(4, names([4])[0]), (7, names([7])[0])]
    for prompt, target in names([4, 7]):
        assert f"{prompt!r} → {target!r} was taken back: perplexity" in said
    assert all(h["healthy"] for h in found["health"]) and found["health"][-1]["T"] == 9
    marked = {r["case"] for r in records(tmp_path / "guarded") if "undone" in r}
    cases = list(Tiny().load(n=9))
    assert marked == {cases[3].request.id, cases[6].request.id}
    # the edits that stay are those of a run in which the broken ones never were
    kept = [c.request for i, c in enumerate(cases) if i not in (3, 6)]
    base, stack = load(tiny), ()  # read from the same file: weights that lie elsewhere in memory round differently
    for request in kept:
        stack = (settled(ReFT(rank=2, lr=0.02, steps=6, layers=(3,)).edit(base, [request], on=stack)),)
    last = Patch.load(cell(tmp_path / "guarded") / "patches" / "0000009")
    assert last.requests == tuple(kept) and last.id == stack[0].id
    after = {r["case"]: r for r in records(tmp_path / "guarded") if r["edits"] == 9 and r["kind"] == "rewrite"}
    assert len(after) == 9  # those taken back are asked for all the same


def test_an_edit_that_cannot_be_made_is_taken_back_too(tiny: str, text: Path, tmp_path: Path) -> None:
    spec = spec_of(tmp_path, tiny, guarded(text, "rollback", 3), text=VANDAL.replace("breaks: [4, 7]", "breaks: [4], fails: [2, 5]"))
    found = summary(done(tmp_path / "run", spec))
    assert sorted((u["edit"], u["why"][:10]) for u in found["undone"]) == [(2, "edit 2 wen"), (4, "taken back"), (5, "edit 5 wen")]


def test_a_rolled_back_run_goes_on_after_a_stop_with_the_same_bytes(tiny: str, text: Path, tmp_path: Path) -> None:
    spec = spec_of(tmp_path, tiny, guarded(text, "rollback", 3), text=VANDAL)
    whole, stops = done(tmp_path / "whole", spec), 0
    while True:
        with pytest.MonkeyPatch.context() as patched:
            stop_at(patched, 8 + 4 * stops)
            try:
                done(tmp_path / "stopped", spec)
                break
            except KeyboardInterrupt:
                stops += 1
    assert stops and differences(whole, tmp_path / "stopped") == []


def test_stop_ends_the_cell_and_scores_what_there_is(tiny: str, text: Path, tmp_path: Path) -> None:
    found = summary(done(tmp_path / "run", spec_of(tmp_path, tiny, guarded(text, "stop", 3), text=VANDAL)))
    assert found["stopped"] and found["edits"] == 5 and [h["healthy"] for h in found["health"]] == [True, True, False]
    assert {r["edits"] for r in records(tmp_path / "run")} == {2, 5, "right after its own"}


def test_warn_says_so_and_goes_on(tiny: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"model: {tiny}\n{VANDAL}")
    assert main(["run", str(path), "--out", str(tmp_path / "out"), "--set", guarded(text, "warn")]) == 0
    assert "warning: the model is no longer healthy (T 5, perplexity" in capsys.readouterr().out
    assert summary(tmp_path / "out")["edits"] == 9 and not summary(tmp_path / "out")["stopped"]


# -- forgetting ------------------------------------------------------------------------------------------------


def rewrite(case: int, holds: bool, **more: Any) -> dict[str, Any]:
    return {"method": "m", "case": str(case), "kind": "rewrite", "gen_match_after": holds, "tf_after": 1.0 if holds else 0.5, **more}


def test_forgetting_by_age() -> None:
    assert ages(1) == [(0, 0)] and ages(25) == [(0, 0), (1, 9), (10, 24)]
    soon = [rewrite(i, i != 3) for i in range(12)]
    late = [rewrite(i, i >= 6) for i in range(12)]  # the older half is forgotten
    soon[11]["undone"] = "taken back"
    rows = [r for r in forgetting(soon, late, 12) if r["protocol"] == "generated"]
    assert [(r["age_low"], r["age_high"], r["n"], r["held"], r["retained"]) for r in rows] == [(1, 9, 9, 8, 5 / 8), (10, 11, 2, 2, 0.0)]
    assert rows[0]["low"] < 5 / 8 < rows[0]["high"]
    assert forgetting([rewrite(0, False)], [rewrite(0, False)], 1)[0]["retained"] is None


def test_a_case_of_several_edits_holds_where_all_hold() -> None:
    soon = [rewrite(0, True), rewrite(0, True), rewrite(1, True), rewrite(1, False)]
    late = [rewrite(0, False), rewrite(0, True), rewrite(1, True), rewrite(1, True)]
    rows = [r for r in forgetting(soon, late, 2) if r["protocol"] == "generated"]
    assert [(r["age_low"], r["n"], r["held"], r["retained"]) for r in rows] == [(0, 1, 0, None), (1, 1, 1, 0.0)]


def test_a_run_has_forgetting_and_right_after_as_other_numbers(tiny: str, tmp_path: Path) -> None:
    found = summary(done(tmp_path / "run", spec_of(tmp_path, tiny)))
    wanted = ("reliability", "generated")
    by = {key: next(r["value"] for r in found[key] if (r["metric"], r["protocol"]) == wanted) for key in ("summary", "right_after")}
    rows = [r for r in found["forgetting"] if r["protocol"] == "generated"]
    assert [(r["age_low"], r["age_high"]) for r in rows] == [(0, 0), (1, 8)] and sum(r["n"] for r in rows) == 9
    assert by["right_after"] > by["summary"]
    assert [r["T"] for r in found["retention"] if (r["metric"], r["protocol"]) == ("reliability", "generated")] == [2, 5, 9]
    without = summary(done(tmp_path / "without", spec_of(tmp_path, tiny, "score.right_after=false")))
    assert without["right_after"] == without["forgetting"] == [] and without["retention"] == found["retention"]


# -- judges ----------------------------------------------------------------------------------------------------


class Server(http.server.BaseHTTPRequestHandler):
    """Speaks like an endpoint; what it says is the class's ``replies``, the last one for ever."""

    replies: ClassVar[list[tuple[int, str]]] = []
    asked: ClassVar[list[dict[str, Any]]] = []
    torn: ClassVar[bool] = False  # promises more than it sends

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        Server.asked.append({"path": self.path, "key": self.headers.get("Authorization"), **body})
        code, said = Server.replies.pop(0) if len(Server.replies) > 1 else Server.replies[0]
        answer = json.dumps({"choices": [{"message": {"content": said}}]}).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(answer) + 9 * Server.torn))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    Server.replies, Server.asked = [(200, "CORRECT")], []
    served = http.server.HTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=served.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{served.server_port}/v1"
    served.shutdown()
    served.server_close()
    thread.join()


def test_an_endpoint_is_asked_once_a_question(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "secret")
    judge = judges.make("gpt", tmp_path / "kept", server, "some-model", "MY_KEY")
    assert judge is not None and judge.name == "gpt@1" and "secret" not in repr(judge)
    assert judge("The capital of France is", "Rome", "It is Rome") is True
    Server.replies = [(200, "INCORRECT.")]
    assert judge("The capital of France is", "Rome", "It is Rome") is True  # kept
    assert judge("The capital of France is", "Rome", "Paris") is False
    assert judge("The capital of France is", "Rome", "  ") is False  # nothing was said: not worth a question
    assert len(Server.asked) == 2 and Server.asked[0]["path"] == "/v1/chat/completions" and Server.asked[0]["key"] == "Bearer secret"
    assert "It is Rome" in Server.asked[0]["messages"][1]["content"] and Server.asked[0]["model"] == "some-model"
    kept = next((tmp_path / "kept").iterdir())
    assert "secret" not in "".join(p.read_text() for p in (tmp_path / "kept").iterdir())
    kept.write_text("{torn")
    judge("The capital of France is", "Rome", "It is Rome"), judge("The capital of France is", "Rome", "Paris")
    assert len(Server.asked) == 3


@pytest.mark.parametrize(
    ("replies", "said", "asked"),
    [
        ([(200, "maybe")], "said 'maybe' where CORRECT or INCORRECT was asked for", 1),
        ([(401, "no")], "could not be asked: 401", 1),
        ([(503, "busy")], "could not be asked: 503", 4),
    ],
)
def test_an_endpoint_that_fails_raises(server: str, tmp_path: Path, replies: list[tuple[int, str]], said: str, asked: int) -> None:
    judge = judges.EndpointJudge("gpt@1", server, "m", tmp_path, wait=0.0)
    Server.replies = replies
    with pytest.raises(JudgeError, match=said):
        judge("q", "a", "b")
    assert len(Server.asked) == asked and not list(tmp_path.iterdir())


def test_a_reply_that_breaks_off_is_asked_for_again(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Server, "torn", True)
    Server.replies = [(200, "CORRECT")]
    with pytest.raises(JudgeError, match=r"could not be asked: .*nothing was put in its place"):
        judges.EndpointJudge("gpt@1", server, "m", tmp_path, wait=0.0)("q", "a", "b")
    assert len(Server.asked) == 4 and not list(tmp_path.iterdir())


def test_an_endpoint_that_was_busy_is_asked_again(server: str, tmp_path: Path) -> None:
    Server.replies = [(429, ""), (500, ""), (200, "CORRECT")]
    assert judges.EndpointJudge("gpt@1", server, "m", tmp_path, wait=0.0)("q", "a", "b") is True
    with pytest.raises(JudgeError, match="could not be asked"):
        judges.EndpointJudge("gpt@1", "http://127.0.0.1:9/v1", "m", tmp_path, wait=0.0)("q", "a", "b")


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"name": "exactly"}, "no judge named 'exactly'"),
        ({"name": "own:nothing"}, "cannot be imported"),
        ({"name": "own:SENTENCES"}, "is not a function but list"),
        ({"name": "x", "endpoint": "ftp://x", "model": "m"}, "must be an http"),
        ({"name": "x", "endpoint": "http://x"}, "needs model"),
        ({"name": "x", "model": "m"}, "belong to an endpoint"),
        ({"name": "x", "endpoint": "http://x", "model": "m", "key_env": "NOT_SET_ANYWHERE"}, "NOT_SET_ANYWHERE is not set"),
    ],
)
def test_wrong_judges(tmp_path: Path, how: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        judges.make(cache=tmp_path, **how)


def test_judged_answers_are_protocols_of_their_own(tiny: str, tmp_path: Path) -> None:
    spec = spec_of(tmp_path, tiny, "scenario=single", "score.judges=[exact, contains, 'own:shouts']")
    found = records(done(tmp_path / "run", spec))
    for r in found:
        if r["target"] is None:
            assert "judged" not in r
        else:
            assert r["judged"]["contains@2"][1] >= r["gen_match_after"]  # whole words in the answer
            assert r["judged"]["own:shouts@1"] == [r[f"gen_{when}"].upper() == r["target"].upper() for when in ("before", "after")]
    rows = {(r["metric"], r["protocol"]): r for r in summary(tmp_path / "run")["summary"]}
    assert rows["reliability", "judged contains@2"]["value"] >= rows["reliability", "generated"]["value"] > 0
    assert ("locality_agreement", "judged contains@2") not in rows and ("ES", "judged contains@2") not in rows
    other = [{**r, "method": "b"} for r in found]
    assert difference(found, other, "reliability", "judged contains@2")["value"] == 0
    stricter = [{**r, "judged": {"never@1": [False, False]}} if "judged" in r else r for r in found]
    assert {r["value"] for r in summarise(stricter) if r["protocol"] == "judged never@1" and r["metric"] == "reliability"} == {0.0}


def test_a_judge_that_fails_costs_the_cell(tiny: str, tmp_path: Path) -> None:
    with pytest.raises(JudgeError, match="must return True or False"):
        judges.FunctionJudge("x@1", lambda q, w, a: "yes")("q", "w", "a")
    with pytest.raises(JudgeError, match="ZeroDivisionError"):
        judges.FunctionJudge("x@1", lambda q, w, a: 1 / 0)("q", "w", "a")
    spec = spec_of(tmp_path, tiny, "scenario=single", "score.judges=[{name: x, endpoint: 'http://127.0.0.1:9/v1', model: m}]")
    monkey = pytest.MonkeyPatch()
    monkey.setattr(judges.time, "sleep", lambda seconds: None)
    (outcome,) = executors.run(tmp_path / "run", spec)
    monkey.undo()
    assert "could not be asked" in outcome.error and not (cell(tmp_path / "run") / "records.jsonl").exists()


def test_limits_that_cannot_be() -> None:
    for wrong in ({"every": 0}, {"perplexity": 0.0}, {"kl": -1.0}, {"tokens": 0}):
        with pytest.raises(ConfigError, match="must be positive"):
            GuardSpec(**wrong)
