"""Stacks as checkpoints and as LoRA adapters: the same logits as under the patches, in programs without errata."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from families import lm, tokenizer
from made import DTYPES, a_stack, adapted, logits, made, plain, raw, same
from safetensors import safe_open
from tiny import FRANCE, leftovers, saved

import errata
from errata.cli import main
from errata.core.model import LM
from errata.core.patch import Op, Patch, Site
from errata.core.weights import delta_weight
from errata.errors import ConfigError, ModelError, PatchError, StorageError
from errata.export import bake, export_lora


def contents(folder: Path) -> dict[str, tuple[str, list[int]]]:
    """Name, dtype and shape of every tensor, as safetensors itself reads them."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {k: (file.get_slice(k).get_dtype(), file.get_slice(k).get_shape()) for k in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "gemma3_text", "phi3"])
def test_bake(family: str, dtype: str, tmp_path: Path) -> None:
    base = lm(family, DTYPES[dtype])
    before = {k: v.clone() for k, v in base.hf.state_dict().items()}
    stack = a_stack(base)
    report = bake(base, stack, tmp_path / "out")
    assert all(torch.equal(v, before[k]) for k, v in base.hf.state_dict().items())
    base.hf.save_pretrained(tmp_path / "theirs")
    assert contents(tmp_path / "out") == contents(tmp_path / "theirs")
    hf = plain(tmp_path / "out")
    assert hf.dtype == DTYPES[dtype] and report.dtype == dtype
    if dtype == "float32":
        same(raw(hf), logits(base, *stack), base)
        assert report.lost < 1e-5
    else:  # what is stored is the sum rounded once, to the bit
        assert 1e-4 < report.lost < 0.05
        same(raw(hf).float(), logits(base, *stack).float(), base, 0.3)
    state = hf.state_dict()
    site = {
        f"{base.family.blocks}.{b}.{base.linear_path(Site(b, p))}.weight": (b, p)
        for b, p in ((1, "mlp_down"), (2, "mlp_down"), (2, "attn_out"))
    }
    for name, value in before.items():
        if name not in site:
            assert torch.equal(state[name], value), name
            continue
        change = sum(delta_weight(op) for patch in stack for op in patch.ops if (op.site.block, op.site.point) == site[name])
        exact = value.double() + (change.mT if family == "gpt2" else change)
        assert torch.equal(state[name], exact.to(value.dtype)), name
    if family == "gpt2":
        assert hf.lm_head.weight.data_ptr() == hf.transformer.wte.weight.data_ptr()
        assert "lm_head.weight" not in contents(tmp_path / "out")
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


# -- LoRA -----------------------------------------------------------------------------------------------------


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
    dense = Patch("t", {}, base.fingerprint, (), (Op("dense", thin.ops[0].site, {"weight": delta_weight(thin.ops[0]).float()}),))
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


# -- the commands ---------------------------------------------------------------------------------------------


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
