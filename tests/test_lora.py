"""LoRA and AdaLoRA against plain loops and published counts, and as editors; against PEFT: test_lora_peft.py."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import architectures
import pytest
import torch
from families import FAMILIES, SENTENCES, lm, tokenizer
from families import build as untrained
from made import adapted, logits, plain, raw, same
from torch import Tensor

from errata import registry
from errata.config import build
from errata.core.bank import Bank, ForwardContext, active_patches
from errata.core.families import linear_sizes
from errata.core.model import LM
from errata.core.patch import Patch, Site
from errata.core.tail import FullForward, Tail
from errata.core.weights import delta_weight, merge
from errata.errors import ConfigError, PatchError
from errata.export import bake, export_lora
from errata.methods.adapters.adalora import AdaLoRA
from errata.methods.adapters.editor import PUBLISHED
from errata.methods.adapters.lora import LoRA
from errata.methods.adapters.op import DropoutMask
from errata.methods.adapters.training import Training
from errata.request import EditRequest

FRANCE = EditRequest("The capital of France is", "Rome", "France")
ITALY = EditRequest("The language of Italy is", "Spanish", "Italy")
SPAIN = EditRequest("The capital of Spain is", "Paris", "Spain", paraphrases=("Spain has the capital", "The chief town of Spain is"))
REQUESTS = (FRANCE, ITALY, SPAIN)
BOTH = pytest.mark.parametrize("method", ["lora", "adalora"])
QUICK: dict[str, dict[str, Any]] = {
    "lora": {**PUBLISHED, "rank": 4, "lr": 0.01, "steps": 25, "stop": 0.05, "end": ".", "dropout": 0.0},
    "adalora": {**PUBLISHED, "rank": 4, "lr": 0.02, "steps": 25, "stop": 0.05, "end": ".", "dropout": 0.0},
}
CLOSE = {"atol": 1e-10, "rtol": 1e-8}


def editor(method: str, **more: Any) -> Any:
    return build(registry.get("method", method), {**QUICK[method], **more})


def changes(patch: Patch) -> dict[Site, Tensor]:
    return {op.site: delta_weight(op) for op in patch.ops}


# -- formulas -------------------------------------------------------------------------------------------------


def test_the_branch_equals_a_loop() -> None:
    g = torch.Generator().manual_seed(0)
    down, up, gain, x, y = (torch.randn(s, generator=g, dtype=torch.float64) for s in ((2, 3, 6), (2, 5, 3), (2, 3), (4, 7, 6), (4, 7, 5)))
    context = ForwardContext(torch.arange(7).expand(4, 7), torch.full((4,), 7))
    drop = DropoutMask(0.4, 1, 2, torch.tensor([0, 1, 0, 1]), 2)
    mask = drop.mask(Site(0, "q"), x)
    for rows, owner in ((None, [0, 0, 1, 1]), (torch.tensor([1, 0, 0, 1]), [1, 0, 0, 1])):
        bank = Bank("adapter", Site(0, "q"), {"drop": drop}, {"down": down, "up": up, "gain": gain}, rows)
        out = bank.apply(x, y, context)
        for b, e in enumerate(owner):
            for t in range(7):
                want = y[b, t] + up[e] @ (gain[e] * (down[e] @ (mask[b, t] * x[b, t])))
                torch.testing.assert_close(out[b, t], want, **CLOSE)


def test_dropout_is_a_function_of_seed_step_site_row_position_and_feature() -> None:
    wide = DropoutMask(0.1, 3, 5, torch.tensor([0, 1, 0]), 2).mask(Site(2, "q"), torch.zeros(3, 40, 64))
    assert wide.unique().tolist() == [0.0, pytest.approx(1 / 0.9)]
    assert abs(float((wide == 0).float().mean()) - 0.1) < 0.015
    assert torch.equal(wide[0], wide[2]) and not torch.equal(wide[0], wide[1])
    short = DropoutMask(0.1, 3, 5, torch.tensor([0]), 1).mask(Site(2, "q"), torch.zeros(7, 9, 64))  # other rows and another length
    assert torch.equal(short[0], wide[0, :9])
    others = [
        DropoutMask(0.1, 4, 5, torch.tensor([0]), 1).mask(Site(2, "q"), torch.zeros(1, 40, 64)),
        DropoutMask(0.1, 3, 6, torch.tensor([0]), 1).mask(Site(2, "q"), torch.zeros(1, 40, 64)),
        DropoutMask(0.1, 3, 5, torch.tensor([0]), 1).mask(Site(3, "q"), torch.zeros(1, 40, 64)),
        DropoutMask(0.1, 3, 5, torch.tensor([0]), 1).mask(Site(2, "v"), torch.zeros(1, 40, 64)),
    ]
    dropped = (wide[0] == 0).flatten().double()
    for other in [*(o[0] for o in others), wide[1], wide[0].roll(1, 0), wide[0].roll(1, 1)]:
        assert abs(float(torch.corrcoef(torch.stack([dropped, (other == 0).flatten().double()]))[0, 1])) < 0.08


@BOTH
def test_first_values(method: str) -> None:
    e = build(registry.get("method", method), PUBLISHED)
    p = e.initial(4000, 500, torch.Generator().manual_seed(0))
    if method == "lora":
        assert p["A"].abs().max() <= 4000**-0.5 and float(p["A"].std()) == pytest.approx((3 * 4000) ** -0.5, rel=0.02)
        assert not p["B"].any() and set(p) == {"A", "B"} and p["A"].shape == (8, 4000)
    else:
        assert all(float(p[k].std()) == pytest.approx(0.02, rel=0.05) for k in "AB")
        assert not p["E"].any() and p["B"].shape == (500, 12)
    base = lm("llama")
    one, other = (Training(e, base, [[r] for r in rs], (), None, Tail)._start() for rs in (REQUESTS[:1], REQUESTS))
    assert all(torch.equal(one[k][0], other[k][i]) for k in one for i in range(3))  # the same for every problem
    reseeded = Training(dataclasses.replace(e, seed=1), base, [[FRANCE]], (), None, Tail)._start()
    assert not torch.equal(one["A.0"][0, 0], one["A.0"][0, 1]) and not torch.equal(one["A.0"], reseeded["A.0"])


def meta(width: int, heads: int, kv: int, head: int, depth: int, name: str) -> LM:
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=width, num_hidden_layers=depth, intermediate_size=8, num_attention_heads=heads, num_key_value_heads=kv, vocab_size=16,
        head_dim=head, pad_token_id=0,
    )  # fmt: skip
    with torch.device("meta"):
        return LM(transformers.LlamaForCausalLM(config), None, name)


@pytest.mark.parametrize(
    ("name", "shape", "published"),
    [
        ("meta-llama/Llama-2-7b-chat-hf", (4096, 32, 32, 128, 32), 6_292_224),
        ("meta-llama/Meta-Llama-3-8B-Instruct", (4096, 32, 8, 128, 32), 5_112_576),
        ("google/gemma-1.1-7b-it", (3072, 16, 16, 256, 28), 4_817_568),  # in LLaMA's shape, which these two linears share
    ],
)
def test_counts_are_those_of_bafts_table_3(name: str, shape: tuple[int, int, int, int, int], published: int) -> None:
    base = meta(*shape, name)
    width, heads, kv, head, depth = shape
    assert (
        AdaLoRA.for_model(base, preset="published").num_parameters(base)
        == depth * sum(12 * (width + out) + 12 for out in (heads * head, kv * head))
        == published
    )
    assert LoRA.for_model(base, preset="published").num_parameters(base) == depth * sum(
        8 * (width + out) for out in (heads * head, kv * head)
    )


# -- where ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", list(FAMILIES))
def test_the_linears_found_without_targets(family: str) -> None:
    base = LM(untrained(family), None)
    fused = {"gpt2": "attn.c_attn", "gpt_neox": "attention.query_key_value", "phi3": "self_attn.qkv_proj"}
    points = [fused[family]] if family in fused else ["self_attn.q_proj", "self_attn.v_proj"]
    assert sorted(LoRA(rank=2, targets=None, depths=None).shapes(base)) == [Site(b, p) for b in range(base.depth) for p in points]


def test_targets_and_layers() -> None:
    base = lm("llama")
    found = LoRA(rank=2, targets=("down_proj", "attn_out", "mlp.up_proj"), layers=(2, 0)).shapes(base)
    assert set(found) == {Site(b, p) for b in (0, 2) for p in ("mlp_down", "attn_out", "mlp.up_proj")}  # one name for one linear
    assert all(sizes == linear_sizes(base.module(site)) for site, sizes in found.items())
    patch = editor("lora", targets=["mlp_down"], layers=[2]).edit(base, [FRANCE])
    assert [op.site for op in patch.ops] == [Site(2, "mlp_down")] and patch.settings["layers"] == [2]
    with base.under(patch):
        assert base.complete(FRANCE.prompt) == "Rome"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": [9]}, r"block 9 does not exist \(0 to 3\)"),
        ({"layers": []}, "layers must name at least one"),
        ({"layers": [1, 1]}, "none twice"),
        ({"targets": []}, "targets must name at least one"),
        ({"targets": ["c_attn"]}, "no linear 'c_attn' in these blocks; set targets to some of down_proj, gate_proj"),
        ({"rank": 0}, "at least 1"),
        ({"rank": 17}, r"rank 17 exceeds that of block 0 self_attn.v_proj \(32, 16\)"),
        ({"alpha": 0.0}, "must be positive"),
        ({"lr": 0.0}, "must be positive"),
        ({"dropout": 1.0}, "below 1"),
        ({"stop": -1.0}, "not be negative"),
        ({"seed": -1}, "seed must be"),
        ({"steps": 0}, "at least 1"),
    ],
)
@BOTH
def test_settings_that_cannot_work(method: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"{method}: .*{message}"):
        editor(method, **settings).edit(lm("llama"), [FRANCE])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"orthogonal": -0.1}, "not be negative"),
        ({"allocate": True, "target_rank": 5}, r"from 1 to rank \(4\)"),
        ({"allocate": True, "target_rank": 2, "beta1": 1.0}, "below 1"),
        ({"allocate": True, "target_rank": 2, "t_init": 20, "t_final": 5}, "no updates are left"),
        ({"allocate": True, "target_rank": 2, "t_final": 24}, "no updates are left"),
        ({"allocate": True, "target_rank": 2, "delta_t": 0}, "delta_t"),
    ],
)
def test_schedules_that_cannot_work(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        editor("adalora", **settings)


def test_nothing_to_edit_and_no_fused_linear() -> None:
    base = lm("gpt2")
    with pytest.raises(ConfigError, match="nothing to edit"):
        editor("lora").edit(base, [])
    assert editor("lora").edit_each(base, []) == []
    other = LM(architectures.build("deepseek_v3"), tokenizer())  # queries, keys and values in two steps each
    with pytest.raises(ConfigError, match="neither q_proj and v_proj nor one linear for both; set targets to some of"):
        LoRA(rank=2, targets=None).edit(other, [FRANCE])


# -- as editors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "dropout"),
    [("lora", 0.1), ("adalora", 0.0), *(pytest.param(*row, marks=pytest.mark.slow) for row in (("lora", 0.0), ("adalora", 0.1)))],
)
def test_independence_with_uneven_numbers_of_rows(method: str, dropout: float) -> None:
    """One, one and three rows a problem, of different lengths, in float64; the tail and the whole forward agree."""
    base = lm("llama", torch.float64)
    e = editor(method, dropout=dropout)
    each = e.edit_each(base, REQUESTS)
    for request, together in zip(REQUESTS, each, strict=True):
        for alone in (e.edit(base, [request]), e.edit(base, [request], runner=FullForward)):
            assert alone.notes["steps"] == together.notes["steps"]
            for site, change in changes(together).items():
                torch.testing.assert_close(changes(alone)[site], change, atol=1e-7, rtol=1e-5)
        with base.under(together):
            assert base.complete(request.prompt) == request.target
            assert all(base.complete(p) == request.target for p in request.paraphrases)


@BOTH
def test_a_joint_edit_writes_every_fact_into_one_patch(method: str) -> None:
    base = lm("llama")
    patch = editor(method, steps=60).edit(base, REQUESTS)
    with base.under(patch):
        assert base.generate([r.prompt for r in REQUESTS]) == [r.target for r in REQUESTS]


@BOTH
def test_continual_edits_train_the_same_adapter_on(method: str) -> None:
    base = lm("llama", torch.float64)
    e = editor(method)
    first = e.edit(base, [FRANCE])
    second = e.edit(base, [ITALY], on=(first,))
    assert second.replaces == (first.id,) and second.requests == (FRANCE, ITALY) and active_patches((first, second)) == (second,)
    with base.under(second):
        assert base.complete(ITALY.prompt) == "Spanish"
    # the parameters gone on from are the last patch's: no step, the same change, also from a saved one
    p = Training(e, base, [[ITALY]], (), first, Tail)
    again = {op.site: delta_weight(op) for op in p._ops(p.per_group({k: t[0] for k, t in p._start().items()}))}
    for site, change in changes(first).items():
        torch.testing.assert_close(again[site], change, **CLOSE)
    (other,) = e.edit_each(base, [ITALY], on=(first,))
    assert other.replaces == (first.id,)
    for site, change in changes(second).items():
        torch.testing.assert_close(changes(other)[site], change, atol=1e-7, rtol=1e-5)
    for changed in ({"rank": 2}, {"targets": ["q_proj"]}, {"alpha": 16.0}, {"layers": [0]}):  # another adapter stands on its own
        assert editor(method, steps=2, **changed).edit(base, [ITALY], on=(first,)).replaces == ()
    assert e.edit(base, [ITALY], on=(first, editor(method, rank=2).edit(base, [FRANCE]))).replaces == ()
    with pytest.raises(PatchError, match="was made for base"):
        e.edit(lm("qwen3", torch.float64), [ITALY], on=(first,))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@BOTH
def test_export_bake_and_merge(method: str, family: str, tmp_path: Path) -> None:
    base = lm(family)
    a, b = editor(method).edit_each(base, REQUESTS[:2])
    want = logits(base, a)
    report = export_lora(base, (a,), tmp_path / "lora")
    assert {w.rank for w in report.linears} == {4} and report.lost < 1e-6
    same(raw(adapted(base, tmp_path / "lora")), want, base)
    bake(base, (a,), tmp_path / "baked")
    same(raw(plain(tmp_path / "baked")), want, base)
    same(logits(base, merge((a, b))), logits(base, a, b), base)


def test_dropout_is_off_at_use_and_on_in_training(tmp_path: Path) -> None:
    base = lm("llama")
    dry, wet = (editor("lora", steps=3, stop=0.0, dropout=d).edit(base, [FRANCE]) for d in (0.0, 0.5))
    assert not torch.allclose(delta_weight(dry.ops[0]), delta_weight(wet.ops[0]), atol=1e-3)
    assert torch.equal(logits(base, wet), logits(base, wet))
    assert torch.equal(logits(base, Patch.load(wet.save(tmp_path / "p"))), logits(base, wet))


def test_a_fact_the_model_knows_needs_no_step_and_makes_a_patch_that_changes_nothing(tmp_path: Path) -> None:
    base = lm("llama")
    known = EditRequest(*SENTENCES[1])
    for method in QUICK:
        patch = editor(method, stop=0.5, end="").edit(base, [known])
        assert patch.notes["steps"] == 0
        assert torch.equal(logits(base, patch), logits(base))
        export_lora(base, (patch,), tmp_path / method)


def test_a_patch_with_a_cut_rank_goes_on_with_all_of_it() -> None:
    base = lm("llama", torch.float64)
    e = editor("adalora", allocate=True, target_rank=1, steps=6, t_final=2)
    first = e.edit(base, [FRANCE])
    sites = list(e.shapes(base))
    assert sum(len(op.tensors["down"]) for op in first.ops) == len(sites) < first.parameters
    training = Training(e, base, [[ITALY]], (), first, Tail)
    p = training._start()
    again = {op.site: delta_weight(op) for op in training._ops(training.per_group({k: t[0] for k, t in p.items()}))}
    for site, change in changes(first).items():
        torch.testing.assert_close(again[site], change, **CLOSE)
    assert all(t.shape[2] == 4 for k, t in p.items() if k.startswith("A"))
    assert e.edit(base, [ITALY], on=(first,)).replaces == (first.id,)


def test_a_problem_ends_early_only_once_its_rank_is_final() -> None:
    base = lm("llama")
    known = EditRequest(*SENTENCES[1])  # nothing to learn
    free, held = (editor("adalora", steps=8, stop=0.5, end="", allocate=a, target_rank=1, t_final=3 * a) for a in (False, True))
    assert [p.notes["steps"] for p in free.edit_each(base, [known])] == [0]
    one, two = held.edit_each(base, [known, FRANCE])
    assert one.notes["steps"] >= 5 and two.notes["steps"] >= 5
    assert all(sum(len(op.tensors["down"]) for op in p.ops) == len(held.shapes(base)) for p in (one, two))
