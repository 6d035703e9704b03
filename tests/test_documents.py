"""JSON and YAML that surprise: keys twice, bombs, depth, tags, digits.  Each is refused at once, wherever it comes in."""

from __future__ import annotations

import json
import re
import shutil
import time
from pathlib import Path

import pytest
from tiny import FRANCE

from errata.benchmarks.records import read_records
from errata.cli import main
from errata.commands.files import load_patches
from errata.config import parse_sets, read_yaml
from errata.core.patch import Patch
from errata.documents import parse_json, parse_yaml
from errata.errors import ConfigError, ErrataError, InputError, PatchError, StorageError
from errata.methods import tuned
from errata.request import read_requests
from errata.run import grid
from errata.storage import read_document

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
YAML = {
    "aliases that grow": (BOMB, r"line 6, column 4: more than 100000 values"),
    "aliases that grow inside one value": ("x: {" + ", ".join(BOMB.strip().split("\n")) + "}", "more than 100000 values"),
    "merges that grow": (
        "a: &a {x: 1}\n" + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 40)}]\n" for a, b in zip("abcd", "bcde", strict=True)),
        "more than 100000 values",
    ),
    "aliases that nest": ("a0: &a0 [1]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 99)), "nested deeper than 64"),
    "an alias in itself": ("a: &a [*a]", "an alias stands inside what it names"),
    "900 brackets": ("a: " + "[" * 900 + "]" * 900, "nested deeper than 64"),
    "100,000 brackets": ("a: " + "[" * 100_000, "nested deeper than 64"),
    "900 braces": ("a: " + "{b: " * 900 + "}" * 900, "nested deeper than 64"),
    "300 dashes": ("".join(" " * i + "- \n" for i in range(300)), "nested deeper than 64"),
    "a key twice": ("a: 1\nb: 2\na: 3\n", r"line 3, column 1: key 'a' stands twice"),
    "a key twice inside": ("x: {b: 1, b: 1}\n", "key 'b' stands twice"),
    "a key twice, quoted": ('a: 1\n"a": 2\n', "key 'a' stands twice"),
    "a bool that is none": ("a: !!bool maybe", "line 1, column 4: 'maybe' is no bool"),
    "an int that is none": ("a: !!int x", "'x' is no int"),
    "a float that is none": ("a: !!float x", "'x' is no float"),
    "a time that is none": ("a: !!timestamp x", "'x' is no timestamp"),
    "a date that is none": ("a: 2001-99-99", "2001-99-99"),
    "binary that is none": ("a: !!binary é", "base64"),
    "a Python object": ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
    "5,000 digits": ("a: " + "9" * 5000, "is no int"),
    "5,000 hex digits": ("a: 0x" + "f" * 5000, "so many digits"),
    "sexagesimal": ("a: " + "59:" * 3000 + "59", "so many digits"),
    "a list as key": ("? [a]\n: b\n", "unhashable key"),
    "NUL": ("a: \x00", "unacceptable character"),
    "two documents": ("a: 1\n---\na: 2\n", "expected a single document"),
    "a megabyte": ("a: '" + "x" * (1 << 20) + "'", "longer than 131072 characters"),
}


@pytest.mark.parametrize("name", YAML)
def test_yaml_that_surprises_is_refused_at_once(name: str, tmp_path: Path) -> None:
    text, message = YAML[name]
    (tmp_path / "c.yaml").write_text(text)
    began = time.process_time()
    with pytest.raises(ConfigError, match=rf"c\.yaml: not valid YAML: .*{message}") as caught:
        read_yaml(tmp_path / "c.yaml")
    with pytest.raises(ConfigError, match=r"not valid YAML|methods is missing|write key=value"):
        grid.read(tmp_path / "c.yaml")
    assert len(str(caught.value)) < 1000 and "\n" not in str(caught.value)
    assert time.process_time() - began < 2


@pytest.mark.parametrize("text", ["x=!!bool maybe", "x=[" * 1 + "[" * 900, "x=0x" + "f" * 5000, "x={a: 1, a: 2}", "x=&a [*a]"])
def test_a_setting_that_surprises_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="the value is not valid YAML") as caught:
        parse_sets([text])
    assert len(str(caught.value)) < 400


def test_yaml_as_people_write_it_is_read() -> None:
    assert parse_yaml("a: &a {x: 1, y: [2, 3.5]}\nb: {<<: *a, x: null}\nc: [*a, yes, 'no']") == {
        "a": {"x": 1, "y": [2, 3.5]}, "b": {"x": None, "y": [2, 3.5]}, "c": [{"x": 1, "y": [2, 3.5]}, True, "no"],
    }  # fmt: skip
    assert parse_yaml("") is None and parse_yaml("[" * 64 + "]" * 64)
    assert parse_json('{"a": [1, {"b": null}]}') == {"a": [1, {"b": None}]} and parse_json("[" * 64 + "]" * 64)


JSON = {
    "a key twice": '{"prompt": "a", "target": "b", "target": "c"}',
    "a key twice inside": '{"prompt": "a", "target": "b", "extra": [{"x": 1, "x": 1}]}',
    "900 brackets": '{"prompt": ' + "[" * 900 + "]" * 900 + "}",
    "65 braces": '{"a": ' * 65 + "1" + "}" * 65,
}


@pytest.mark.parametrize("name", JSON)
def test_json_that_surprises_is_refused_wherever_it_comes_in(name: str, tmp_path: Path, good: Path) -> None:
    text, message = JSON[name], "stands twice" if "twice" in name else "nested deeper"
    (tmp_path / "r.jsonl").write_text('{"prompt": "x", "target": "y"}\n' + text + "\n")
    with pytest.raises(InputError, match=rf"r\.jsonl:2: not valid JSON: .*{message}"):
        read_requests(tmp_path / "r.jsonl")
    for content in (text, f"[{text}]"):
        (tmp_path / "b.json").write_text(content)
        with pytest.raises(InputError, match=rf"record 1: not valid JSON: .*{message}"):
            read_records(tmp_path / "b.json")
    (tmp_path / "d.json").write_text(text)
    for read, kind in ((read_document, StorageError), (tuned.read, StorageError)):
        with pytest.raises(kind, match=message):
            read(tmp_path / "d.json")
    (tmp_path / "edit.json").write_text(text)
    with pytest.raises(PatchError, match=r"edit\.json: cannot be read"):
        load_patches([str(tmp_path)])
    folder = Path(shutil.copytree(good, tmp_path / "p"))
    whole = (folder / "patch.json").read_text()
    (folder / "patch.json").write_text(whole.rstrip().removesuffix("}") + ', "notes": ' + text + "}")
    with pytest.raises(PatchError, match=rf"patch\.json: not valid JSON .*(stands twice|{message})"):
        Patch.load(folder)


OWN = {
    'methods: ["os:system"]': r"method 'os:system' is none: that is a class with edit_each\(\), a dataclass",
    'methods: ["subprocess:Popen"]': r"method 'subprocess:Popen' is none",
    'methods: ["os:nothing"]': r"cannot be imported: module 'os' has no attribute 'nothing'",
    'methods: [".x:y"]': r"cannot be imported",
    'methods: ["broken_module:X"]': r"cannot be imported: (invalid|expected)",
    'methods: ["leaving:X"]': r"cannot be imported",
    'methods: [":"]': r"cannot be imported",
    "methods: [none]\nbenchmark: {name: \"os:system\", data: \"touch owned\"}": r"benchmark 'os:system' is none",
    "methods: [none]\nbenchmark: {name: \"subprocess:Popen\", data: \"true\"}": r"benchmark 'subprocess:Popen' is none",
    "methods: [none]\nbenchmark: {name: \"pickle:Unpickler\", data: x}": r"cannot be opened",
    "methods: [none]\nscenario: \"batched(" + "9" * 5000 + ")\"": r"kind must be one of",
    "methods: [none]\nscenario: \"batched(٣)\"": r"kind must be one of",
    "methods: [none]\nscenario: \"batched(0)\"": r"at least one edit",
}  # fmt: skip


@pytest.mark.parametrize("text", OWN, ids=[text[:50] for text in OWN])
def test_a_run_file_names_what_is_none(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken_module.py").write_text("class X(:\n")
    (tmp_path / "leaving.py").write_text("raise SystemExit(3)\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(text)
    assert main(["run", "run.yaml", "--dry-run"]) == 2
    err = capsys.readouterr().err
    assert "run.yaml: " in err or "benchmark" in err
    assert re.search(OWN[text], err) and "not foreseen" not in err and err.count("\n") == 1 and len(err) < 600
    assert not (tmp_path / "owned").exists()


def test_settings_named_like_arguments_of_python(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("lm", "cls", "self"):
        assert main(["edit", tiny, "--prompt", FRANCE, "--target", "Rome", "--set", f"{name}=1"]) == 2
        assert f"BaFT has no setting '{name}'" in capsys.readouterr().err


def test_values_are_shown_shortened(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("methods: [none]\nseeds: " + json.dumps("x" * 5000))
    with pytest.raises(ErrataError) as caught:
        grid.read(tmp_path / "c.yaml")
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("value", ["x", "5", "[1]", "null"])
def test_nothing_is_set_below_what_holds_nothing(value: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(f"methods: [{{name: baft, set: {value}}}]\n")
    with pytest.raises(ConfigError, match=r"--set methods\.baft\.rank: there is nothing to set below"):
        grid.read(tmp_path / "run.yaml", ["methods.baft.rank=3"])
