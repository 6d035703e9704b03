"""Fused experts as a part of their own: the op is a change of each expert's last matrix, and MEMIT and AlphaEdit on it are as published."""

from __future__ import annotations

import copy
import functools
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import PROMPTS, acts_and_leaves_no_trace, build, model, request
from families import SENTENCES, once, tokenizer, trained
from laws import REQUESTS, editor
from pairwise import some
from safetensors import safe_open
from torch import Tensor

from errata.core import experts
from errata.core.families import resolve
from errata.core.model import LM
from errata.core.patch import Op, Patch, Site
from errata.core.read import read_activations
from errata.core.tail import FullForward, Tail, split_rows_at
from errata.errors import ConfigError, ErrataError, PatchError
from errata.export import bake, export_lora
from errata.methods.locate.run import LocateThenEditRun
from errata.text.statistics import Moments, moments

FUSED = ["qwen3_moe", "gpt_oss", "mixtral", "deepseek_v3", "ernie4_5_moe", "jamba", "granitemoehybrid", "qwen3_next"]
BLOCK = {"jamba": 3}
TAUGHT = ["qwen3_moe", "gpt_oss"]
_EDIT = {
    "layers": [1, 2], "end": ".", "fact_token": "last", "clamp": 20.0, "prefixes": [], "kl": 0.0, "v_decay": 0.0, "v_lr": 0.2,
    "v_steps": 80,
}  # fmt: skip
MEMIT = {**_EDIT, "mom2_weight": 1e-3, "stats_tokens": 1500}
ALPHA = {**_EDIT, "share": 0.95, "l2": 1e-6, "stats_tokens": 1500}


@functools.cache
def _taught(name: str) -> dict[str, Tensor]:
    return once(f"experts {name}", lambda: trained(build(name)))


def taught(name: str, dtype: torch.dtype = torch.float32) -> LM:
    """A model that knows `SENTENCES`, made in seconds."""
    hf = build(name, dtype)
    hf.load_state_dict(_taught(name))
    return LM(hf, tokenizer(), name)


def made(base: LM, block: int, rank: int, chosen: list[int], seed: int) -> Patch:
    site = Site(block, experts.POINT)
    _, inner, outer = experts.sizes(base.module(site))
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        "experts": torch.tensor(chosen),
        "down": torch.randn(rank, len(chosen) * inner, generator=generator).to(base.dtype),
        "up": torch.randn(outer, rank, generator=generator).to(base.dtype),
    }
    return Patch("none", {}, base.fingerprint, (), (Op("experts", site, tensors),))


def changed(base: LM, *patches: Patch) -> Any:
    """The model with W_j + ΔW_j in the experts' 3-D weights: what the op says it is."""
    hf = copy.deepcopy(base.hf)
    for op in (op for patch in patches for op in patch.ops):
        module = resolve(resolve(hf, base.family.blocks)[op.site.block], base.linear_path(op.site))
        down = op.tensors["down"].unflatten(1, (len(op.tensors["experts"]), -1))
        for i, j in enumerate(op.tensors["experts"].tolist()):
            delta = op.tensors["up"] @ down[:, i]
            module.down_proj.data[j] += delta.T if module.is_transposed else delta
    return hf


@pytest.mark.parametrize(("name", "side"), some(itertools.product(FUSED, ["left", "right"])))
@torch.no_grad()
def test_the_op_is_a_change_of_each_experts_last_matrix(name: str, side: str) -> None:
    """In float64, each row of a padded batch under a stack of its own (two patches, other experts, other ranks), and all under one."""
    base, block = model(name, torch.float64), BLOCK.get(name, 2)
    a, b, c = made(base, block, 2, [0, 3], 0), made(base, block, 1, [1, 2, 3], 1), made(base, block, 3, [2], 2)
    stacks = [(a,), (b, c), ()]
    rows = base.encode(PROMPTS)
    batch = base.batch(rows, side)
    found, together = base.logits(batch, stacks), base.logits(batch, [(a, b, c)], [0, 0, 0])
    for i, row in enumerate(rows):
        for logits, stack in ((found, stacks[i]), (together, (a, b, c))):
            wanted = changed(base, *stack)(input_ids=torch.tensor([row.ids])).logits[0]
            torch.testing.assert_close(logits[i][batch.mask[i].bool()], wanted, atol=1e-6, rtol=0)  # routers are float32
    assert not torch.allclose(found[0], together[0], atol=1e-3)


@pytest.mark.parametrize("name", TAUGHT)
def test_it_is_the_same_cached_through_the_tail_and_from_disk(name: str, tmp_path: Path) -> None:
    base = taught(name)
    patch = made(base, 2, 2, [0, 3], 0)
    loaded = Patch.load(patch.save(tmp_path / "patch"))
    assert loaded.id == patch.id
    rows = split_rows_at(base.encode(PROMPTS, ["Rome", "French", "Spanish"]), [2] * 3, 0, base.device)
    through, whole = Tail(base, rows, 1, (loaded,)).logits([]), FullForward(base, rows, 0, (patch,)).logits([])
    torch.testing.assert_close(through, whole, atol=1e-4, rtol=1e-4)
    hf = changed(base, patch)
    with base.under(patch):
        for prompt in PROMPTS:
            text = list(base.encode([prompt])[0].ids)
            for token in base.generate_ids([prompt], max_new_tokens=3, stop=())[0]:
                assert int(hf(input_ids=torch.tensor([text])).logits[0, -1].argmax()) == token
                text.append(token)


@pytest.mark.parametrize("name", FUSED)
@torch.no_grad()
def test_keys_and_moments_are_those_of_the_experts(name: str) -> None:
    """Σ_j W_j κ_j (and the bias by gates) is what the experts give; C_j is the mean of κ_j κ_jᵀ over all tokens."""
    base, site = model(name, torch.float64), Site(BLOCK.get(name, 2), experts.POINT)
    module = base.module(site)
    count, inner, _ = experts.sizes(module)
    rows = base.encode(PROMPTS)
    at = [2, 3, 1]
    keys, gave = read_activations(base, rows, [site], at=at)[site]
    keys = keys.unflatten(1, (count, inner))
    assert keys.ne(0).any(2).sum(1).tolist() == [2, 2, 2]  # so many serve a token
    weights = module.down_proj if module.is_transposed else module.down_proj.mT
    written = torch.einsum("nei,eio->no", keys, weights)
    if not module.has_bias:
        torch.testing.assert_close(written, gave, atol=1e-7, rtol=0)
    found = moments(base, [site], "bundled", tokens=300)[site]
    assert found.second_moment.shape == (count, inner, inner)
    trace = float(found.second_moment.diagonal(dim1=1, dim2=2).sum())
    assert trace > 0 and found.tokens >= 300
    again = moments(LM(base.hf, base.tokenizer, base.name), [site], "bundled", tokens=300)[site]  # from the cache
    assert torch.equal(again.second_moment, found.second_moment)


def random_moments(count: int, inner: int, site: Site) -> Moments:
    x = torch.randn(count, 3 * inner, inner, generator=torch.Generator().manual_seed(5)).double()
    return Moments(site, x.mT @ x / (3 * inner), 100, "base", "text")


def sparse_keys(n: int, count: int, inner: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(n, count, inner, generator=generator).double()
    for row in keys:
        row[torch.randperm(count, generator=generator)[2:]] = 0
    return keys.flatten(1)


def test_memit_solves_its_system_of_all_experts_at_once() -> None:
    """Kᵀ(λC + KKᵀ)⁻¹ with the dense block diagonal C, in float64; an expert that no key reaches gets nothing."""
    count, inner = 4, 6
    m, keys = random_moments(count, inner, Site(1, experts.POINT)), sparse_keys(3, 4, 6, 0)
    keys[:, 18:] = 0
    own = editor("memit", **{**MEMIT, "mom2_weight": 7.0})
    (down,) = own.down_factors(m, keys, keys, [[0, 1, 2]], None)
    dense = torch.block_diag(*m.second_moment)
    torch.testing.assert_close(down, keys @ torch.linalg.inv(7.0 * dense + keys.T @ keys), atol=1e-10, rtol=1e-8)
    assert not down[:, 18:].any()


def test_alphaedit_is_where_block_coordinate_descent_over_the_experts_ends() -> None:
    """MoEEdit: B_j = Σ g_j S_j (P_j k)ᵀ, M_j = Σ g_j² (P_j k)(P_j k)ᵀ, D_j = B_j (M_j + λI)⁻¹, S_j what the other experts leave.

    It passes over the experts until nothing moves.  One ridge solve of all of them together is its fixed point, in float64.
    """
    count, inner, facts, outer, weight = 4, 6, 5, 3, 0.5
    m, keys = random_moments(count, inner, Site(1, experts.POINT)), sparse_keys(5, 4, 6, 1)
    residual = torch.randn(outer, facts, generator=torch.Generator().manual_seed(2)).double()
    (down,) = editor("alphaedit", **{**ALPHA, "share": 0.5, "l2": weight}).down_factors(m, keys, keys, [list(range(facts))], None)
    bases = m.null_spaces(share=0.5)
    assert [basis.shape for basis in bases] == [(6, 3)] * 4
    projected = [part.T.mT @ basis @ basis.T for part, basis in zip(keys.chunk(count, 1), bases, strict=True)]  # g_j P_j k, [n, I]
    change = [torch.zeros(outer, inner).double() for _ in range(count)]
    for _ in range(2000):
        for j in range(count):
            left = residual - sum(change[i] @ projected[i].T for i in range(count) if i != j)
            change[j] = left @ projected[j] @ torch.linalg.inv(projected[j].T @ projected[j] + weight * torch.eye(inner).double())
    torch.testing.assert_close(residual @ down, torch.cat(change, 1), atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "method", "dtype"), some(itertools.product(TAUGHT, ["memit", "alphaedit"], ["float32", "bfloat16"]), [(0, 1), (0, 2), (1, 2)])
)
def test_facts_are_written_into_experts_and_taken_back(name: str, method: str, dtype: str) -> None:
    base, settings = taught(name, getattr(torch, dtype)), {"memit": MEMIT, "alphaedit": ALPHA}[method]
    assert [base.complete(p) for p, _ in SENTENCES[:4]] == [t for _, t in SENTENCES[:4]]
    weights = copy.deepcopy(base.hf.state_dict())
    patches = editor(method, **settings).edit_each(base, REQUESTS[:2])
    before = base.logits(base.batch(base.encode(PROMPTS)))
    for patch, own in zip(patches, REQUESTS, strict=False):
        assert {op.kind for op in patch.ops} == {"experts"}
        with base.under(patch):
            assert base.complete(own.prompt) == own.target
            kept = [base.complete(p) == t for p, t in SENTENCES if p != own.prompt]
            assert sum(kept) >= 4, kept
    with base.under(*patches):  # both, in one stack
        assert [base.complete(own.prompt) for own in REQUESTS[:2]] == [own.target for own in REQUESTS[:2]]
    assert torch.equal(base.logits(base.batch(base.encode(PROMPTS))), before)
    assert all(torch.equal(t, weights[k]) for k, t in base.hf.state_dict().items())


def test_one_joint_patch_and_its_residual_in_float64() -> None:
    """Two facts in one patch; with a small λ the edited experts give what the values ask for."""
    base = taught("qwen3_moe", torch.float64)
    job = LocateThenEditRun(editor("memit", **{**MEMIT, "layers": [1], "mom2_weight": 1e-9}), base, [list(REQUESTS[:2])], (), Tail)
    (patch,) = job.run()
    now = job.read_bare(job.value_sites[0], [list(patch.ops)])
    torch.testing.assert_close(now, job.goal, atol=1e-4, rtol=1e-4)
    with base.under(patch):
        assert [base.complete(own.prompt) for own in REQUESTS[:2]] == [own.target for own in REQUESTS[:2]]


def test_alphaedit_keeps_clear_of_the_keys_of_earlier_edits() -> None:
    base = taught("qwen3_moe")
    alpha = editor("alphaedit", **ALPHA)
    first = alpha.edit(base, REQUESTS[:1])
    assert {"keys.1", "experts.1"} <= set(first.state) and first.state["keys.1"].shape[1] == len(first.state["experts.1"]) * 24
    job = LocateThenEditRun(alpha, base, [[REQUESTS[1]]], (first,), Tail)
    (second,) = job.run()
    past = job.past(1)
    assert past is not None and past.shape == (1, 4 * 24)
    chosen = second.ops[0].tensors["experts"]
    down = experts.unpack(chosen, second.ops[0].tensors["down"], 4)
    kept, own = (down @ past.T).norm(), (down @ job.average(job.read_keys(1, [[]])[0]).T).norm()
    assert kept < 0.05 * own


def test_dense_blocks_and_experts_in_one_edit() -> None:
    base = model("deepseek_v3")
    acts_and_leaves_no_trace(base, "memit", layers=[0, 1, 2])
    patch = editor("memit", layers=[0, 1, 2]).edit(base, [request()])
    assert [(op.kind, op.site) for op in patch.ops] == [
        ("low_rank", Site(0, "mlp_down")), ("experts", Site(1, "experts")), ("experts", Site(2, "experts")),
    ]  # fmt: skip


def test_what_experts_are_not_for_says_so(tmp_path: Path) -> None:
    base = taught("qwen3_moe")
    for method in ("rome", "pmet", "emmet", "r-rome"):
        with pytest.raises(ErrataError, match=r"block 1 has no mlp_down: its MLP writes through mlp\.experts"):
            editor(method, layers=[1]).edit(base, REQUESTS[:1])
    with pytest.raises(ConfigError, match="rect, prune and norm_constraint are not for experts"):
        editor("memit", **{**MEMIT, "rect": 0.2}).edit(base, REQUESTS[:1])
    for other in ("dbrx", "llama", "mamba"):
        lm = model(other)
        with pytest.raises(PatchError, match=r"block 1 has no fused experts|does not keep its experts in plain 3-D weights"):
            lm.check_site(Site(1, experts.POINT))
    with pytest.raises(PatchError, match=r"mlp\.experts: fused experts are edited.*bake the patch"):
        export_lora(base, (made(base, 1, 1, [0], 0),), tmp_path / "out")


@pytest.mark.parametrize("name", FUSED)
@torch.no_grad()
def test_a_baked_change_of_experts_is_that_change(name: str, tmp_path: Path) -> None:
    """In float64, two patches that share an expert; the checkpoint has the names of one that transformers saves, and loads as one."""
    base, block = model(name, torch.float64), BLOCK.get(name, 2)
    stack = made(base, block, 2, [0, 3], 0), made(base, block, 1, [1, 3], 1)
    before = {k: t.clone() for k, t in base.hf.state_dict().items()}
    report = bake(base, stack, tmp_path / "out")
    assert [w.path.rpartition(".")[2] for w in report.linears] == ["experts"] and report.lost < 1e-12
    wanted = changed(base, *stack)
    wanted.save_pretrained(tmp_path / "theirs")
    for folder in ("out", "theirs"):
        assert (tmp_path / folder / "model.safetensors").exists()
    with safe_open(tmp_path / "out/model.safetensors", "pt") as ours, safe_open(tmp_path / "theirs/model.safetensors", "pt") as theirs:
        assert set(ours.keys()) == set(theirs.keys())
        for key in ours.keys():  # noqa: SIM118
            torch.testing.assert_close(ours.get_tensor(key), theirs.get_tensor(key), atol=1e-12, rtol=0)
    loaded = type(base.hf).from_pretrained(tmp_path / "out", dtype=torch.float64, experts_implementation="eager")
    ids = torch.tensor([base.encode(PROMPTS)[0].ids])
    torch.testing.assert_close(loaded(input_ids=ids).logits, wanted(input_ids=ids).logits, atol=1e-6, rtol=0)
    assert not torch.allclose(loaded(input_ids=ids).logits, base.hf(input_ids=ids).logits, atol=1e-3)
    assert all(torch.equal(t, before[k]) for k, t in base.hf.state_dict().items())
