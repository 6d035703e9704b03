"""Stacks as one op a site, as checkpoints and as LoRA adapters: the same logits as under the patches, in programs without errata."""

from __future__ import annotations

import errno
import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import SENTENCES, lm, tokenizer
from safetensors import safe_open
from tiny import FRANCE, leftovers, saved
from torch import Tensor

import errata
from errata.cli import main
from errata.errors import ConfigError, ErrataError, ModelError, PatchError, StorageError
from errata.export import bake, export_lora
from errata.families import linear_sizes, resolve
from errata.model import LM
from errata.patch import Op, Patch, Site
from errata.weights import compact, delta, merge

PROMPTS = [p for p, _ in SENTENCES]
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


def made(base: LM, seed: int, rank: int = 2, point: str = "mlp_down", block: int = 1, dtype: torch.dtype = torch.float32) -> Patch:
    """A random patch of one op; rank 0 is dense."""
    inner, outer = linear_sizes(resolve(base.blocks[block], base.family.linear_path(point)))
    generator = torch.Generator().manual_seed(seed)
    shapes = {"down": (rank, inner), "up": (outer, rank)} if rank else {"weight": (outer, inner)}
    tensors = {k: (0.15 * torch.randn(s, generator=generator, dtype=torch.float64)).to(dtype) for k, s in shapes.items()}
    return Patch("test", {}, base.fingerprint, (), (Op("low_rank" if rank else "dense", Site(block, point), tensors),))


def logits(base: LM, *stack: Patch) -> Tensor:
    return base.logits(base.batch(base.encode(PROMPTS)), [stack])


def raw(hf: Any) -> Tensor:
    """Logits of a plain transformers (or PEFT) model on the same batch."""
    probe = lm("llama")
    batch = probe.batch(probe.encode(PROMPTS))
    with torch.no_grad():
        return hf(
            input_ids=batch.ids, attention_mask=batch.mask, position_ids=(batch.mask.cumsum(1) - 1).clamp_min(0)
        ).logits  # fmt: skip


def same(one: Tensor, other: Tensor, base: LM, atol: float = 1e-4) -> None:
    """At real tokens (what a model says of padding is nobody's business)."""
    mask = base.batch(base.encode(PROMPTS)).mask.bool()
    torch.testing.assert_close(one[mask], other[mask], atol=atol, rtol=1e-4)


# -- one op a site ---------------------------------------------------------------------------------------------


def looped(base: LM, stack: tuple[Patch, ...]) -> Tensor:
    """Logits under a stack by the plainest means: a hook a patch."""

    def beside(op: Op) -> Callable[..., Tensor]:
        def hook(module: Any, args: Any, output: Tensor) -> Tensor:
            t = op.tensors
            if op.kind == "dense":
                return output + args[0] @ t["weight"].T
            return output + (args[0] @ t["down"].T) @ t["up"].T

        return hook

    ops = [op for patch in stack for op in patch.ops]
    hooks = [resolve(base.blocks[o.site.block], base.family.linear_path(o.site.point)).register_forward_hook(beside(o)) for o in ops]
    try:
        return logits(base)
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("count", [1, 2, 50])
def test_a_stack_is_its_patches_one_by_one(count: int, family: str, dtype: str) -> None:
    base = lm(family, DTYPES[dtype])
    stack = tuple(
        made(base, seed, 1 + seed % 3, ("mlp_down", "attn_out")[seed % 2], seed % 4 // 2, DTYPES[dtype]).scale(count**-0.5)
        for seed in range(count)
    )
    near = {"atol": 1e-9, "rtol": 1e-9} if dtype == "float64" else {"atol": 2e-4, "rtol": 1e-3}
    want = looped(base, stack)
    torch.testing.assert_close(logits(base, *stack), want, **near)
    torch.testing.assert_close(logits(base, merge(stack)), want, **near)
    assert not torch.allclose(want, logits(base), atol=1e-3)
    plan = base.plan([stack], None, 1)
    assert all(len(banks) == 1 for banks in plan.banks.values())
    if count == 1:  # used as it is
        (bank,) = (b for banks in plan.banks.values() for b in banks)
        assert bank.params["down"].data_ptr() == stack[0].ops[0].tensors["down"].data_ptr()
    if count == 50 and family == "llama":  # about 25 ranks a site, and R (I + O) > I O from 22
        assert {b.kind for banks in plan.banks.values() for b in banks} == {"dense"}


def test_rows_under_mixed_stacks_get_what_they_get_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """None, one, many and dense side by side, by copies and by entry, in few banks."""
    base = lm("llama", torch.float64)
    p = [made(base, seed, rank, dtype=torch.float64) for seed, rank in enumerate((1, 2, 4, 3, 0, 1, 0, 9))]
    many = tuple(made(base, 100 + i, 1, dtype=torch.float64).scale(0.3) for i in range(40))
    other = made(base, 9, 2, "attn_out", 2, torch.float64)
    stacks = [(), (p[0],), (p[1], p[2]), many, (p[4],), (p[3], p[4], p[6]), (p[5], other), (p[7],), tuple(p)]
    which = torch.tensor([8, 0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 3, 3, 6, 2, 5])
    texts = [PROMPTS[i % len(PROMPTS)] for i in range(len(which))]
    batch = base.batch(base.encode(texts))
    alone = torch.cat([base.logits(base.batch(base.encode(texts)), [stacks[s]])[i : i + 1] for i, s in enumerate(which.tolist())])
    plain = base.logits(batch)
    for few in (2_000_000, 0):
        monkeypatch.setattr("errata.bank.FEW", few)
        monkeypatch.setattr("errata.bank.LAUNCH", {"cpu": 0})
        mixed = base.logits(batch, stacks, which)
        torch.testing.assert_close(mixed, alone, atol=1e-9, rtol=1e-9)
        assert torch.equal(mixed[which == 0], plain[which == 0])
    plan = base.plan(stacks, which, len(which))
    assert sum(map(len, plan.banks.values())) <= 5  # a site: dense, rank to 4, to 8, to 16; the other site


def test_equal_stacks_share_their_sum() -> None:
    base = lm("llama")
    stack = tuple(made(base, seed, 1) for seed in range(5))
    (banks,) = base.plan([tuple(stack) for _ in range(6)], range(6), 6).banks.values()
    assert [b.params["down"].shape for b in banks] == [(1, 5, 64)]


def test_an_op_that_reads_y_stays_in_its_place() -> None:
    """A subspace op at a linear's output between two weight-like ones sees the first and not the second."""
    base = lm("llama")
    a, b = made(base, 0), made(base, 1)
    site = a.ops[0].site
    g = torch.Generator().manual_seed(0)
    r = torch.linalg.qr(torch.randn(32, 3, generator=g)).Q.mT.contiguous()
    tensors = {"R": r, "A": torch.randn(3, 32, generator=g), "b": torch.randn(3, generator=g)}
    reads = Patch("test", {}, base.fingerprint, (), (Op("subspace", site, tensors, {"gate": "none", "last": 99}),))
    banks = base.plan([(a, a.scale(0.5), reads, b, b.scale(0.5))], None, 1).banks[site]
    assert [bank.kind for bank in banks] == ["low_rank", "subspace", "low_rank"]
    want = logits(base, a, a.scale(0.5), reads, b, b.scale(0.5))
    torch.testing.assert_close(logits(base, a.scale(1.5), reads, b.scale(1.5)), want, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(logits(base, reads, a.scale(1.5), b.scale(1.5)), want, atol=1e-2)


@pytest.mark.parametrize("rank", [1, 3, 12, 20, 33, 70])
def test_compact(rank: int) -> None:
    """I = 64, O = 32: factors of rank 22 and more hold more numbers than the matrix."""
    op = made(lm("llama"), 0, rank).ops[0]
    small = compact(op)
    assert small.kind == ("low_rank" if rank < 22 else "dense") and small.tensors.keys() <= {"down", "up", "weight"}
    torch.testing.assert_close(delta(small), delta(op), atol=1e-6, rtol=1e-5)
    assert {t.dtype for t in small.tensors.values()} == {torch.float32}
    twice = Op("low_rank", op.site, {"down": op.tensors["down"].repeat(3, 1), "up": op.tensors["up"].repeat(1, 3)})
    again = compact(twice)
    assert again.kind == small.kind and (rank > 21 or again.tensors["down"].shape == (rank, 64))
    torch.testing.assert_close(delta(again), 3 * delta(op), atol=1e-5, rtol=1e-5)


def test_patches_that_disagree_on_a_linear() -> None:
    base = lm("llama")
    bad = Patch("t", {}, base.fingerprint, (), (Op("low_rank", Site(1, "mlp_down"), {"down": torch.ones(1, 8), "up": torch.ones(32, 1)}),))
    with pytest.raises(PatchError, match=r"differ in the size of the linear"):
        base.plan([(made(base, 0), bad)], None, 1)
    with pytest.raises(PatchError, match=r"maps \(64, 32\), a patch \(8, 32\)"):
        bake(base, (bad,), "nowhere")
    odd = Patch("t", {}, base.fingerprint, (), (Op("low_rank", Site(1, "mlp_down"), {"down": torch.ones(2, 64), "up": torch.ones(32, 1)}),))
    with pytest.raises(PatchError, match=r"has tensors of shapes"):
        export_lora(base, (odd,), "nowhere")


# -- bake ------------------------------------------------------------------------------------------------------


def plain(folder: Path, **how: Any) -> Any:
    """As any program would load it; complaints are errors here."""
    from transformers import AutoModelForCausalLM

    hf, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **how)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return hf.eval()


def a_stack(base: LM) -> tuple[Patch, ...]:
    return made(base, 0, 2), made(base, 1, 0, block=2), made(base, 2, 1, "attn_out", 2), made(base, 3, 3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "gemma3_text", "phi3"])
def test_bake(family: str, dtype: str, tmp_path: Path) -> None:
    base = lm(family, DTYPES[dtype])
    before = {k: v.clone() for k, v in base.hf.state_dict().items()}
    stack = a_stack(base)
    report = bake(base, stack, tmp_path / "out")
    assert all(torch.equal(v, before[k]) for k, v in base.hf.state_dict().items())
    hf = plain(tmp_path / "out")
    assert hf.dtype == DTYPES[dtype] and report.dtype == dtype
    if dtype == "float32":
        same(raw(hf), logits(base, *stack), base)
        assert report.lost < 1e-5
    else:  # what is stored is the sum rounded once, to the bit
        assert 1e-4 < report.lost < 0.05
    state = hf.state_dict()
    site = {
        f"{base.family.blocks}.{b}.{base.family.linear_path(p)}.weight": (b, p)
        for b, p in ((1, "mlp_down"), (2, "mlp_down"), (2, "attn_out"))
    }
    for name, value in before.items():
        if name not in site:
            assert torch.equal(state[name], value), name
            continue
        change = sum(delta(op) for patch in stack for op in patch.ops if (op.site.block, op.site.point) == site[name])
        exact = value.double() + (change.mT if family == "gpt2" else change)
        assert torch.equal(state[name], exact.to(value.dtype)), name
    if family == "gpt2":
        assert hf.lm_head.weight.data_ptr() == hf.transformer.wte.weight.data_ptr()
        with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
            assert "lm_head.weight" not in file.keys()  # noqa: SIM118
    again = errata.load(tmp_path / "out")
    assert again.complete(FRANCE, max_new_tokens=2) == LM(hf, tokenizer()).complete(FRANCE, max_new_tokens=2)
    assert json.loads((tmp_path / "out" / "errata.json").read_text())["base"] == base.fingerprint


def test_bake_keeps_the_shards_of_the_base(tmp_path: Path) -> None:
    folder = saved(tmp_path / "base")
    hf = plain(folder)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    hf.save_pretrained(folder, max_shard_size="20KB")
    base = errata.load(folder)
    stack = a_stack(base)
    bake(base, stack, tmp_path / "out")
    same(raw(plain(tmp_path / "out")), logits(base, *stack), base)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    wanted = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index == wanted and len(set(index["weight_map"].values())) > 3
    assert {p.name for p in folder.iterdir()} <= {p.name for p in (tmp_path / "out").iterdir()}


def test_bake_in_another_dtype_and_in_place_of_an_earlier_one(tmp_path: Path) -> None:
    base, out = lm("llama"), tmp_path / "out"
    stack = a_stack(base)
    bake(base, stack[:1], out)
    with pytest.raises(StorageError, match="exists already; give another name, or force=True"):
        bake(base, stack, out)
    assert bake(base, stack, out, dtype="bfloat16", force=True).dtype == "bfloat16"
    hf = plain(out)
    assert {p.dtype for p in hf.parameters()} == {torch.bfloat16} and json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    same(raw(hf.float()), logits(base, *stack), base, 0.3)
    with pytest.raises(ModelError, match=r"too large for torch\.float16"):
        bake(base, (stack[0].scale(1e6),), tmp_path / "big", dtype="float16")
    assert leftovers(tmp_path) == ["out"]


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


# -- LoRA ------------------------------------------------------------------------------------------------------


def adapted(base: LM, folder: Path) -> Any:
    """The real PEFT around a fresh copy of the base."""
    from peft import PeftModel

    fresh = lm(base.name, base.dtype)
    with warnings.catch_warnings():  # PEFT asks transformers by an old name
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        return PeftModel.from_pretrained(fresh.hf, folder).eval()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_lora(family: str, tmp_path: Path) -> None:
    base = lm(family)
    stack = made(base, 0, 2), made(base, 1, 2), made(base, 2, 3, "attn_out", 2), made(base, 3, 1, "mlp_down", 3)
    report = export_lora(base, stack, tmp_path / "out")
    assert sorted(w.rank for w in report.linears) == [1, 3, 4] and report.lost < 1e-6
    model = adapted(base, tmp_path / "out")
    touched = {n.partition(".lora_A")[0] for n, _ in model.named_parameters() if ".lora_A." in n}
    assert touched == {f"base_model.model.{w.path}" for w in report.linears}
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.fan_in_fan_out) == (4, 4, family == "gpt2")
    want = logits(base, *stack)
    same(raw(model), want, base)
    with model.disable_adapter():
        same(raw(model), logits(base), base)
    same(raw(model.merge_and_unload()), want, base)


def test_lora_names_every_linear_of_every_block(tmp_path: Path) -> None:
    """Above twenty targets PEFT shortens the list; it must still reach these and no others."""
    base = lm("llama")
    points = (
        "mlp.down_proj",
        "mlp.up_proj",
        "mlp.gate_proj",
        "self_attn.o_proj",
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
    )
    stack = tuple(made(base, 10 * b + i, 1, p, b).scale(0.3) for b in (0, 1, 3) for i, p in enumerate(points))
    report = export_lora(base, stack, tmp_path / "out")
    model = adapted(base, tmp_path / "out")
    assert sum(".lora_A." in n for n, _ in model.named_parameters()) == len(report.linears) == 21
    same(raw(model), logits(base, *stack), base)


def test_lora_of_dense_ops(tmp_path: Path) -> None:
    base = lm("llama")
    thin = made(base, 0, 3)
    dense = Patch("t", {}, base.fingerprint, (), (Op("dense", thin.ops[0].site, {"weight": delta(thin.ops[0]).float()}),))
    report = export_lora(base, (dense,), tmp_path / "thin")
    assert [w.rank for w in report.linears] == [3] and report.lost < 1e-6
    same(raw(adapted(base, tmp_path / "thin")), logits(base, dense), base)
    full = made(base, 1, 0)
    with pytest.raises(PatchError, match=r"is dense and of rank 32.*rank=N \(--rank N\): 64 would lose 0\.0% of its norm"):
        export_lora(base, (full,), tmp_path / "full")
    report = export_lora(base, (full,), tmp_path / "full", rank=8)
    values = torch.linalg.svdvals(full.ops[0].tensors["weight"].double())
    assert report.lost == pytest.approx(float(values[8:].norm() / values.norm()), rel=1e-4)
    assert adapted(base, tmp_path / "full").peft_config["default"].r == 8
    report = export_lora(base, (made(base, 2, 40),), tmp_path / "wide")  # rank 40 of at most 32
    assert [w.rank for w in report.linears] == [32] and report.lost < 1e-6
    report = export_lora(base, (thin,), tmp_path / "half", dtype="bfloat16")
    assert 1e-4 < report.lost < 1e-2
    with pytest.raises(ConfigError, match="rank must be at least 1"):
        export_lora(base, (thin,), tmp_path / "none", rank=0)


# -- bad input -------------------------------------------------------------------------------------------------

WRITERS = pytest.mark.parametrize("write", [bake, export_lora])


@WRITERS
def test_what_cannot_be_exported(write: Callable[..., Any], tmp_path: Path, good: Path) -> None:
    base, out = lm("llama"), tmp_path / "out"
    cases: list[tuple[tuple[Patch, ...], dict[str, Any], type[ErrataError], str]] = [
        ((), {}, PatchError, "no patch to export"),
        ((made(lm("qwen2"), 0),), {}, PatchError, "was made for base"),
        ((Patch.load(good),), {}, PatchError, r"was made with baft, whose 'subspace' op .* serve it with errata .*rome, memit"),
        ((made(base, 0),), {"dtype": "int8"}, ConfigError, "dtype 'int8' cannot hold"),
        ((Patch("t", {}, base.fingerprint, (), (Op("dense", Site(1), {"weight": torch.eye(32)}),)),), {}, PatchError, "beside block 1"),
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
    left, real = [min(files, len(before) - 1)], os.fsync

    def full(descriptor: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
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


# -- the commands ----------------------------------------------------------------------------------------------


@pytest.fixture
def folders(tiny: str, tmp_path: Path) -> list[str]:
    """Two patches on disk."""
    base = errata.load(tiny)
    return [str(made(base, seed, 2).save(tmp_path / f"p{seed}")) for seed in (0, 1)]


def test_bake_export_and_merge_from_the_command_line(
    tiny: str, folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, stack = errata.load(tiny), tuple(map(Patch.load, folders))
    want, out = logits(base, *stack), tmp_path / "out"
    argv = ["patch", "bake", tiny, "--patch", folders[0], "--patch", folders[1], "--out", str(out)]
    assert main(argv) == 0
    said, err = capsys.readouterr()
    assert err == "" and f"Saved in {out}." in said and "AutoModelForCausalLM.from_pretrained" in said and "Rounding" not in said
    same(raw(plain(out)), want, base)
    assert main(argv) == 6
    assert "exists already" in capsys.readouterr().err
    assert main([*argv, "--force", "--dtype", "bfloat16", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["dtype"] == "bfloat16" and found["patches"] == [p.id for p in stack] and found["linears"][0]["rank"] == 4
    assert main(["patch", "export", tiny, "--patch", *folders, "--out", str(tmp_path / "lora"), "--format", "lora", "--rank", "1"]) == 0
    said = capsys.readouterr().out
    assert "PeftModel.from_pretrained" in said and "--enable-lora" in said and "The adapter lacks up to" in said
    assert main(["patch", "merge", "--patch", *folders, "--out", str(tmp_path / "one")]) == 0
    torch.testing.assert_close(logits(base, Patch.load(tmp_path / "one")), want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (["--patch", "P", "--dtype", "int8"], 2, "dtype 'int8' cannot hold exported weights"),
        (["--patch", "GOOD"], 4, "serve it with errata"),
        (["--patch", "MISSING"], 4, "patch.json is missing"),
        (["--patch", "P", "--device", "abacus"], 3, "device 'abacus' cannot be used"),
        ([], 2, "--patch"),
    ],
)
@pytest.mark.parametrize("command", [["bake"], ["export", "--format", "lora"]])
def test_bad_commands(
    command: list[str], more: list[str], code: int, message: str, tiny: str, folders: list[str], good: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    names = {"P": folders[0], "GOOD": str(good), "MISSING": str(tmp_path / "missing")}
    argv = ["patch", command[0], tiny, *command[1:], *(names.get(m, m) for m in more), "--out", str(tmp_path / "out")]
    assert main(argv) == code
    out, err = capsys.readouterr()
    assert out == "" and message in err and not (tmp_path / "out").exists()


# -- weights that lie elsewhere --------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("how", ["device_map", "cpu_offload", "disk_offload", "mixed"])
def test_patches_run_on_an_offloaded_base(how: str, family: str, good: Path, tmp_path: Path) -> None:
    """accelerate moves each weight in for its own call; a patch reads none of them."""
    import accelerate

    folder = saved(tmp_path / "m", family)
    base = errata.load(folder)
    stack = (made(base, 0, 2), made(base, 1, 0))
    if family == "llama":
        stack = (*stack, Patch.load(good))
    want = logits(base, *stack)
    cpu = torch.device("cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if how == "device_map":
            away = errata.load(folder, device_map={"": "cpu"})
        elif how == "mixed":
            heads = {
                "llama": ("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"),
                "gpt2": ("transformer.wte", "transformer.wpe", "transformer.ln_f", "lm_head"),
            }
            where = dict.fromkeys(heads[family], "cpu") | {f"{base.family.blocks}.{i}": ("cpu", "disk")[i % 2] for i in range(4)}
            away = errata.load(folder, device_map=where, offload_folder=str(tmp_path / "off"))
        else:
            away = errata.load(folder)
            more = (str(tmp_path / "off"),) if how == "disk_offload" else ()
            getattr(accelerate, how)(away.hf, *more, execution_device=cpu)
    assert (how == "device_map") == all(p.device.type == "cpu" for p in away.hf.parameters())
    assert away.device == cpu and away.fingerprint == base.fingerprint
    assert torch.equal(logits(away, *stack), want)
    assert torch.equal(logits(away), logits(base))
    if how != "device_map":
        with pytest.raises(ModelError, match="are not in memory"):
            bake(away, stack[:1], tmp_path / "out")
    shutil.rmtree(tmp_path / "off", ignore_errors=True)
