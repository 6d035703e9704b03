"""Any GGUF file as a model: converted once, kept whole in the cache, one error where it is damaged."""

from __future__ import annotations

import importlib.util
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import errata
from errata.cli import main
from errata.core import gguf
from errata.errors import ModelError

ggufs = pytest.importorskip("ggufs", reason="the package gguf is not installed", exc_type=ImportError)
folders, sha256 = ggufs.folders, ggufs.sha256
PROMPT = "in the end"


def test_a_gguf_is_converted_once(models_cache: Path, gguf_file: Path, conversions: list[Path]) -> None:
    stages: list[tuple[str, int, int]] = []
    first = errata.load(gguf_file, dtype="float32", progress=lambda *what: stages.append(what))
    assert (first.name, first.depth, first.dtype) == (str(gguf_file), ggufs.DEPTH, torch.float32)
    assert stages[-1][1:] == (4, 4) and "converting" in stages[-1][0]
    again = errata.load(str(gguf_file), dtype="float32")
    assert len(conversions) == 1 and folders(models_cache) == [sha256(gguf_file)]
    assert torch.equal(first.logits(first.batch(first.encode([PROMPT]))), again.logits(again.batch(again.encode([PROMPT]))))
    assert first.fingerprint == again.fingerprint == errata.load(gguf_file, dtype="bfloat16").fingerprint


def test_weights_and_tokens_are_the_files(models_cache: Path, tmp_path: Path) -> None:
    """What transformers reads of the file itself."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = ggufs.write(tmp_path / "model.gguf", seed=3)
    lm = errata.load(path, dtype="float32")
    hf = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    wanted = hf.state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in lm.hf.state_dict().items())
    for text in (PROMPT, " the  the", "</s>the", "ü→🙂\n\t1234"):
        assert lm.tokenizer(text)["input_ids"] == tokenizer(text)["input_ids"]
        assert lm.tokenizer.decode(lm.tokenizer(text)["input_ids"]) == text


def test_the_name_may_be_a_repository_and_a_file(models_cache: Path, gguf_file: Path, conversions: list[Path]) -> None:
    """A folder stands in for the hub: transformers takes both."""
    name = f"{gguf_file.parent}:{gguf_file.name}"
    assert errata.load(name).name == name
    with pytest.raises(ModelError, match=r"absent.gguf of .* cannot be had"):
        errata.load(f"{gguf_file.parent}:absent.gguf")
    with pytest.raises(ModelError, match="there is no such file; give a GGUF file, or HUB"):
        errata.load("absent.gguf")
    assert len(conversions) == 1


def test_the_same_file_by_another_name_is_not_converted_again(
    models_cache: Path, gguf_file: Path, tmp_path: Path, conversions: list[Path]
) -> None:
    errata.load(gguf_file)
    (tmp_path / "other.gguf").write_bytes(gguf_file.read_bytes())
    assert errata.load(tmp_path / "other.gguf").name.endswith("other.gguf")
    assert len(conversions) == 1


def cut(share: float) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)]) and None


@pytest.mark.parametrize(
    ("breaks", "said"),
    [
        (lambda path: path.write_bytes(b"not at all"), "is no GGUF file"),
        (cut(0.01), "cannot be read, it is damaged"),
        (cut(0.5), "cannot be read, it is damaged"),
        (cut(0.99), "cannot be read, it is damaged"),
        (lambda path: ggufs.write(path, architecture="made-up"), "architecture made-up is not supported"),
        (lambda path: ggufs.write(path, broken=float("nan")), "holds numbers that are not finite in 'model.embed_tokens.weight'"),
        (lambda path: ggufs.write(path, without="blk.1.ffn_down"), "lacks the weights 'model.layers.1.mlp.down_proj.weight'"),
    ],
)
def test_a_bad_file_is_one_error_and_leaves_nothing(
    models_cache: Path, tmp_path: Path, breaks: Callable[[Path], object], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = ggufs.write(tmp_path / "bad.gguf")
    breaks(path)
    assert main(["ask", str(path), PROMPT]) == 3
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"errata: error: {path}: ") and said in err and err.count("\n") == 1
    assert not models_cache.exists() or folders(models_cache) == []


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "errata.json"])
@pytest.mark.parametrize("damage", ["gone", "cut", "changed"])
def test_a_damaged_conversion_is_made_again(models_cache: Path, gguf_file: Path, conversions: list[Path], name: str, damage: str) -> None:
    lm = errata.load(gguf_file, dtype="float32")
    path = models_cache / sha256(gguf_file) / name
    content = path.read_bytes()
    damaged = {"gone": None, "cut": content[: len(content) // 2], "changed": content[:9] + b"~" + content[10:]}[damage]
    path.unlink()
    if damaged is not None:
        path.write_bytes(damaged)
    assert errata.load(gguf_file, dtype="float32").fingerprint == lm.fingerprint
    assert len(conversions) == 2 and gguf.whole(models_cache / sha256(gguf_file), deep=True)


def test_a_large_file_is_compared_when_it_does_not_load(
    models_cache: Path, gguf_file: Path, conversions: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    errata.load(gguf_file)
    monkeypatch.setattr(gguf, "_LARGE", 1)
    path = models_cache / sha256(gguf_file) / "model.safetensors"
    path.write_bytes(b"\xff" * path.stat().st_size)
    errata.load(gguf_file)
    assert len(conversions) == 2
    with pytest.raises(ModelError):
        errata.load(gguf_file, attn_implementation="of no kind")  # not the folder's fault: it is not made again
    assert len(conversions) == 2


def child(code: str, models_cache: Path) -> subprocess.Popen[str]:
    begin = f"import os\nos.environ['ERRATA_CACHE'] = {str(models_cache.parent)!r}\nimport errata, signal\nfrom errata.core import gguf\n"
    return subprocess.Popen([sys.executable, "-c", begin + code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("where", ["_save", "_seal"])
def test_what_a_kill_leaves_is_never_read(models_cache: Path, gguf_file: Path, where: str) -> None:
    code = f"""
real = gguf.{where}
def last(*args):
    real(*args)
    os.kill(os.getpid(), signal.SIGKILL)
gguf.{where} = last
errata.load({str(gguf_file)!r})
"""
    process = child(code, models_cache)
    assert process.communicate(timeout=120) is not None and process.returncode == -signal.SIGKILL
    (left,) = folders(models_cache)
    assert left.startswith(f".{sha256(gguf_file)}.")
    assert errata.load(gguf_file).depth == ggufs.DEPTH
    assert folders(models_cache) == [sha256(gguf_file)]  # and the next one clears it away


def test_two_processes_at_once(models_cache: Path, gguf_file: Path) -> None:
    """One converts, the other waits and reads."""
    code = f"""
made, real = [], gguf._convert
gguf._convert = lambda *args: (made.append(1), real(*args))
lm = errata.load({str(gguf_file)!r}, dtype="float32")
print(len(made), lm.fingerprint)
"""
    both = [child(code, models_cache) for _ in range(2)]
    said = [process.communicate(timeout=180) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    counts, prints = zip(*(out.split() for out, _ in said), strict=True)
    assert sorted(counts) == ["0", "1"] and len(set(prints)) == 1
    assert folders(models_cache) == [sha256(gguf_file)] and gguf.whole(models_cache / sha256(gguf_file), deep=True)


def test_without_the_package_one_line_says_what_to_install(models_cache: Path, gguf_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "gguf" else real(name, *rest))
    with pytest.raises(ModelError, match=r"the package gguf is needed; pip install 'errata\[gguf\]'"):
        errata.load(gguf_file)


def test_a_full_disk_leaves_nothing(models_cache: Path, gguf_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tiny import fill_disk

    fill_disk(monkeypatch, 0)
    with pytest.raises(errata.DiskError, match="the disk is full"):
        errata.load(gguf_file)
    assert folders(models_cache) == []
