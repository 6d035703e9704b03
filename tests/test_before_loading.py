"""What can be judged without the model is judged before it is loaded, by every command that takes settings; and what a place allows."""

from __future__ import annotations

import errno as numbers
import os
import re
import shutil
import sqlite3
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from families import lm
from ledgers import REQUESTS, SETTINGS
from tiny import FAST, FRANCE

import errata
from errata import registry, storage
from errata.cli import main, parser
from errata.core.patch import Patch
from errata.errors import ConfigError, DiskError, StorageError
from errata.ledger import Ledger
from errata.methods import tuned

EDIT = ["--prompt", FRANCE, "--target", "Rome"]
COMMANDS: dict[str, Callable[[Path, Path], list[str]]] = {
    "edit": lambda folder, good: ["edit", "almanac", *EDIT],
    "ledger apply": lambda folder, good: ["ledger", "apply", str(folder / "book"), "--model", "almanac", *EDIT],
    "score": lambda folder, good: ["score", "almanac", "--n", "2"],
    "score, one of two": lambda folder, good: ["score", "almanac", "--n", "2", "--method", "baft,reft"],
    "analyse gates, a model": lambda folder, good: ["analyse", "gates", "almanac", "--n", "2"],
    "analyse gates, a patch": lambda folder, good: ["analyse", "gates", str(good), "--model", "almanac"],
    "analyse keys": lambda folder, good: ["analyse", "keys", "almanac", "--n", "2"],
    "reproduce": lambda folder, good: ["reproduce", "baft-table2", "almanac", "--method", "baft"],
    "run": lambda folder, good: ["run", str(folder / "run.yaml"), "--out", str(folder / "out")],
}
WRONG = {
    "a typo": ("{m}rnak=3", r"has no setting 'rnak'"),
    "ill-typed": ("{m}seed=x", r"seed must be int, not 'x'"),
    "out of range": ("{m}rank=0", r"rank.* must be at least 1"),
    "not YAML": ("{m}rank=[1", r"the value is not valid YAML"),
    "a name of Python's": ("{m}lm=1", r"has no setting 'lm'"),
}


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any, **__: Any) -> None:
        pytest.fail("the model was loaded first")

    monkeypatch.setattr(errata, "load", load)


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("command", COMMANDS)
def test_wrong_settings_are_refused_before_the_model_is_loaded(
    command: str, wrong: str, tmp_path: Path, good: Path, no_model: None, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.yaml").write_text("methods: [baft]\nbenchmark: {name: almanac, n: 2}\n")
    given, message = WRONG[wrong]
    prefix = {"run": "methods.baft.", "score, one of two": "reft."}.get(command, "")
    assert main([*COMMANDS[command](tmp_path, good), "--set", given.format(m=prefix)]) == 2
    err = capsys.readouterr().err
    assert re.search(message, err) and err.count("\n") == 1, err
    assert not (tmp_path / "book").exists() and not (tmp_path / "out").exists()


def test_every_command_with_settings_is_among_them() -> None:
    taking = {name for name, options in _options(parser()) if "--set" in options}
    assert {name.removeprefix("errata ") for name in taking} == {c.partition(",")[0] for c in COMMANDS}


def _options(parser: Any) -> Iterator[tuple[str, set[str]]]:
    for action in parser._actions:
        for sub in set((action.choices or {}).values()) if hasattr(action, "choices") and isinstance(action.choices, dict) else ():
            yield sub.prog, {o for a in sub._actions for o in a.option_strings}
            yield from _options(sub)


@pytest.mark.parametrize(("given", "message"), [(["--layers", "2,x"], "write block numbers"), (["--text", "nowhere.txt"], "no such text")])
def test_what_statistics_are_made_of_is_judged_before_the_model_is_loaded(
    given: list[str], message: str, no_model: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["stats", "almanac", *given]) == 2
    assert message in capsys.readouterr().err


def test_settings_that_are_right_beside_what_was_found_are_not_refused(models_cache: Path) -> None:
    """AdaLoRA's target_rank is at most its rank, which `errata tune` may have raised for this model."""
    kind = registry.get("method", "adalora")
    wrong = {"allocate": True, "target_rank": kind().rank + 8}
    with pytest.raises(ConfigError, match="target_rank must be from 1 to rank"):
        kind.judge(wrong)
    held = {"adalora": {"settings": {"rank": kind().rank + 8}}}
    tuned.save(tuned.path_of("0123456789abcdef"), {"fingerprint": "0123456789abcdef", "model": "mine"}, held)
    kind.judge(wrong)
    with pytest.raises(ConfigError, match="target_rank must be from 1 to rank"):
        kind.judge({**wrong, "preset": "rule"})
    (tuned.path_of("0").parent / "1.json").write_text("{")  # a damaged file of another model is no matter
    kind.judge(wrong)


# -- places that cannot be written ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("read-only") / "book"
    Ledger.open(folder, lm("llama")).apply(REQUESTS[:1], settings=SETTINGS, force=True)
    return folder


def test_a_read_only_ledger_says_so(book: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As SQLite says it for a file without the right to write (a test may run as root, who always has it)."""
    ledger, connect = Ledger.open(book), sqlite3.connect

    def reading(*args: Any, **how: Any) -> sqlite3.Connection:
        db = connect(*args, **how)
        db.execute("PRAGMA query_only = ON")
        return db

    monkeypatch.setattr(sqlite3, "connect", reading)
    with pytest.raises(DiskError, match=r"cannot be written \(attempt to write a readonly database\).*get the right to write") as caught:
        ledger.undo(1)
    assert "free space" not in str(caught.value)
    assert len(Ledger.open(book).edits()) == 1 and ledger.log()  # reading goes on


@pytest.mark.parametrize(
    ("errno", "advice"),
    [("EACCES", "get the right to write there"), ("EROFS", "get the right"), ("ENOSPC", "free space"), ("EDQUOT", "free space")],
)
def test_advice_is_for_what_went_wrong(errno: str, advice: str, tmp_path: Path) -> None:
    error = OSError(getattr(numbers, errno), os.strerror(getattr(numbers, errno)))
    for place in (storage.disk_errors, storage.atomic_folder):
        with pytest.raises(DiskError, match=advice) as caught, place(tmp_path / "x"):
            raise error
        assert ("free space" in str(caught.value)) == (advice == "free space")


# -- umask ----------------------------------------------------------------------------------------------------


def modes(folder: Path) -> set[int]:
    return {stat.S_IMODE(p.stat().st_mode) & 0o077 for p in (folder, *folder.rglob("*"))}


@pytest.mark.parametrize("mask", [0o077, 0o027, 0o022])
def test_what_is_written_is_as_open_as_the_umask_says(mask: int, good: Path, tmp_path: Path, tiny: str) -> None:
    before = os.umask(mask)
    try:
        Patch.load(good).save(tmp_path / "p")
        Patch.load(good).save(tmp_path / "p", overwrite=True)
        assert main(["edit", tiny, *EDIT, *FAST, "--out", str(tmp_path / "out")]) == 0
        Ledger.open(tmp_path / "book", lm("llama")).apply_patches([Patch.load(good)], force=True)
        storage.write_atomic(tmp_path / "f" / "one", b"x")
    finally:
        os.umask(before)
    for name in ("p", "out", "book", "f"):
        assert all(not mode & mask for mode in modes(tmp_path / name)), name
    assert stat.S_IMODE((tmp_path / "p").stat().st_mode) == 0o777 & ~mask


def test_a_folder_that_is_replaced_stays_as_open_as_it_was(good: Path, tmp_path: Path) -> None:
    folder = Patch.load(good).save(tmp_path / "p")
    folder.chmod(0o700)
    Patch.load(good).save(folder, overwrite=True)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_converted_gguf_is_as_open_as_the_umask_says(gguf_file: Path, models_cache: Path) -> None:
    before = os.umask(0o077)
    try:
        errata.load(str(gguf_file))
    finally:
        os.umask(before)
    made = list(models_cache.parent.rglob("*.safetensors"))
    assert made and all(not stat.S_IMODE(p.stat().st_mode) & 0o077 for p in made)


# -- a ledger whose record is gone -----------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["empty", "gone"])
def test_patches_without_their_record_are_not_swept_away(loss: str, book: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(book, tmp_path / "book"))
    for left in folder.glob("ledger.db*"):
        left.unlink()
    if loss == "empty":
        (folder / "ledger.db").touch()
    kept = sorted(p.name for p in (folder / "patches").iterdir())
    with pytest.raises(StorageError, match=r"holds patches and no ledger.db, or an empty one"):
        Ledger.open(folder, lm("llama"))
    assert kept and sorted(p.name for p in (folder / "patches").iterdir()) == kept
    anew = Ledger.open(tmp_path / "new", lm("llama"))
    assert anew.apply_patches([Patch.load(folder / "patches" / name) for name in kept], force=True)
