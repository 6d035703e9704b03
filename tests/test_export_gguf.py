"""Edits as files for llama.cpp: what the files hold, as the package `gguf` and transformers read them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import build
from families import tokenizer
from made import made
from torch import Tensor
from transformers.pytorch_utils import Conv1D

import errata
from errata.cli import main
from errata.core.bank import Stack
from errata.core.families import resolve
from errata.core.model import LM
from errata.core.patch import Op, Patch, Site
from errata.errors import ConfigError, ErrataError, ModelError, PatchError, StorageError
from errata.export import bake_gguf, export_gguf
from errata.export.changes import weight_deltas
from errata.export.gguf import Layout

ggufs = pytest.importorskip("ggufs", reason="the package gguf is not installed", exc_type=ImportError)
gguf = pytest.importorskip("gguf")
POINTS = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "attn_out", "mlp.gate_proj", "mlp_down"]
READ = [
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "phi3",
    "gpt2",
    "bloom",
    "starcoder2",
    "stablelm",
    "nemotron",
    "gemma2",
    "gemma3_text",
    "falcon",
]


@pytest.fixture
def base(models_cache: Path, gguf_file: Path) -> LM:
    return errata.load(gguf_file, dtype="float32")


def everywhere(lm: LM) -> Stack:
    """Two patches over every kind of linear, three ranks, one linear twice."""
    ops = [op for i, point in enumerate(POINTS) for op in made(lm, i, 1 + i % 3, point, i % 2).ops]
    return Patch("test", {}, lm.fingerprint, (), tuple(ops)), made(lm, 9, 2, "self_attn.q_proj", 0)


def said(lm: LM, *stack: Patch) -> Tensor:
    return lm.logits(lm.batch(lm.encode(["the the the", "in the end"])), [stack])


def tensors(path: Path) -> dict[str, Any]:
    return {t.name: gguf.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(path).tensors}


def applied(source: Path, adapter: Path, out: Path) -> Path:
    """The base's file with B A added to each weight that the adapter names: what llama.cpp computes, as weights."""
    low = tensors(adapter)

    def added(name: str, tensor: Any) -> tuple[Any, None]:
        weight = np.array(tensor.data)
        if f"{name}.lora_a" in low:
            weight = weight + low.pop(f"{name}.lora_b") @ low.pop(f"{name}.lora_a")
        return weight.astype(np.float32), None

    ggufs.rewritten(source, out, added)
    assert not low, f"of no weight of the base: {sorted(low)}"
    return out


def test_the_adapter_is_the_patch(base: LM, gguf_file: Path, tmp_path: Path) -> None:
    """Added to the file's own weights and read by transformers, it says what the stack says."""
    stack = everywhere(base)
    report = export_gguf(base, stack, tmp_path / "edit.gguf")
    fields = gguf.GGUFReader(tmp_path / "edit.gguf").fields
    told = {
        key: fields[key].contents() for key in ("general.type", "general.architecture", "adapter.type", "adapter.lora.alpha", "errata.base")
    }
    assert told == {
        "general.type": "adapter", "general.architecture": "llama", "adapter.type": "lora", "adapter.lora.alpha": 0.0,
        "errata.base": base.fingerprint,
    }  # fmt: skip
    ranks = {w.path: w.rank for w in report.linears}
    assert ranks["model.layers.0.self_attn.q_proj"] == 3 and ranks["model.layers.1.self_attn.k_proj"] == 2 and report.lost < 1e-7
    shapes = {name: t.shape for name, t in tensors(tmp_path / "edit.gguf").items()}
    assert shapes["blk.0.attn_q.weight.lora_a"] == (3, ggufs.WIDTH) and shapes["blk.1.ffn_down.weight.lora_b"] == (ggufs.WIDTH, 3)
    edited = errata.load(applied(gguf_file, tmp_path / "edit.gguf", tmp_path / "sum.gguf"), dtype="float32")
    torch.testing.assert_close(said(edited), said(base, *stack), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(said(base), said(base, *stack), atol=0.1)


def test_rows_of_queries_are_in_pairs(base: LM) -> None:
    """llama.cpp turns neighbouring numbers of a head, transformers those half a head apart."""
    half = ggufs.WIDTH // ggufs.HEADS // 2
    pairs = [head * 2 * half + 2 * j + h for head in range(ggufs.HEADS) for h in (0, 1) for j in range(half)]
    layout = Layout.of(base)
    for point in POINTS:
        (change,) = weight_deltas(base, (made(base, 0, 1, point),))
        wanted = pairs if point in POINTS[:2] else list(range(change.sizes[1]))
        assert layout.rows(change).tolist() == wanted, point


@pytest.mark.parametrize("kind", READ)
def test_the_readers_of_transformers_undo_the_order(kind: str) -> None:
    """A weight put in a file's order is read back as it was; every linear of a block has a name that its architecture has."""
    lm = LM(build(kind), tokenizer(), kind)
    layout = Layout.of(lm)
    paths = [name for name, module in lm.blocks[1].named_modules() if isinstance(module, torch.nn.Linear | Conv1D)]
    assert len(paths) >= 4
    for path in paths:
        op = Op("low_rank", Site(1, path), dict.fromkeys(("down", "up"), torch.zeros(1, 1)))
        (change,) = (c for c in [_change(lm, op)])
        inner, outer = change.sizes
        weight = np.random.default_rng(0).normal(size=(outer, inner)).astype(np.float32)
        kept = np.empty_like(weight)
        kept[layout.rows(change).numpy()] = weight
        name = layout.name(change)
        read = layout._reader.process(weights=kept, name=name).weights
        assert name.startswith("blk.1.") and np.array_equal(read.T if change.transposed else read, weight), path


def _change(lm: LM, op: Op) -> Any:
    from errata.export.changes import WeightDelta

    path = f"{lm.family.blocks}.{op.site.block}.{op.site.point}"
    return WeightDelta(path, resolve(lm.hf, path), (op,))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_baked_file_is_the_base_with_the_change(base: LM, gguf_file: Path, tmp_path: Path, dtype: str) -> None:
    stack = everywhere(base)
    report = bake_gguf(base, stack, tmp_path / "out.gguf", dtype=dtype)
    before, after = tensors(gguf_file), tensors(tmp_path / "out.gguf")
    edited = {
        f"blk.{b}.{n}.weight"
        for b, n in ((0, "attn_q"), (1, "attn_k"), (0, "attn_v"), (1, "attn_output"), (0, "ffn_gate"), (1, "ffn_down"))
    }
    assert before.keys() == after.keys() and {n for n in before if not np.array_equal(before[n], after[n])} == edited
    assert report.lost < {"float32": 1e-6, "float16": 1e-2, "bfloat16": 0.1}[dtype] and (report.lost > 1e-5 or dtype == "float32")
    loaded = errata.load(tmp_path / "out.gguf", dtype="float32")
    close = {"float32": 1e-4, "float16": 0.05, "bfloat16": 0.3}[dtype]
    torch.testing.assert_close(said(loaded), said(base, *stack), atol=close, rtol=1e-3)
    assert loaded.tokenizer("in the end")["input_ids"] == base.tokenizer("in the end")["input_ids"]


def test_a_quantised_base_keeps_what_is_not_edited_to_the_bit(models_cache: Path, gguf_file: Path, tmp_path: Path) -> None:
    """Edited weights are float16, or of the base's own kind (`same`), whose steps lose what is told."""

    def four_bits(_: str, tensor: Any) -> tuple[Any, Any]:
        kind = gguf.GGMLQuantizationType.Q4_1 if tensor.data.ndim == 2 else gguf.GGMLQuantizationType.F32
        return gguf.quantize(tensor.data, kind), kind

    packed = ggufs.rewritten(gguf_file, tmp_path / "packed.gguf", four_bits)
    lm = errata.load(packed, dtype="float32")
    stack = (made(lm, 0, 2),)
    half, same = bake_gguf(lm, stack, tmp_path / "half.gguf"), bake_gguf(lm, stack, tmp_path / "same.gguf", dtype="same")
    assert (half.dtype, same.dtype) == ("F16", "Q4_1") and half.lost < 1e-2 < same.lost
    raw = {
        name: {t.name: (t.tensor_type.name, t.data.tobytes()) for t in gguf.GGUFReader(tmp_path / f"{name}.gguf").tensors}
        for name in ("packed", "half", "same")
    }
    for name, kind in (("half", "F16"), ("same", "Q4_1")):
        assert {n for n in raw["packed"] if raw[name][n] != raw["packed"][n]} == {"blk.1.ffn_down.weight"}
        assert raw[name]["blk.1.ffn_down.weight"][0] == kind
    torch.testing.assert_close(said(errata.load(tmp_path / "half.gguf", dtype="float32")), said(lm, *stack), atol=0.05, rtol=1e-2)


def test_what_a_gguf_has_no_place_for_is_refused(base: LM, tmp_path: Path) -> None:
    out = tmp_path / "edit.gguf"
    gated = errata.edit(base, "the", " end", method="reft", steps=1)
    with pytest.raises(PatchError, match="is no change of weights"):
        export_gguf(base, (gated,), out)
    for kind, message in (("gpt_neox", "order of rows of a gpt_neox model"), ("qwen3_moe", "order of rows of a qwen3_moe model")):
        lm = LM(build(kind), tokenizer(), kind)
        with pytest.raises(ModelError, match=message):
            export_gguf(lm, (made(lm, 0, point="attn_out"),), out)
    lm = LM(build("llama"), tokenizer(), "almanac")
    with pytest.raises(ModelError, match="almanac is no GGUF file, of which a copy is to be edited; name one with --base"):
        bake_gguf(lm, (made(lm, 0),), out)
    with pytest.raises(ConfigError, match="there are float16, bfloat16, float32"):
        export_gguf(base, everywhere(base), out, dtype="float64")
    with pytest.raises(ConfigError, match="rank must be at least 1"):
        export_gguf(base, everywhere(base), out, rank=0)
    huge = Patch(
        "test", {}, base.fingerprint, (), (Op("dense", Site(0, "mlp_down"), {"weight": torch.full((ggufs.WIDTH, ggufs.INNER), 1e6)}),)
    )
    with pytest.raises(ModelError, match="too large for F16"):
        bake_gguf(base, (huge,), out)
    assert not list(tmp_path.glob("*edit*")) and not list(tmp_path.glob(".*"))


def test_a_base_of_another_model_is_refused(base: LM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stack = (made(base, 0),)
    ggufs.write(tmp_path / "lacks.gguf", without="blk.1.ffn_down")
    with pytest.raises(ModelError, match=r"lacks\.gguf has no weight blk\.1\.ffn_down\.weight"):
        bake_gguf(base, stack, tmp_path / "out.gguf", base=tmp_path / "lacks.gguf")
    ggufs.write(tmp_path / "qwen.gguf", "qwen2")
    with pytest.raises(ModelError, match="holds a qwen2 model, not a llama one"):
        bake_gguf(base, stack, tmp_path / "out.gguf", base=tmp_path / "qwen.gguf")
    monkeypatch.setattr(ggufs, "WIDTH", 64)
    ggufs.write(tmp_path / "wide.gguf")
    with pytest.raises(ModelError, match=r"in the base's file, .* in this model; it is of another model"):
        bake_gguf(base, stack, tmp_path / "out.gguf", base=tmp_path / "wide.gguf")
    assert not (tmp_path / "out.gguf").exists()


def test_nothing_of_others_is_overwritten(base: LM, gguf_file: Path, tmp_path: Path) -> None:
    stack = (made(base, 0),)
    before = gguf_file.read_bytes()
    for write in (export_gguf, bake_gguf):
        with pytest.raises(StorageError, match="is not a GGUF that errata wrote"):
            write(base, stack, gguf_file, force=True)
        with pytest.raises(ConfigError, match=r"ends in \.gguf"):
            write(base, stack, tmp_path / "edit")
        out = tmp_path / f"{write.__name__}.gguf"
        first = write(base, stack, out).path.read_bytes()
        with pytest.raises(StorageError, match="exists already; give another name, or force"):
            write(base, stack, out)
        with pytest.raises(ErrataError):
            write(base, (), out, force=True)
        assert out.read_bytes() == first
        write(base, (made(base, 1),), out, force=True)
        assert out.read_bytes() != first
    assert gguf_file.read_bytes() == before


def test_commands(models_cache: Path, gguf_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`patch export --format gguf`, `patch bake --out FILE.gguf`, `ledger export --gguf`, from the file to the file."""
    lm = errata.load(gguf_file, dtype="float32")
    made(lm, 0).save(tmp_path / "patch")
    given = [str(gguf_file), "--patch", str(tmp_path / "patch"), "--json"]
    assert main(["patch", "export", *given, "--format", "gguf", "--out", str(tmp_path / "edit.gguf")]) == 0
    assert json.loads(capsys.readouterr().out)["linears"][0]["path"] == "model.layers.1.mlp.down_proj"
    assert main(["patch", "bake", *given, "--dtype", "float32", "--out", str(tmp_path / "baked.gguf")]) == 0
    assert json.loads(capsys.readouterr().out)["format"] == "gguf"
    wrong = {
        "--every-block is for --format lora": ["export", *given, "--format", "gguf", "--every-block", "--out", str(tmp_path / "x.gguf")],
        "ends in .gguf": ["export", *given, "--format", "gguf", "--out", str(tmp_path / "x")],
        "--base is for a GGUF": ["bake", *given, "--base", str(gguf_file), "--out", str(tmp_path / "x")],
    }
    for message, words in wrong.items():
        assert main(["patch", *words]) == 2 and message in capsys.readouterr().err
    edit = ["--method", "ft-l", "--set", "layers=[1]", "--set", "steps=1", "--prompt", "the", "--target", "end"]
    main(["ledger", "apply", str(tmp_path / "book"), "--model", str(gguf_file), *edit, "--force"])
    capsys.readouterr()
    assert main(["ledger", "export", str(tmp_path / "book"), "--gguf", "--out", str(tmp_path / "out"), "--rank", "2"]) == 0
    assert f"llama-server -m BASE.gguf --lora {tmp_path}/out/edits.gguf" in capsys.readouterr().out
    assert set(tensors(tmp_path / "out/edits.gguf")) == {"blk.1.ffn_down.weight.lora_a", "blk.1.ffn_down.weight.lora_b"}
