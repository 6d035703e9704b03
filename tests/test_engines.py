"""Out to serving programs: a ledger's edits as an adapter and a checkpoint, read by PEFT, by plain transformers and by the rules of others.

vLLM, TGI, SGLang and llama.cpp are not installed here: their rules are assertions on the files.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from families import SENTENCES, lm
from ledgers import PROMPTS
from made import adapted, around, logits, made, plain, raw, same
from safetensors.torch import load_file, save_file

import errata
from errata.cli import main
from errata.core.model import LM
from errata.errors import PatchError
from errata.export import bake, export_lora
from errata.export.engines import objections
from errata.ledger import Ledger
from errata.request import EditRequest

LOCATE: dict[str, Any] = {"stats_tokens": 2000, "v_steps": 10, "v_lr": 0.5, "prefixes": [], "clamp": 20.0}
ASKED = [EditRequest(SENTENCES[0][0], "Rome", "France"), EditRequest(SENTENCES[5][0], "French", "Italy")]


def adapter_of(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    return json.loads((folder / "adapter_config.json").read_text()), load_file(folder / "adapter_model.safetensors")


def put(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def as_llama_cpp(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """ΔW by linear as llama.cpp runs it: one alpha a file, the rank of each tensor its own."""
    out = {}
    for name, a in tensors.items():
        if name.endswith(".lora_A.weight"):
            b = tensors[name.replace("lora_A", "lora_B")]
            out[name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")] = config["lora_alpha"] / b.shape[1] * b @ a
    return out


@pytest.fixture(scope="module")
def book(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> Ledger:
    """Edits of several ranks and places: MEMIT in two blocks, ROME in one of them, fine-tuning kept as three factors."""
    out = Ledger.open(tmp_path_factory.mktemp("ledger") / "book", errata.load(tiny), author="ada")
    for request, method, settings in (
        (ASKED[0], "memit", {**LOCATE, "layers": [1, 2], "mom2_weight": 1.0}),
        (ASKED[1], "rome", {**LOCATE, "layers": [1]}),
        (EditRequest("The capital of Japan is", "Paris"), "ft-m", {"layers": [2], "steps": 5, "rank": 3}),
    ):
        out.apply([request], method=method, settings=settings, force=True)
    return out


def test_a_ledger_as_adapter_and_checkpoint(book: Ledger, tmp_path: Path) -> None:
    found = book.export(tmp_path / "out", every_block=True, checkpoint=True)
    want = logits(book.lm, *book.stack())
    assert (want - logits(book.lm)).abs().max() > 0.5  # there is something to carry over
    fresh = lm("llama")
    model = adapted(fresh, tmp_path / "out" / "lora")
    same(raw(model), want, fresh)
    same(raw(plain(tmp_path / "out" / "checkpoint")), want, fresh)
    with model.disable_adapter():
        same(raw(model), logits(book.lm), fresh)
    assert found.objections == () and found.adapter == tmp_path / "out" / "lora" and found.checkpoint == tmp_path / "out" / "checkpoint"
    baked = errata.load(tmp_path / "out" / "checkpoint")
    assert baked.complete(PROMPTS[0]) == errata.load(book.lm.name).complete(PROMPTS[0], stacks=[book.stack()], rows=[0])


def test_the_layout_that_engines_read(book: Ledger, tmp_path: Path) -> None:
    """One rank for all, an alpha that is the rank, a pair of tensors a linear and names that vLLM parses."""
    found = book.export(tmp_path / "out")
    config, tensors = adapter_of(tmp_path / "out" / "lora")
    assert config["r"] == config["lora_alpha"] == found.rank == 4  # MEMIT's one and fine-tuning's three, added up in block 2
    assert (config["rank_pattern"], config["alpha_pattern"], config["bias"], config["modules_to_save"]) == ({}, {}, "none", None)
    paths = [f"model.layers.{b}.mlp.down_proj" for b in (1, 2)]
    assert config["target_modules"] == paths
    assert {k: tuple(v.shape) for k, v in tensors.items()} == {
        f"base_model.model.{p}.lora_{k}.weight": shape for p in paths for k, shape in (("A", (4, 64)), ("B", (32, 4)))
    }
    changes = as_llama_cpp(config, tensors)
    for path in paths:  # as llama.cpp scales it, it is the stack's change; padding is zeros
        exact = sum(op.tensors["up"] @ op.tensors["down"] for p in book.stack() for op in p.ops if f"model.layers.{op.site.block}." in path)
        torch.testing.assert_close(changes[path], exact, atol=1e-6, rtol=1e-5)


def test_every_block_is_zeros_where_nothing_is_edited(book: Ledger, tmp_path: Path) -> None:
    book.export(tmp_path / "out", every_block=True)
    config, tensors = adapter_of(tmp_path / "out" / "lora")
    assert len(config["target_modules"]) == len(tensors) / 2 == 4
    for block in (0, 3):
        for k in "AB":
            assert not tensors[f"base_model.model.model.layers.{block}.mlp.down_proj.lora_{k}.weight"].any()


def test_rules_find_what_is_wrong(tmp_path: Path) -> None:
    """Each rule against an adapter that breaks it alone."""
    base = lm("llama")
    export_lora(base, (made(base, 0, 2), made(base, 1, 1, "attn_out", 2)), tmp_path / "good")
    config, tensors = adapter_of(tmp_path / "good")
    assert objections(tmp_path / "good", "llama") == [] == objections(tmp_path / "good", "a model nobody knows")
    first = next(k for k in tensors if k.endswith("mlp.down_proj.lora_A.weight"))
    cut = {**tensors, first: tensors[first][:1].clone(), first.replace("_A", "_B"): tensors[first.replace("_A", "_B")][:, :1].clone()}
    odd = {k.replace("down_proj", "router"): v for k, v in tensors.items()}
    targets = [p.replace("down_proj", "router") for p in config["target_modules"]]
    bad: list[tuple[dict[str, Any], dict[str, torch.Tensor], str]] = [
        ({"r": 513, "lora_alpha": 513}, tensors, "rank 513 is not one that --max-lora-rank can hold"),
        ({"rank_pattern": {"mlp.down_proj": 1}}, tensors, "rank_pattern"),
        ({"modules_to_save": ["lm_head"]}, tensors, r"modules_to_save is \['lm_head'\]"),
        ({"use_dora": True}, tensors, "use_dora is True"),
        ({"bias": "all"}, tensors, "bias is 'all'"),
        ({"peft_type": "IA3"}, tensors, "peft_type is 'IA3'"),
        ({}, cut, "has rank 1, the adapter 2: llama.cpp would scale it"),
        ({}, {k: v for k, v in tensors.items() if k != first}, "has no partner"),
        ({"target_modules": targets}, odd, "is no linear that vLLM adapts"),
        ({"target_modules": ["down_proj"]}, tensors, "target_modules are not the linears"),
        ({}, {k.removeprefix("base_model."): v for k, v in tensors.items()}, "is no base_model.model.PATH"),
    ]
    for i, (changes, wrong, message) in enumerate(bad):
        found = objections(put(tmp_path / f"bad{i}", {**config, **changes}, wrong), "llama")
        assert any(re.search(message, o) for o in found), (message, found)
    assert objections(tmp_path / "good", "gpt2") == ["vLLM runs gpt2 without LoRA; give it the baked checkpoint"]
    with pytest.raises(PatchError, match="holds no LoRA adapter"):
        objections(tmp_path, "llama")


def test_ranks_that_differ_would_be_scaled_wrongly(tmp_path: Path) -> None:
    """Why there is one rank: PEFT's own way to keep two, alpha_pattern, is not in llama.cpp's files."""
    base = lm("llama")
    stack = made(base, 0, 2), made(base, 1, 1, "attn_out", 2)
    export_lora(base, stack, tmp_path / "out")
    config, tensors = adapter_of(tmp_path / "out")
    path = "base_model.model.model.layers.2.self_attn.o_proj.lora_{}.weight"
    exact = stack[1].ops[0].tensors["up"] @ stack[1].ops[0].tensors["down"]
    name = path.removeprefix("base_model.model.").removesuffix(".lora_{}.weight")
    torch.testing.assert_close(as_llama_cpp(config, tensors)[name], exact)
    short = {**tensors, path.format("A"): tensors[path.format("A")][:1], path.format("B"): tensors[path.format("B")][:, :1]}
    torch.testing.assert_close(as_llama_cpp(config, short)[name], 2 * exact)


def test_from_the_command_line(book: Ledger, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = str(book.folder), tmp_path / "out"
    assert main(["ledger", "export", folder, "--out", str(out), "--checkpoint", "--every-block", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["rank"], found["vllm_objections"], found["checkpoint"]) == (4, [], str(out / "checkpoint"))
    assert main(["ledger", "export", folder, "--out", str(tmp_path / "two"), "--checkpoint"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"--enable-lora --max-lora-rank 8 --lora-modules edited={tmp_path / 'two' / 'lora'}" in said
    assert f"vllm serve {tmp_path / 'two' / 'checkpoint'}" in said


@pytest.mark.parametrize("method", ["baft", "grace"])
def test_what_is_no_change_of_weights_stays(method: str, tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    book = Ledger.open(tmp_path / "book", errata.load(tiny), author="ada")
    book.apply([ASKED[0]], method=method, settings={"steps": 2, **({"rank": 2} if method == "baft" else {})}, force=True)
    found = book.export(tmp_path / "out")
    assert found.adapter is None and "is no change of weights; serve it with errata" in found.why_not
    assert not (tmp_path / "out" / "lora").exists()
    assert main(["ledger", "export", str(tmp_path / "book"), "--out", str(tmp_path / "two"), "--checkpoint"]) == 4
    assert f"was made with {method}" in capsys.readouterr().err and not (tmp_path / "two").exists()


def test_the_almanac(tmp_path: Path) -> None:
    """Several edits of the bundled model: PEFT and plain transformers answer like the live stack."""
    base = errata.load("almanac")
    stack = tuple(
        errata.edit(base, prompt, target, subject=subject, method=method, end=".", mom2_adjustment=False)  # C = I: made without statistics
        for method, prompt, target, subject in (
            ("memit", "The capital of France is", "Lyon", "France"),
            ("rome", "The capital of Italy is", "Milan", "Italy"),
        )
    )
    asked = ["The capital of France is", "The capital of Italy is", "The capital of Spain is"]
    want = [base.complete(p, stacks=[stack], rows=[0]) for p in asked]
    assert want[:2] == ["Lyon", "Milan"]
    export_lora(base, stack, tmp_path / "lora", every_block=True)
    assert objections(tmp_path / "lora", base.hf.config.model_type) == []
    bake(base, stack, tmp_path / "baked")
    baked = errata.load(tmp_path / "baked")
    assert [baked.complete(p) for p in asked] == want
    batch = base.batch(base.encode(asked))
    exact = base.logits(batch, [stack])[batch.mask.bool()]
    fresh = errata.load("almanac")
    adapter = LM(around(fresh.hf, tmp_path / "lora").merge_and_unload(), fresh.tokenizer)
    for other in (baked, adapter):
        torch.testing.assert_close(other.logits(batch)[batch.mask.bool()], exact, atol=2e-3, rtol=1e-3)
