"""Random weight-like patches of the tiny models, and how plain programs see what errata writes."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from families import SENTENCES, lm
from torch import Tensor

from errata.core.families import linear_sizes
from errata.core.loading import _old
from errata.core.model import LM
from errata.core.patch import Op, Patch, Site

PROMPTS = [p for p, _ in SENTENCES]
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


def made(base: LM, seed: int, rank: int = 2, point: str = "mlp_down", block: int = 1, dtype: torch.dtype = torch.float32) -> Patch:
    """A random patch of one op; rank 0 is dense."""
    inner, outer = linear_sizes(base.module(Site(block, point)))
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


def plain(folder: Path, **how: Any) -> Any:
    """As any program would load it; complaints are errors here."""
    from transformers import AutoModelForCausalLM

    how.setdefault("torch_dtype" if _old() else "dtype", "auto")  # as it was saved, which transformers 4 does not do by itself
    hf, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **how)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return hf.eval()


def a_stack(base: LM) -> tuple[Patch, ...]:
    return made(base, 0, 2), made(base, 1, 0, block=2), made(base, 2, 1, "attn_out", 2), made(base, 3, 3)


def adapted(base: LM, folder: Path) -> Any:
    """The real PEFT around a fresh copy of the base."""
    return around(lm(base.name, base.dtype).hf, folder)


def around(hf: Any, folder: Path) -> Any:
    """The real PEFT with an adapter around a model."""
    from peft import PeftModel

    with warnings.catch_warnings():  # PEFT asks transformers by an old name
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        return PeftModel.from_pretrained(hf, folder).eval()
