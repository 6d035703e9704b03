"""Kernels that are many times slower than need be on a CPU are not used: seen in a profile by what ran, not by how long it took."""

from __future__ import annotations

import pytest
import torch
from families import lm
from torch.nn import functional

from errata.core.forward import PlainAttention
from errata.core.tail import Tail
from errata.methods.subspace.baft import BaFT
from errata.request import EditRequest

FRANCE = EditRequest("The capital of France is", "Rome", "France", contrast=(("The capital of Italy is", "Rome"),))


def _events(base, run):  # type: ignore[no-untyped-def]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        run()
    return profile.key_averages(group_by_input_shape=True)


def test_reading_last_positions_does_not_copy_the_heads_weight() -> None:
    base = lm("llama", torch.bfloat16)
    head = list(base.hf.get_output_embeddings().weight.shape)
    prompts = ["The capital of France is", "In Rome people speak", "Spain"]
    seen = _events(base, lambda: base.generate_ids(prompts, max_new_tokens=3, stop=[]))
    assert any(event.key == "aten::mm" for event in seen)
    size = torch.Size(head).numel()
    wide = [e for e in seen if e.key in ("aten::copy_", "aten::bmm") and any(torch.Size(s).numel() >= size for s in e.input_shapes if s)]
    assert wide == []


def test_training_in_bfloat16_does_not_go_back_through_the_fused_attention() -> None:
    base = lm("llama", torch.bfloat16)
    seen = _events(base, lambda: BaFT(layers=(1, 2), rank=4, steps=2).edit(base, [FRANCE], runner=Tail))
    assert not [e for e in seen if e.key.startswith("aten::_scaled_dot_product") and e.key.endswith("backward")]


@pytest.mark.parametrize("how", [{}, {"is_causal": True}, {"enable_gqa": True, "scale": 0.3}, {"mask": True}])
def test_plain_attention_is_attention(how: dict[str, object]) -> None:
    g = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, 5, 8, generator=g, dtype=torch.float64, requires_grad=True)
    heads = 2 if how.get("enable_gqa") else 4
    key, value = (torch.randn(2, heads, 5, 8, generator=g, dtype=torch.float64) for _ in range(2))
    more = {k: v for k, v in how.items() if k != "mask"}
    mask = torch.tril(torch.ones(5, 5, dtype=torch.bool), -1) if "mask" in how else None  # the first token sees nothing, as padding does
    want = functional.scaled_dot_product_attention(query, key, value, mask, **more)
    with PlainAttention():
        got = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, **more)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-10)
    slopes = [torch.autograd.grad(out.square().sum(), query, retain_graph=True)[0] for out in (got, want)]
    torch.testing.assert_close(*slopes, atol=1e-12, rtol=1e-10)
