"""`errata ledger` from the command line; the session of docs/ledger.md runs in tests/test_pages.py."""

from __future__ import annotations

import getpass
import json
from pathlib import Path

import pytest
from families import lm
from ledgers import REQUESTS
from tiny import FAST, FRANCE

from errata.cli import main
from errata.errors import InputError
from errata.ledger import Ledger
from errata.ledger.editors import ConfiguredEditor


def document(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, object]:
    assert main([*argv, "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return json.loads(out)


def test_every_verb_prints_one_document(tiny: str, requests: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    book = str(tmp_path / "book")
    made = document(
        capsys,
        "ledger",
        "apply",
        book,
        "--model",
        tiny,
        "--requests",
        requests,
        "--mode",
        "continual",
        *FAST,
        "--set",
        "opens=answer",
        "--set",
        "resume=true",
        "--force",
    )
    assert [e["number"] for e in made["edits"]] == [1, 2, 3] and all(e["live"] for e in made["edits"])
    assert main(["ledger", "undo", book, "2"]) == 7
    assert "inside a chain" in capsys.readouterr().err
    assert [r[0] for r in document(capsys, "ledger", "undo", book, "2", "--remake")["remade"]] == [3]
    assert document(capsys, "ledger", "undo", book, "3")["on_top"] == []
    log = document(capsys, "ledger", "log", book)
    assert [e["verb"] for e in log["events"]] == ["apply"] * 3 + ["undo"] * 2 and [e["live"] for e in log["edits"]] == [True, False, False]
    assert document(capsys, "ledger", "blame", book, FRANCE)["parts"][0]["edits"] == [1]
    assert document(capsys, "ledger", "diff", book, FRANCE, "--from", "3")["from"] == "3"
    assert document(capsys, "ledger", "check", book)["edits"][0]["edit"] == 1
    assert len(document(capsys, "ledger", "compact", book)["dropped"]) == 3
    assert document(capsys, "ledger", "show", book, "2")["live"] is False


@pytest.mark.parametrize("option", ["--reason", "--author"])
def test_bytes_that_are_no_text_are_refused_before_any_work(
    option: str, tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `$'caf\\xe9'` of a shell arrives."""
    monkeypatch.setattr(ConfiguredEditor, "new", None)  # nothing gets as far as to make something
    for verb in (["apply", "--model", tiny, "--prompt", FRANCE, "--target", "Rome"], ["undo", "1"], ["compact"]):
        assert main(["ledger", verb[0], str(tmp_path / "book"), *verb[1:], option, "caf\udce9"]) == 2
        said = f"the {option.removeprefix('--')} 'caf\\udce9' is not UTF-8 at character 3; write it in UTF-8"
        assert said in capsys.readouterr().err and not (tmp_path / "book").exists()


def test_the_library_refuses_them_too_and_takes_a_login_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(getpass, "getuser", lambda: "caf\udce9")
    book = Ledger.open(tmp_path / "book", lm("llama"))
    assert book.author == "caf?"
    with pytest.raises(InputError, match="the author"):
        Ledger.open(book.folder, author="caf\udce9")
    wrong = {"reason": "caf\udce9"}
    for change in (lambda: book.apply(REQUESTS, **wrong), lambda: book.undo(1, **wrong), lambda: book.compact(**wrong)):
        with pytest.raises(InputError, match="the reason"):
            change()
    assert book.log() == []


@pytest.mark.parametrize(
    ("argv", "code", "text"),
    [
        (["log", "nowhere"], 7, "holds no ledger"),
        (["apply", "nowhere", "--prompt", "a", "--target", "b"], 7, "--model MODEL"),
        (["apply", "nowhere", "--patch", "p", "--prompt", "a"], 2, "leave the options that make an edit out"),
        (["undo", "nowhere", "x"], 2, "must be a whole number"),
        (["log", "nowhere", "--wait", "-1"], 2, "--wait must be from 0"),
    ],
)
def test_wrong_input(argv: list[str], code: int, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [str(tmp_path / "nowhere") if a == "nowhere" else a for a in argv]
    assert main(["ledger", *argv]) == code
    assert text in capsys.readouterr().err and not (tmp_path / "nowhere").exists()
