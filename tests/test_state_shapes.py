"""Models whose modules are given states of other shapes than [B, T, D], or keep caches of other kinds, or none."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from architectures import PROMPTS, acts_and_leaves_no_trace, build, model, request
from families import tokenizer
from laws import editor
from torch import nn

from errata.core.decode import TokenCache
from errata.core.families import linear_sizes, resolve
from errata.core.model import LM
from errata.core.patch import Op, Patch, Site
from errata.core.read import read_activations
from errata.core.tail import FullForward, Tail, split_rows_at
from errata.errors import ModelError

# -- states of other shapes -----------------------------------------------------------------------------------

FLAT = [("opt", "fc2"), ("opt", "fc1"), ("qwen2_moe", "mlp.shared_expert.down_proj"), ("deepseek_v3", "mlp.shared_experts.down_proj")]


@pytest.mark.parametrize(("name", "point"), FLAT)
@torch.no_grad()
def test_a_linear_that_is_given_all_rows_in_one_is_edited_row_by_row(name: str, point: str) -> None:
    """Each row of a padded batch under its own patch is what the row alone gives with W + ΔW in the model, in float64."""
    base = model(name, torch.float64)
    site = Site(2, point)
    inner, outer = linear_sizes(base.module(site))
    own = [torch.randn(outer, inner, generator=torch.Generator().manual_seed(i)).double() for i in range(3)]
    patches = [Patch("none", {}, base.fingerprint, (), (Op("dense", site, {"weight": w}),)) for w in own]
    rows = base.encode(PROMPTS)
    for side in ("left", "right"):
        batch = base.batch(rows, side)
        found = base.logits(batch, [(p,) for p in patches])
        for i, (row, change) in enumerate(zip(rows, own, strict=True)):
            hf = copy.deepcopy(base.hf)
            resolve(resolve(hf, base.family.blocks)[2], point).weight.add_(change)
            alone = hf(input_ids=torch.tensor([row.ids])).logits[0]
            assert torch.allclose(found[i][batch.mask[i].bool()], alone, atol=1e-9 if name == "opt" else 1e-6)  # routers are float32


@pytest.mark.parametrize(("name", "point"), FLAT)
def test_what_such_a_linear_reads_is_read_row_by_row(name: str, point: str) -> None:
    base, site = model(name, torch.float64), Site(2, point)
    rows = base.encode(PROMPTS)
    read, gave = read_activations(base, rows, [site], at=[2, 3, 1])[site]
    for i, (row, at) in enumerate(zip(rows, (2, 3, 1), strict=True)):
        seen: list[tuple[torch.Tensor, torch.Tensor]] = []
        handle = base.module(site).register_forward_hook(lambda _, args, out, seen=seen: seen.append((args[0], out)))
        base.hf(input_ids=torch.tensor([row.ids]))
        handle.remove()
        x, y = (t.reshape(len(row.ids), -1)[at] for t in seen[0])
        assert torch.allclose(read[i], x, atol=1e-7) and torch.allclose(gave[i], y, atol=1e-7)


@pytest.mark.parametrize("method", ["rome", "memit", "alphaedit", "grace", "melo", "wise", "ft-l", "lora", "rep", "pmet", "emmet"])
def test_every_method_at_such_a_linear(method: str) -> None:
    acts_and_leaves_no_trace(model("opt"), method)


class Some(nn.Module):
    """A list of experts, each of which sees some tokens only."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(width, width) for _ in range(3)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat, out = x.reshape(-1, x.shape[-1]), torch.zeros_like(x).reshape(-1, x.shape[-1])
        which = (flat[:, 0] * 1000).long() % 3
        for i, expert in enumerate(self.experts):
            out[which == i] += expert(flat[which == i])
        return out.view(x.shape)


def test_an_expert_that_sees_some_tokens_only_is_no_place_for_an_edit() -> None:
    hf = build("starcoder2")
    hf.model.layers[1].mlp = Some(32)
    base = LM(hf, tokenizer())
    with pytest.raises(ModelError, match=r"block 1 has no mlp_down: its MLP writes through mlp\.experts\.\* \(experts, not one linear\)"):
        base.linear_path(Site(1, "mlp_down"))
    assert base.linear_path(Site(1, "attn_out")) == "self_attn.o_proj"
    op = Op("dense", Site(1, "mlp.experts.0"), {"weight": torch.eye(32)})
    with base.under(Patch("none", {}, base.fingerprint, (), (op,))), pytest.raises(ModelError, match=r"block 1 \(mlp\.experts\.0\)"):
        base.logits(base.batch(base.encode(PROMPTS)))


def test_blocks_that_hand_on_several_states_a_token() -> None:
    """Gemma 3n: at a block's output nothing can be edited, and says so; at linears everything can."""
    base = model("gemma3n_text")
    for method in ("baft", "reft"):
        with pytest.raises(ModelError, match=r"states at block 1 \(block\) have shape \[4, .* choose another place"):
            editor(method, layers=[1]).edit_each(base, [request()])
    for method in ("rome", "memit", "lora", "grace", "wise", "ft-m", "ice"):
        acts_and_leaves_no_trace(base, method)


# -- caches, masks and halves ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mamba", "mamba2", "recurrent_gemma", "openai-gpt", "bamba", "zamba2", "qwen3_next"])
def test_generated_tokens_are_those_of_whole_texts(name: str) -> None:
    base = model(name, torch.float64) if name not in ("mamba2", "bamba", "zamba2") else model(name)
    (patch,) = editor("reft").edit_each(base, [request()])
    for stack in ((), (patch,)):
        found = base.generate_ids(PROMPTS, stacks=[stack], rows=[0] * 3, max_new_tokens=4, stop=())
        for prompt, ids in zip(PROMPTS, found, strict=True):
            text = list(base.encode([prompt])[0].ids)
            length = len(text)
            for token in ids:
                batch = base.batch(base.encode([prompt]))
                batch = dataclasses.replace(batch, ids=torch.tensor([text]), mask=torch.ones(1, len(text), dtype=torch.long))
                assert int(base.logits(batch, [stack])[0, -1].argmax()) == token
                text.append(token)
            assert text[length:] == ids


def test_a_model_without_a_cache_runs_the_whole_text_again() -> None:
    base = model("openai-gpt")
    ids, mask = torch.tensor([[1, 5, 6]]), torch.ones(1, 3, dtype=torch.long)
    first = base.forward(ids, mask, use_cache=True)
    assert isinstance(first.past_key_values, TokenCache)
    more = base.forward(torch.tensor([[7]]), torch.ones(1, 4).long(), past_key_values=first.past_key_values, use_cache=True)
    assert torch.equal(more.logits, base.hf(input_ids=torch.tensor([[1, 5, 6, 7]])).logits[:, -1:])


def test_a_model_that_reads_padding_as_text_is_refused_in_a_batch_and_runs_alone() -> None:
    base = model("rwkv")
    with pytest.raises(ModelError, match="rwkv reads padding as text whatever the attention mask says"):
        base.generate(PROMPTS)
    rows = base.encode(PROMPTS[:1])
    assert torch.allclose(base.logits(base.batch(rows))[0], base.hf(input_ids=torch.tensor([rows[0].ids])).logits[0], atol=1e-6)
    assert len(base.generate(PROMPTS[:1])) == 1


@pytest.mark.parametrize("first", [0, 1, 3])
@pytest.mark.parametrize("name", ["gemma3n_text", "bamba", "openai-gpt", "qwen3_moe", "deepseek_v3", "jamba", "opt", "llama4_text"])
@pytest.mark.parametrize("prefix", [0, 2])
def test_a_split_pass_is_the_whole_one(name: str, first: int, prefix: int) -> None:
    base = model(name)
    rows = split_rows_at(base.encode(PROMPTS, ["Rome", "French", "Spanish"]), [prefix] * 3, 0, base.device)
    assert torch.allclose(Tail(base, rows, first).logits([]), FullForward(base, rows).logits([]), atol=1e-5)
