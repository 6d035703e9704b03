"""Which parts a model has: found by trying in every block by itself, asked for only where a method needs them, and refused by name."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, acts_and_leaves_no_trace, build, model, request
from families import FAMILIES, tokenizer
from families import build as untrained
from laws import asked, editor
from pairwise import some
from torch import nn

from errata.core.describe import describe, linears
from errata.core.families import find, linear_sizes, resolve
from errata.core.model import LM
from errata.core.patch import Site
from errata.core.roles import find_roles
from errata.errors import ErrataError, ModelError

# What is written to the residual stream as it is, or times a number: what a block adds is the sum of what its writers give.
PLAIN = {
    **dict.fromkeys(("gpt2", "gpt_neo", "gptj", "gpt_neox", "codegen", "opt", "bloom", "falcon", "phi", "stablelm", "starcoder2"), 1.0),
    **dict.fromkeys(("llama", "cohere", "olmo", "mixtral", "qwen3_moe", "olmoe", "gpt_oss", "deepseek_v3", "ernie4_5_moe"), 1.0),
    **dict.fromkeys(("mamba2", "jamba", "nemotron_h", "lfm2", "bamba", "recurrent_gemma", "falcon_h1", "qwen3_5_text"), 1.0),
    "granite": 0.5,
}
# (mlp_down, attn_out) of each block where a search for the last linear of the right width went wrong, or found nothing
HARD: dict[str, list[tuple[str | None, str | None]]] = {
    "qwen3_5_text": [("mlp.down_proj", "linear_attn.out_proj"), ("mlp.down_proj", "self_attn.o_proj")] * 2,
    "gemma3n_text": [("mlp.down_proj", "self_attn.o_proj")] * 4,
    "qwen3_moe": [(None, "self_attn.o_proj")] * 4,
    "qwen2_moe": [(None, "self_attn.o_proj")] * 4,
    "deepseek_v3": [("mlp.down_proj", "self_attn.o_proj"), *[(None, "self_attn.o_proj")] * 3],
    "llama4_text": [("feed_forward.down_proj", "self_attn.o_proj"), (None, "self_attn.o_proj")] * 2,
    "mamba": [(None, "mixer.out_proj")] * 4,
    "nemotron_h": [(None, "mixer.out_proj"), ("mixer.down_proj", None), (None, "mixer.o_proj"), ("mixer.down_proj", None)],
    "jamba": [("feed_forward.down_proj", "mamba.out_proj"), (None, "self_attn.o_proj")] * 2,
    "lfm2": [("feed_forward.w2", "conv.out_proj"), ("feed_forward.w2", "self_attn.out_proj")] * 2,
    "falcon_h1": [("feed_forward.down_proj", "self_attn.o_proj")] * 4,
    "rwkv": [("feed_forward.value", "attention.output")] * 4,
    "opt": [("fc2", "self_attn.out_proj")] * 4,
}


def path(base: LM, block: int, point: str) -> str | None:
    try:
        return base.linear_path(Site(block, point))
    except ModelError:
        return None


# -- found by trying ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PLAIN)
@torch.no_grad()
def test_what_a_block_adds_is_the_sum_of_what_its_writers_give(name: str) -> None:
    """An oracle that knows nothing of the trials: h_out − h_in, in float64."""
    hf = build(name, torch.float64) if name != "falcon_h1" else build(name)
    roles = find_roles(hf, find(hf))
    seen: dict[Any, torch.Tensor] = {}
    blocks = resolve(hf, find(hf).blocks)
    for number, (block, own) in enumerate(zip(blocks, roles.blocks, strict=True)):
        block.register_forward_hook(
            lambda _, args, kwargs, out, n=number: seen.update(
                {n: (out[0] if isinstance(out, tuple) else out) - (args[0] if args else kwargs["hidden_states"])}
            ),
            with_kwargs=True,
        )
        for part in (*own.alone, *own.mixing):
            resolve(block, part).register_forward_hook(lambda _, __, out, key=(number, part): seen.update({key: out.clone()}))
    hf(input_ids=torch.tensor([[1, 7, 3, 9, 4]]), use_cache=False)
    for number, own in enumerate(roles.blocks):
        added = sum(seen[number, part].view(1, 5, -1) for part in (*own.alone, *own.mixing))
        assert torch.allclose(seen[number], PLAIN[name] * added, atol=1e-5 if name in ("falcon_h1", "mamba2") else 1e-12), (number, own)


@pytest.mark.parametrize(("name", "dtype"), some(itertools.product(HARD, ["float32", "bfloat16"])))
def test_the_parts_of_every_block(name: str, dtype: str) -> None:
    base = model(name, getattr(torch, dtype))
    assert [(path(base, b, "mlp_down"), path(base, b, "attn_out")) for b in range(base.depth)] == HARD[name]


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "starcoder2"])
def test_the_trials_say_what_the_table_says(family: str) -> None:
    hf = untrained(family)
    known, roles = find(hf), find_roles(hf, find(hf))
    assert known.found == "table" and known.final_norm == roles.final_norm
    assert {(roles.path(b, "mlp_down"), roles.path(b, "attn_out")) for b in range(4)} == {(known.mlp_down, known.attn_out)}


@pytest.mark.parametrize(
    ("name", "norm"),
    [("gemma3n_text", "model.norm"), ("opt", "model.decoder.final_layer_norm"), ("mamba", "backbone.norm_f"), ("openai-gpt", "")],
)
def test_the_last_norm_is_the_one_that_runs_last(name: str, norm: str) -> None:
    assert model(name).roles.final_norm == norm


def test_the_trials_leave_no_trace_and_see_no_patch() -> None:
    base = LM(build("qwen3_5_text"), tokenizer())
    ids = torch.tensor([[1, 2, 3]])
    weights, before = copy.deepcopy(base.hf.state_dict()), base.hf(input_ids=ids).logits
    handle = base.hf.model.layers[0].register_forward_hook(lambda _, __, out: 1 / 0)
    roles = base.roles
    handle.remove()
    assert roles == find_roles(base.hf, base.family)
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in base.hf.modules())
    assert torch.equal(base.hf(input_ids=ids).logits, before)
    assert all(torch.equal(t, weights[k]) for k, t in base.hf.state_dict().items())


class Two(nn.Module):
    """An MLP's place taken by two linears side by side, with names that say nothing."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.left(x) + self.right(x).tanh() * self.right.weight[0]


def test_what_stays_ambiguous_is_refused_with_the_candidates_named() -> None:
    hf = build("starcoder2")
    hf.model.layers[2].mlp = Two(32)
    base = LM(hf, tokenizer())
    with pytest.raises(ModelError, match=r"block 2 has no mlp_down: its MLP writes through mlp\.left and mlp\.right, .* in block 0, 1, 3"):
        base.linear_path(Site(2, "mlp_down"))
    assert base.linear_path(Site(1, "mlp_down")) == "mlp.c_proj" and base.linear_path(Site(2, "attn_out")) == "self_attn.o_proj"
    with pytest.raises(ModelError, match=r"mlp\.experts \(experts, not one linear\) and mlp\.shared_expert\.down_proj"):
        model("qwen2_moe").linear_path(Site(0, "mlp_down"))


def test_a_known_family_with_a_block_of_another_make_is_looked_at_block_by_block() -> None:
    """The table names the path; a block that has no linear there is tried by itself."""
    hf = untrained("llama")
    hf.model.layers[1].mlp = Two(32)
    base = LM(hf, tokenizer())
    assert base.linear_path(Site(0, "mlp_down")) == "mlp.down_proj"
    with pytest.raises(ModelError, match=r"block 1 has no mlp_down: .* there is one in block 0, 2, 3"):
        base.linear_path(Site(1, "mlp_down"))


def test_inspect_says_what_every_block_has() -> None:
    told = describe(model("deepseek_v3")).splitlines()
    assert "block 0: MLP keys of size 48 go through mlp.down_proj; attention writes through self_attn.o_proj" in told
    (rest,) = [line for line in told if line.startswith("block 1-3: no mlp_down (its MLP writes through mlp.experts (experts, ")]
    assert "mlp.shared_experts.down_proj" in rest and rest.endswith("; attention writes through self_attn.o_proj")
    assert "last norm at model.norm, " in told[-1]
    there = linears(model("deepseek_v3"))
    assert there["mlp.down_proj", 48, 32] == [0] and there["mlp.shared_experts.down_proj", 24, 32] == [1, 2, 3]


# -- asked for where a method needs it ------------------------------------------------------------------------

NO_MLP = ["mixtral", "qwen3_moe", "olmoe", "gpt_oss", "dbrx", "granitemoehybrid", "mamba", "mamba2", "zamba2"]
SOME_MLP = {"deepseek_v3": [0], "glm4_moe": [0], "llama4_text": [0, 2], "ernie4_5_moe": [0], "jamba": [0, 2], "nemotron_h": [1, 3]}
WHOLE = ["lfm2", "bamba", "recurrent_gemma", "qwen3_5_text", "falcon_h1", "openai-gpt"]
ANY = {
    "baft": {}, "reft": {}, "ice": {}, "lora": {"targets": ["mlp_down|attn_out"], "layers": [1, 2]},
    "ft-m": {"point": "attn_out", "layers": [0]}, "grace": {"point": "attn_out"}, "wise": {"point": "attn_out", "activation": "input"},
}  # fmt: skip


OTHERS = ["qwen3_moe", "gpt_oss", "qwen2_moe", "nemotron_h", "mamba2", "lfm2", "recurrent_gemma", "openai-gpt"]


@pytest.mark.parametrize(("name", "method"), some(itertools.product(OTHERS, ANY)))
def test_a_method_that_needs_no_mlp_runs(name: str, method: str) -> None:
    settings = dict(ANY[method])
    if name == "nemotron_h" and settings.get("point"):
        settings |= {"layers": [2]} if method == "ft-m" else {"layer": 2}
    acts_and_leaves_no_trace(model(name), method, **settings)


@pytest.mark.parametrize("method", ["rome", "ft-l", "grace", "wise", "melo", "pmet", "emmet"])
@pytest.mark.parametrize("name", NO_MLP)
def test_only_what_needs_the_missing_part_says_so_by_name(name: str, method: str) -> None:
    settings = {"layer": 1} if method in ("grace", "wise", "melo") else {"layers": [1]}
    settings |= {"lora_layers": [2]} if method == "melo" else {}
    with pytest.raises(ErrataError, match=rf"{name}: block 1 has no mlp_down: .*no block has one"):
        editor(method, **settings).edit(model(name), [request()])


@pytest.mark.parametrize(
    "name", [n if n in ("deepseek_v3", "llama4_text", "nemotron_h") else pytest.param(n, marks=pytest.mark.slow) for n in SOME_MLP]
)
def test_dense_blocks_are_edited_and_others_are_refused(name: str) -> None:
    base, there = model(name), SOME_MLP[name]
    missing = next(b for b in range(4) if b not in there)
    acts_and_leaves_no_trace(base, "rome", layers=[there[-1]])
    acts_and_leaves_no_trace(base, "ft-m", layers=[there[-1]])
    for method, settings in (("rome", {"layers": [missing]}), ("ft-m", {"layers": [missing]}), ("grace", {"layer": missing})):
        with pytest.raises(ErrataError, match=rf"block {missing} has no mlp_down: .*there is one in block {there[0]}"):
            editor(method, **settings).edit(base, asked(method)[:1])


def test_lora_takes_what_each_block_has() -> None:
    (patch,) = editor("lora", targets=["mlp_down|attn_out"], layers=[0, 1]).edit_each(model("deepseek_v3"), [request()])
    assert [op.site for op in patch.ops] == [Site(0, "mlp_down"), Site(1, "attn_out")]
    with pytest.raises(ErrataError, match=r"no linear 'mlp_down' in these blocks \(its MLP writes through mlp.experts"):
        editor("lora", targets=["mlp_down"]).edit_each(model("qwen3_moe"), [request()])


def test_blocks_whose_mlps_differ_in_size_are_trained_together() -> None:
    hf = untrained("llama")
    wide = untrained("llama", intermediate_size=80).model.layers[2].mlp
    hf.model.layers[2].mlp = wide
    base = LM(hf, tokenizer())
    assert [linear_sizes(base.module(Site(b, "mlp_down")))[0] for b in range(4)] == [64, 64, 80, 64]
    acts_and_leaves_no_trace(base, "ft-m", layers=[1, 2])
    (patch,) = editor("ft-m", layers=[1, 2]).edit_each(base, [request()])
    assert [tuple(op.tensors["weight"].shape) for op in patch.ops] == [(32, 64), (32, 80)]
    assert editor("ft-m", layers=[1, 2]).num_parameters(base) == 32 * (64 + 80)


def test_every_architecture_is_found() -> None:
    for name in ARCHITECTURES:
        hf = build(name)
        assert len(resolve(hf, find(hf).blocks)) == 4, name
