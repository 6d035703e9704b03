"""Patches on a base whose weights accelerate keeps elsewhere."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from made import logits, made
from tiny import saved

import errata
from errata.core.patch import Patch
from errata.errors import ModelError
from errata.export import bake


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
