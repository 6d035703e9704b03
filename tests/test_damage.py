"""Damage of any kind: full disks, stops, and files with wrong bytes.  Also bad values through the API."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import FAST, FRANCE, fill_disk, head, leftovers

from errata.cli import main
from errata.core.patch import Patch
from errata.errors import ErrataError, InputError, PatchError, StorageError
from errata.methods.subspace.editor import SubspaceEditor
from errata.request import Case, EditRequest, Probe


def edited(model: str, *more: str) -> list[str]:
    return ["edit", model, "--prompt", FRANCE, "--target", "Rome", *more]


# -- through the API -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EditRequest("a", 5), r"target must be a text, not int"),  # type: ignore[arg-type]
        (lambda: EditRequest("a", "b", paraphrases="c"), r"are lists, not texts"),  # type: ignore[arg-type]
        (lambda: EditRequest("a", "b", paraphrases=("",)), r"paraphrases\[0\] is empty"),
        (lambda: EditRequest("a", "b", unrelated=(("x", ""),)), r"unrelated\[0\] answer is empty"),
        (lambda: Probe("", "b"), r"probe kind is empty"),
        (lambda: Case(EditRequest("a", "b", paraphrases=("c",)), (Probe("rephrase", "c", "b"),)), r"is also training text"),
        (lambda: Case(EditRequest("a", "b"), (Probe("rephrase", "a", "b"),)), r"call it 'rewrite'"),
    ],
)
def test_bad_requests(make: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.parametrize("files", [0, 2])
def test_full_disk_leaves_what_was_there(
    tmp_path: Path, tiny: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, files: int
) -> None:
    """The disk takes ``files`` more files, then is full."""
    out = tmp_path / "out"
    assert main(edited(tiny, *FAST, "--out", str(out))) == 0
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    capsys.readouterr()
    fill_disk(monkeypatch, files)
    assert main(edited(tiny, "--set", "rank=3", "--set", "steps=1", "--out", str(out), "--force")) == 6
    err = capsys.readouterr().err
    assert f"{out}" in err and "nothing was written (the disk is full)" in err and ".out." not in err
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
    assert leftovers(tmp_path) == ["out"]
    monkeypatch.undo()
    (patch,) = (Patch.load(p) for p in out.glob("*/"))
    fill_disk(monkeypatch, 0)
    with pytest.raises(StorageError, match="the disk is full"):
        patch.save(out / patch.id, overwrite=True)
    assert Patch.load(out / patch.id).id == patch.id


def test_an_interrupted_edit_writes_nothing(tmp_path: Path, tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(SubspaceEditor, "edit_each", stop)
    assert main(edited(tiny, "--out", str(tmp_path / "out"))) == 130
    assert leftovers(tmp_path) == []


# -- any damage at all -----------------------------------------------------------------------------------------

DAMAGE = st.tuples(
    st.sampled_from(["patch.json", "patch.safetensors"]),
    st.sampled_from(["flip", "cut", "drop", "double", "noise"]),
    st.floats(0, 1, exclude_max=True),
    st.integers(1, 255),
)


def damaged(content: bytes, how: str, where: float, value: int) -> bytes:
    at = int(where * len(content))
    return {
        "flip": content[:at] + bytes([content[at] ^ value]) + content[at + 1 :],
        "cut": content[:at],
        "drop": content[:at] + content[at + value :],
        "double": content[: at + value] + content[at:],
        "noise": content[:at] + bytes([value]) * 4 + content[at:],
    }[how]


@given(damage=DAMAGE)
@settings(max_examples=60, derandomize=True, deadline=None)
def test_a_damaged_patch_is_refused_or_is_the_same_patch(good: Path, tmp_path_factory: pytest.TempPathFactory, damage: tuple) -> None:
    name, how, where, value = damage
    folder = Path(shutil.copytree(good, tmp_path_factory.mktemp("fuzz") / "p"))
    (folder / name).write_bytes(damaged((folder / name).read_bytes(), how, where, value))
    try:
        found = Patch.load(folder)
    except PatchError as error:
        assert str(folder) in str(error)
    else:
        assert found.id == Patch.load(good).id


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@given(
    key=st.sampled_from(["method", "settings", "base", "requests", "ops", "replaces", "notes", "id", "format", "sha256"]), value=json_values
)
@settings(max_examples=60, derandomize=True, deadline=None)
def test_a_patch_with_any_value_for_a_key(good: Path, tmp_path_factory: pytest.TempPathFactory, key: str, value: object) -> None:
    folder = Path(shutil.copytree(good, tmp_path_factory.mktemp("fuzz") / "p"))
    head(folder, **{key: value})
    try:
        found = Patch.load(folder)
    except PatchError:
        return
    assert found.id == Patch.load(good).id


EXTRA = {
    "subject": json_values,
    "old": json_values,
    "paraphrases": st.lists(json_values, max_size=3),
    "unrelated": st.lists(json_values | st.tuples(st.just("c"), json_values), max_size=3),
}


@given(record=st.fixed_dictionaries({"prompt": st.just("a") | json_values, "target": st.just("b") | json_values}, optional=EXTRA))
@settings(max_examples=200, derandomize=True, deadline=None)
def test_any_record_is_a_request_or_an_input_error(record: dict) -> None:
    try:
        request = EditRequest.from_dict(record)
    except InputError:
        return
    assert EditRequest.from_dict(json.loads(json.dumps(request.to_dict()))) == request


def test_every_error_has_a_code_of_its_own_kind() -> None:
    kinds = ErrataError.__subclasses__()
    assert {k.__name__: k.exit_code for k in kinds} == {
        "InputError": 2, "ConfigError": 2, "UnknownNameError": 2, "ModelError": 3, "PatchError": 4, "FitError": 5, "StorageError": 6,
        "JudgeError": 3, "LedgerError": 7,
    }  # fmt: skip
