"""The command when it is stopped, when its output goes to odd places, and when something breaks."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import FAST, FRANCE, QUICK, leftovers

from errata.cli import main
from errata.commands import files
from errata.commands.screen import Screen, as_json, clean
from errata.core.patch import Patch
from errata.errors import StorageError
from errata.methods.subspace.editor import SubspaceEditor

# -- stops and pipes -------------------------------------------------------------------------------------------


def interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_ctrl_c_while_editing(
    tiny: str, requests: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SubspaceEditor, "edit_each", interrupt)
    assert main(["edit", tiny, "--requests", requests, *QUICK, "--out", str(tmp_path / "new" / "out")]) == 130
    out, err = capsys.readouterr()
    assert (out, err) == ("", "errata: interrupted\n")
    assert leftovers(tmp_path) == []


def test_ctrl_c_while_saving_leaves_the_earlier_result(
    tiny: str, requests: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert main(["edit", tiny, "--prompt", FRANCE, "--target", "Rome", *FAST, "--out", str(out)]) == 0
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    save, calls = Patch.save, []

    def second(self: Patch, *args: object, **how: object) -> Path:
        calls.append(self.id)
        return save(self, *args, **how) if len(calls) == 1 else interrupt()

    monkeypatch.setattr(Patch, "save", second)
    assert main(["edit", tiny, "--requests", requests, *FAST, "--out", str(out), "--force"]) == 130
    assert len(calls) == 2
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
    assert leftovers(tmp_path) == ["out"]


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError])
def test_a_stop_between_the_two_renames_brings_the_earlier_result_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: type[BaseException]
) -> None:
    out = tmp_path / "out"
    with files.staged(out, False) as folder:
        files.write(folder / "summary.json", "old")
    rename = os.rename

    def fails(source: object, target: object) -> None:
        if Path(str(target)) == out and Path(str(source)).name != "old":
            raise stop
        rename(source, target)

    monkeypatch.setattr(os, "rename", fails)
    with pytest.raises((KeyboardInterrupt, StorageError)), files.staged(out, True) as folder:
        files.write(folder / "summary.json", "new")
    assert (out / "summary.json").read_text() == "old"
    assert leftovers(tmp_path) == ["out"]


def test_force_replaces_the_result_as_a_whole(tiny: str, requests: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(["edit", tiny, "--requests", requests, *FAST, "--out", str(out)]) == 0
    assert main(["edit", tiny, "--prompt", FRANCE, "--target", "Rome", *FAST, "--out", str(out), "--force"]) == 0
    assert len(list(out.glob("*/"))) == 1 and leftovers(tmp_path) == ["out"]


def test_an_empty_folder_may_be_filled(tiny: str, tmp_path: Path) -> None:
    assert main(["edit", tiny, "--prompt", FRANCE, "--target", "Rome", *FAST, "--out", str(tmp_path)]) == 0
    assert (tmp_path / "edit.json").is_file()


def test_a_closed_pipe_is_quiet() -> None:
    code = "import sys, errata.cli; sys.exit(errata.cli.main(['methods', '--json']))"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdout is not None and child.stderr is not None
        child.stdout.close()
        assert child.stderr.read() == b""
        assert child.wait(120) == 141


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_on_a_terminal_stays_off_stdout(
    tiny: str, requests: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stderr = Terminal()
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setenv("TERM", "xterm")
    for mode in ("single", "continual"):
        assert main(["edit", tiny, "--requests", requests, *FAST, "--mode", mode, "--json"]) == 0
        json.loads(capsys.readouterr().out)
    assert "steps, edits 1 to 3" in stderr.getvalue() and "edits" in stderr.getvalue()
    assert main(["score", tiny, "--method", "reft", "--split", "dev", "--n", "2", *FAST, "--json"]) == 0
    assert "reft: scoring" in stderr.getvalue()


def test_output_that_the_terminal_cannot_spell(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for argv in (["methods"], ["methods", "--json"], ["ask", tiny, "Καλημέρα", "--json"], ["ask", tiny, "Καλημέρα"]):
        raw = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
        assert main(argv) == 0
        if "--json" in argv:
            found = json.loads(raw.getvalue().decode("ascii"))
            assert "answers" not in found or found["answers"][0]["prompt"] == "Καλημέρα"


def test_nothing_that_drives_a_terminal_gets_through(capsys: pytest.CaptureFixture[str]) -> None:
    assert clean("a\x1b[31m\x07\r\ud800b\n") == "a�[31m���b\n"
    screen = Screen()
    screen.table(("x", "[bold]y"), [("\x1b]0;title\x07", "[red]a[/red]\nb")])
    screen.say("\x1b[2J")
    out = capsys.readouterr().out
    assert "\x1b" not in out and "[red]a[/red] b" in out and "[bold]y" in out
    assert json.loads(as_json({"a": [float("nan"), 1.5], "b": "\ud800"})) == {"a": [None, 1.5], "b": "\ud800"}


def test_a_table_on_a_terminal_fits_it(monkeypatch: pytest.MonkeyPatch) -> None:
    out = Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    Screen().table(("prompt", "answer"), [("word " * 30, "Rome")])
    lines = re.sub(r"\x1b\[\d*m", "", out.getvalue()).splitlines()
    assert len(lines) > 4 and max(map(len, lines)) <= 40


# -- errors ----------------------------------------------------------------------------------------------------


def test_debug_shows_the_traceback(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["edit", tiny, "--prompt", FRANCE, "--target", " "]
    assert main(argv) == 2
    assert capsys.readouterr().err == "errata: error: target is empty; give at least one word\n"
    for debug in ([*argv, "--debug"], ["--debug", *argv]):
        assert main(debug) == 2
        err = capsys.readouterr().err
        assert "Traceback" in err and err.endswith("errata: error: target is empty; give at least one word\n")


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (MemoryError(), 3, "out of memory"),
        (type("OutOfMemoryError", (RuntimeError,), {})("CUDA"), 3, "out of memory"),
        (ZeroDivisionError("x\ny"), 1, "not foreseen: ZeroDivisionError: x; run again with --debug"),
        (OSError(28, "No space left on device", "f"), 6, "f: No space left"),
    ],
)
def test_what_was_not_foreseen_has_no_traceback(
    tiny: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: Exception, code: int, message: str
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(SubspaceEditor, "edit_each", fails)
    assert main(["edit", tiny, "--prompt", FRANCE, "--target", "Rome", *FAST]) == code
    out, err = capsys.readouterr()
    assert out == "" and message in err and "Traceback" not in err and err.count("\n") == 1


def test_the_libraries_speak_again_afterwards(tiny: str) -> None:
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_warning()
    logging.enable_progress_bar()
    try:
        assert main(["ask", tiny, FRANCE, "--json"]) == 0
        assert logging.get_verbosity() == logging.WARNING and logging.is_progress_bar_enabled()
    finally:
        logging.set_verbosity(level)
        if not bars:
            logging.disable_progress_bar()
