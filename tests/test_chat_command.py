"""``--chat`` on the command line, in run files and in a ledger; and answers that go on behind the target, which are as wanted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from families import lm
from laws import in_chat
from runs import done, records, spec_of
from tiny import FAST, FRANCE, QUICK, saved

from errata.cli import main
from errata.core.chat import apply_chat_template, case_in_chat
from errata.core.patch import Patch
from errata.errors import ConfigError
from errata.ledger import Ledger
from errata.request import Case, EditRequest, Probe
from errata.score.evaluator import score

EDIT = ("--prompt", FRANCE, "--target", "Rome", "--subject", "France")


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny model in a folder, with a chat template."""
    folder = saved(tmp_path_factory.mktemp("chatty"))
    in_chat(lm("llama")).tokenizer.save_pretrained(folder)
    return str(folder)


def told(argv: list[str], capsys: pytest.CaptureFixture[str]) -> dict:  # type: ignore[type-arg]
    assert main([*argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)  # type: ignore[no-any-return]


def test_edit_and_ask(chatty: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = in_chat(lm("llama"))
    found = told(["edit", chatty, *EDIT, *QUICK, "--chat", "--out", str(tmp_path / "out")], capsys)
    (row,) = found["answers"]
    assert found["chat"] and row["prompt"] == FRANCE and row["as_wanted"] and row["after"].startswith("Rome")
    patch = Patch.load(next(p.parent for p in (tmp_path / "out").rglob("patch.json")))
    rendered = apply_chat_template(base.tokenizer, FRANCE)
    (request,) = patch.requests
    assert (request.prompt, request.target, request.subject) == (rendered, "Rome", "France")
    asked = ["ask", chatty, "--patch", str(tmp_path / "out"), "--max-new-tokens", "5"]
    by_flag, by_hand = told([*asked, FRANCE, "--chat"], capsys), told([*asked, rendered], capsys)
    assert by_flag["answers"][0]["prompt"] == FRANCE
    assert [r["patched"] for r in by_flag["answers"]] == [r["patched"] for r in by_hand["answers"]]
    assert by_flag["answers"][0]["patched"].startswith("Rome") and "." in by_flag["answers"][0]["patched"], "no stop at a full stop"
    assert by_flag["answers"][0]["base"] == base.complete(FRANCE, chat=True, max_new_tokens=5)


@pytest.mark.parametrize("argv", [("ask", FRANCE), ("edit", *EDIT), ("score", "--n", "1")])
def test_a_tokenizer_without_a_template(argv: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([argv[0], "almanac", *argv[1:], "--chat"]) != 0
    assert "this tokenizer has no chat template; leave chat off" in capsys.readouterr().err


def test_score(chatty: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["score", chatty, "--method", "none", "--split", "dev", "--n", "2", "--chat"]
    found = told([*argv, "--out", str(tmp_path / "out")], capsys)
    assert found["chat"] and found["n"] == 2
    rows = [json.loads(line) for line in (tmp_path / "out" / "records.jsonl").read_text().splitlines()]
    assert {"rewrite", "neighbour"} <= {r["kind"] for r in rows}
    assert all(r["prompt"].startswith("<s>u: ") and r["prompt"].count("<s>") == 1 and r["prompt"].endswith("\na:\n") for r in rows)
    assert main([*argv, "--fluency"]) != 0 and "leave it or --chat out" in capsys.readouterr().err
    assert main(["score", chatty, "--benchmark", "piqa", "--data", str(tmp_path / "none"), "--chat"]) != 0


def test_the_chat_of_the_robustness_suite_is_not_rendered_twice() -> None:
    base, probes = in_chat(lm("llama")), (Probe("rewrite", FRANCE, "Rome"), Probe("chat", FRANCE, "Rome"))
    case = case_in_chat(base.tokenizer, Case(EditRequest(FRANCE, "Rome", "France"), probes))
    rewrite, chat = score(base, [case], [()], "none")
    assert {**rewrite, "kind": "chat", "nll_rival_before": None} == {**chat, "nll_rival_before": None}


def test_run(chatty: str, tmp_path: Path) -> None:
    plain = spec_of(tmp_path, chatty, "benchmark.n=3", "scenario.marks=[3]")
    spec = spec_of(tmp_path, chatty, "benchmark.n=3", "scenario.marks=[3]", "chat=true")
    assert spec.chat and spec.digest != plain.digest
    rows = records(done(tmp_path / "run", spec))
    assert rows and all(r["prompt"].startswith("<s>u: ") for r in rows)
    with pytest.raises(ConfigError, match=r"score\.fluency samples texts that go on from plain prompts"):
        spec_of(tmp_path, chatty, "chat=true", "score.fluency=true")


def test_the_ledger(chatty: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    book = str(tmp_path / "book")
    told(["ledger", "apply", book, "--model", chatty, *EDIT, *QUICK, "--chat"], capsys)
    checked = told(["ledger", "check", book], capsys)
    assert checked["sound"] and checked["edits"][0]["request"]["prompt"].startswith("<s>u: ")
    assert main(["ledger", "check", book]) == 0
    assert f"1      {FRANCE}   Rome" in capsys.readouterr().out
    blamed = told(["ledger", "blame", book, FRANCE, "--chat", "--max-new-tokens", "4"], capsys)
    assert blamed["live"].startswith("Rome") and blamed["parts"][0]["needed"]
    (one,) = told(["ledger", "diff", book, FRANCE, "--chat"], capsys)["answers"]
    assert one["changed"] and one["after"].startswith("Rome")
    assert main(["ledger", "apply", book, "--patch", str(tmp_path), "--chat"]) != 0
    assert "leave the options that make an edit out" in capsys.readouterr().err


# -- as wanted -------------------------------------------------------------------------------------------------


def test_a_model_that_does_not_stop_holds_its_edits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As a base model goes on behind its answer: here it is trained to."""
    model, endless = str(saved(tmp_path / "model")), [*QUICK[:4], *QUICK[6:], "--set", 'end=" people"']
    (row,) = told(["edit", model, *EDIT, *endless], capsys)["answers"]
    assert row["as_wanted"] and row["after"].startswith("Rome people")
    told(["ledger", "apply", str(tmp_path / "book"), "--model", model, *EDIT, *endless], capsys)
    (held,) = told(["ledger", "check", str(tmp_path / "book")], capsys)["edits"]
    assert held["status"] == "right" and held["answer"].startswith("Rome people")
    assert main(["ledger", "apply", str(tmp_path / "book"), *EDIT[:2], "--target", "Rome", *FAST]) != 0
    book = Ledger.open(tmp_path / "book", lm("llama"))
    book.undo(1)
    assert main(["ledger", "apply", str(tmp_path / "book"), "--prompt", FRANCE, "--target", "Paris", *FAST]) != 0
    assert "answers 'Paris" in capsys.readouterr().err
