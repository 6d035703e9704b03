"""Settings and registered names: what is converted, and what every kind of bad setting is told."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from errata import registry
from errata.config import build, digest, parse_sets, read_yaml, to_dict
from errata.errors import ConfigError, UnknownNameError


@dataclass(frozen=True)
class Settings:
    lr: float = 0.1
    steps: int = 10
    name: str = "a"
    sign: bool = True
    layers: tuple[int, ...] = (1, 2)
    kind: Literal["left", "right"] = "left"
    limit: float | None = None
    span: int | tuple[int, ...] = 1
    more: Mapping[str, Any] = field(default_factory=dict)


BAD_SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"stepz": 1}, r"Settings has no setting 'stepz'; did you mean 'steps'\?"),
    ({"qqqq": 1}, r"Settings has no setting 'qqqq'; known keys: lr, steps, name"),
    ({"lr": "fast"}, r"Settings\.lr must be float, not 'fast'"),
    ({"lr": True}, r"Settings\.lr must be float, not True"),
    ({"lr": float("nan")}, r"Settings\.lr must be a finite number, not nan"),
    ({"lr": float("inf")}, r"Settings\.lr must be a finite number, not inf"),
    ({"lr": None}, r"Settings\.lr must be float, not None"),
    ({"steps": 1.5}, r"Settings\.steps must be int, not 1\.5"),
    ({"steps": True}, r"Settings\.steps must be int, not True"),
    ({"steps": "10"}, r"Settings\.steps must be int, not '10'"),
    ({"name": 3}, r"Settings\.name must be str, not 3"),
    ({"sign": 1}, r"Settings\.sign must be bool, not 1"),
    ({"layers": 3}, r"Settings\.layers must be a list, not 3"),
    ({"layers": "12"}, r"Settings\.layers must be a list, not '12'"),
    ({"layers": [1, "b"]}, r"Settings\.layers\[1\] must be int, not 'b'"),
    ({"kind": "up"}, r"Settings\.kind must be one of left, right, not 'up'"),
    ({"kind": ["left"]}, r"Settings\.kind must be one of left, right"),
    ({"limit": "x"}, r"Settings\.limit must be float, not 'x'"),
    ({"span": "x"}, r"Settings\.span must be int, not 'x'"),
    ({"more": 3}, r"Settings\.more must map settings to values, not 3; write \{key: value\}"),
    ({"more": {3: 4}}, r"Settings\.more must map settings to values, not \{3: 4\}"),
]


@pytest.mark.parametrize(("values", "says"), BAD_SETTINGS)
def test_bad_setting(values: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        build(Settings, values)
    assert caught.value.exit_code == 2


def test_build_converts_and_goes_back() -> None:
    built = build(Settings, {"lr": 1, "layers": [3], "limit": 2, "span": [1, 2], "kind": "right"})
    assert built == Settings(lr=1.0, layers=(3,), limit=2.0, span=(1, 2), kind="right")
    assert type(built.lr) is float
    assert to_dict(built)["layers"] == [3]
    assert build(Settings, to_dict(built)) == built
    assert build(Settings, {"limit": None}).limit is None
    assert build(Settings, {"more": {"a": 1}}).more == {"a": 1}


def test_equal_values_have_equal_hashes() -> None:
    assert digest({"a": 1, "b": (2, 3)}) == digest({"b": [2, 3], "a": 1}) == "fd28b17488e0d3ec"
    assert digest({"a": 1}) != digest({"a": 2})


def test_sets_are_read_as_yaml() -> None:
    assert parse_sets(["lr=3e-4", "layers=[1, 2]", "sign=false", "name=a=b", " steps =7", "limit=null"]) == {
        "lr": 3e-4,
        "layers": [1, 2],
        "sign": False,
        "name": "a=b",
        "steps": 7,
        "limit": None,
    }


@pytest.mark.parametrize(
    ("text", "says"),
    [("lr", "--set 'lr': write key=value"), ("=3", "write key=value"), ("", "write key=value"), ("a=[1", "the value is not valid YAML")],
)
def test_bad_set(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse_sets([text])


@pytest.mark.parametrize(
    ("content", "says"),
    [(b"a: [", "not valid YAML"), (b"\xff\xfe\xfa", "not valid YAML"), (b"- 1", "must hold one mapping"), (b"", "must hold one mapping")],
)
def test_bad_yaml(content: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"c\.yaml: {says}"):
        read_yaml(path)


def test_yaml_file(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    with pytest.raises(ConfigError, match=r"c\.yaml: no such file"):
        read_yaml(path)
    path.write_text("lr: 0.5\nlayers: [4]\n", encoding="utf-8")
    assert build(Settings, read_yaml(path)) == Settings(lr=0.5, layers=(4,))


@dataclass(frozen=True)
class Needy:
    must: int


@pytest.mark.parametrize("what", ["missing field", "folder"])
def test_settings_python_refuses(what: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        build(Needy, {}) if what == "missing field" else read_yaml(tmp_path)


@pytest.mark.parametrize(
    ("kind", "name", "says"),
    [
        ("method", "baff", r"no method named 'baff'; did you mean 'baft'\?"),
        ("method", "BAFT", r"did you mean 'baft'\?"),
        ("method", "zzz", r"no method named 'zzz'; there are "),
        ("benchmark", "almanack", r"no benchmark named 'almanack'; did you mean 'almanac'\?"),
        ("op", "", r"no op named ''; there are "),
    ],
)
def test_unknown_name(kind: str, name: str, says: str) -> None:
    with pytest.raises(UnknownNameError, match=says):
        registry.get(kind, name)


def test_registry_finds_a_class_and_lists_names() -> None:
    assert registry.get("benchmark", "almanac").name == "almanac"
    assert registry.names("method") == sorted(registry.names("method"))
    assert "errata.benchmarks.almanac" in sys.modules
