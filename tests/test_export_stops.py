"""What cannot be exported, and where it cannot be written: one clear message, nothing half written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import lm
from made import made
from tiny import fill_disk, leftovers, saved
from torch import Tensor

import errata
from errata.core.model import LM
from errata.core.patch import Op, Patch, Site
from errata.errors import ConfigError, ErrataError, ModelError, PatchError, StorageError
from errata.export import bake, export_lora


def quantised(base: LM) -> None:
    base.hf.config.quantization_config = {"quant_method": "bitsandbytes"}


def on_meta(base: LM) -> None:
    base.hf.lm_head.to("meta")


def of_8_bits(base: LM) -> None:
    linear = base.blocks[1].mlp.down_proj
    linear.weight = torch.nn.Parameter(linear.weight.to(torch.float8_e4m3fn), requires_grad=False)


def fused(base: LM) -> None:
    class Scaled(torch.nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    base.blocks[1].mlp.down_proj.__class__ = Scaled


def shared(base: LM) -> None:
    base.blocks[2].mlp.down_proj.weight = base.blocks[1].mlp.down_proj.weight


@pytest.mark.parametrize(
    ("breaks", "message"),
    [
        (quantised, "is quantised"),
        (on_meta, "values of lm_head.weight are not in memory"),
        (of_8_bits, "is stored as torch.float8_e4m3fn"),
        (fused, r"layers\.1\.mlp\.down_proj is a Scaled without a plain"),
        (shared, r"is shared \(model\.layers\.1\.mlp\.down_proj\.weight, model\.layers\.2"),
    ],
)
def test_models_that_cannot_be_baked(breaks: Callable[[LM], None], message: str, tmp_path: Path) -> None:
    base = lm("llama")
    _ = base.fingerprint  # as it was when the patch was made
    patch = made(base, 0)
    breaks(base)
    with pytest.raises(ModelError, match=message):
        bake(base, (patch,), tmp_path / "out")
    assert leftovers(tmp_path) == []


WRITERS = pytest.mark.parametrize("write", [bake, export_lora])


@WRITERS
def test_what_cannot_be_exported(write: Callable[..., Any], tmp_path: Path, good: Path) -> None:
    base, out = lm("llama"), tmp_path / "out"
    cases: list[tuple[tuple[Patch, ...], dict[str, Any], type[ErrataError], str]] = [
        ((), {}, PatchError, "no patch to export"),
        ((made(lm("qwen2"), 0),), {}, PatchError, "was made for base"),
        ((Patch.load(good),), {}, PatchError, r"was made with baft, whose 'subspace' op .* serve it with errata .*rome, memit"),
        ((made(base, 0),), {"dtype": "int8"}, ConfigError, "dtype 'int8' cannot hold"),
        ((Patch("t", {}, base.fingerprint, (), (Op("dense", Site(1), {"weight": torch.eye(32)}),)),), {}, PatchError, "beside a linear"),
    ]
    for stack, how, kind, message in cases:
        with pytest.raises(kind, match=message):
            write(base, stack, out, **how)
    assert leftovers(tmp_path) == []
    out.mkdir()
    (out / "config.json").write_text("{}")
    (out / "thesis.tex").write_text("mine")
    for force in (False, True):
        with pytest.raises(StorageError, match=r"is not a .*it is left alone"):
            write(base, (made(base, 0),), out, force=force)
    assert leftovers(out) == ["config.json", "thesis.tex"]


def test_the_base_itself_is_never_written(tmp_path: Path) -> None:
    folder = saved(tmp_path / "base")
    base = errata.load(folder)
    with pytest.raises(StorageError, match="is the base model itself"):
        bake(base, (made(base, 0),), folder, force=True)


@pytest.mark.parametrize("files", [0, 1, 4])
@WRITERS
def test_full_disk(write: Callable[..., Any], files: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk takes ``files`` more files, then is full."""
    base, out = lm("llama"), tmp_path / "out"
    write(base, (made(base, 0),), out)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    fill_disk(monkeypatch, min(files, len(before) - 1))
    with pytest.raises(StorageError, match="nothing was written \\(the disk is full\\)"):
        write(base, (made(base, 1),), out, force=True)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before and leftovers(tmp_path) == ["out"]


def test_a_tokenizer_that_finds_the_disk_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = lm("llama")

    def full(*_: object, **__: object) -> None:
        raise Exception("No space left on device (os error 28)")

    monkeypatch.setattr(type(base.tokenizer), "save_pretrained", full)
    with pytest.raises(StorageError, match="the disk is full"):
        bake(base, (made(base, 0),), tmp_path / "out")
    assert leftovers(tmp_path) == []
