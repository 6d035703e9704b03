"""Vision-language models under patches: images pass through, generation goes on from them, exports answer about them alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import vision
from laws import editor
from safetensors.torch import load_file
from torch import Tensor
from vision import NAMES, PROMPTS, REQUEST, SOME, logits, made, outside

import errata
from errata.core.model import LM
from errata.errors import ModelError
from errata.export import bake, export_lora

# -- images ------------------------------------------------------------------------------------------------


@torch.no_grad()
def _seen(lm: LM, inputs: dict[str, Any]) -> tuple[dict[str, list[Tensor]], Tensor]:
    """(what every module of the tower and the projector gave, the logits) of a call with images."""
    found: dict[str, list[Tensor]] = {}

    def keep(path: str) -> Any:
        return lambda _, __, output: found.setdefault(path, []).append(output.clone()) if isinstance(output, Tensor) else None

    handles = [module.register_forward_hook(keep(path)) for path, module in outside(lm).items()]
    out = logits(lm, inputs)
    for handle in handles:
        handle.remove()
    return found, out


@pytest.mark.parametrize("method", ["baft", "lora", "grace"])
@pytest.mark.parametrize("name", NAMES)
def test_images_pass_through(name: str, method: str) -> None:
    """Under an attached patch the tower says what it said, and the answers change; taken off, all is as before, bit for bit."""
    lm, patch, inputs = vision.model(name), made(name, method), vision.inputs(name, PROMPTS)
    tower, before = _seen(lm, inputs)
    assert any("vis" in path for path in tower) and not torch.equal(logits(lm, vision.inputs(name, PROMPTS, seed=1)), before)
    lm.attach(patch)
    try:
        edited_tower, edited = _seen(lm, inputs)
    finally:
        lm.detach()
    assert tower.keys() == edited_tower.keys()
    assert all(torch.equal(a, b) for path in tower for a, b in zip(tower[path], edited_tower[path], strict=True))
    assert not torch.equal(edited[0], before[0])
    assert torch.equal(logits(lm, inputs), before)


@pytest.mark.parametrize("name", NAMES)
def test_a_row_without_the_edit_is_the_base_beside_one_with_it(name: str) -> None:
    lm, patch, inputs = vision.model(name), made(name, "rome"), vision.inputs(name, PROMPTS)
    before = logits(lm, inputs)
    with lm.running(lm.plan([(), (patch,)], [1, 0], 2)):
        mixed = logits(lm, inputs)
    with lm.under(patch):
        edited = logits(lm, inputs)
    assert torch.equal(mixed[1], before[1]) and torch.allclose(mixed[0], edited[0], atol=1e-5) and not torch.equal(mixed[0], before[0])


@pytest.mark.parametrize("method", ["grace", "wise"])
@pytest.mark.parametrize("name", SOME)
def test_a_closed_gate_is_the_base(name: str, method: str) -> None:
    """An image in front of the prompt is another prompt: a memory that is asked about what it does not hold says nothing."""
    closed = {"grace": {"eps": 1e-6}, "wise": {}}[method]
    lm, patch, inputs = vision.model(name), made(name, method, **closed), vision.inputs(name, PROMPTS)
    before = logits(lm, inputs)
    with lm.under(patch):
        assert torch.equal(logits(lm, inputs)[1], before[1])


@pytest.mark.parametrize("name", NAMES)
def test_transformers_own_generate_goes_on_from_an_image(name: str) -> None:
    """Cached tokens are those of whole texts, and the edit changes what is said."""
    lm, patch, inputs = vision.model(name), made(name, "lora"), vision.inputs(name, PROMPTS[:1])
    how = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    start = inputs["input_ids"].shape[1]
    plain = lm.hf.generate(**inputs, **how)
    lm.attach(patch)
    try:
        found = lm.hf.generate(**inputs, **how)
        for _ in range(3):
            token = logits(lm, inputs)[:, -1].argmax(-1, keepdim=True)
            longer = {"input_ids": token, "attention_mask": torch.ones_like(token)}
            longer |= {key: torch.zeros_like(token) for key in ("token_type_ids", "mm_token_type_ids") if key in inputs}
            inputs |= {key: torch.cat([inputs[key], value], 1) for key, value in longer.items()}
            if "cross_attention_mask" in inputs:
                inputs["cross_attention_mask"] = torch.cat([inputs["cross_attention_mask"], inputs["cross_attention_mask"][:, -1:]], 1)
    finally:
        lm.detach()
    assert found[:, start:].tolist() == inputs["input_ids"][:, start:].tolist()
    assert not torch.equal(found, plain)
    assert torch.equal(lm.hf.generate(**vision.inputs(name, PROMPTS[:1]), **how), plain)


@pytest.mark.parametrize("method", ["grace", "wise"])
def test_who_decides_at_the_prompts_end_has_to_be_told_where_it_is(method: str) -> None:
    """`generate` tells; a call without a mask does not."""
    lm, patch, inputs = vision.model("llava"), made("llava", method), vision.inputs("llava", PROMPTS[:1])
    with lm.under(patch), torch.no_grad():
        lm.hf.generate(**inputs, max_new_tokens=2, do_sample=False)
        with pytest.raises(ModelError, match="does not say where that is"):
            lm.hf(input_ids=inputs["input_ids"], pixel_values=inputs["pixel_values"])


@pytest.mark.parametrize("name", NAMES)
def test_the_language_part_called_by_itself_runs_edited(name: str) -> None:
    lm, patch = vision.model(name), made(name, "rome")
    ids = torch.tensor([lm.encode(PROMPTS[:1])[0].ids])
    part = vision.language(lm.hf)[1]
    with torch.no_grad():
        before = part(input_ids=ids)[0]
        with lm.under(patch):
            alone, states = part(input_ids=ids)[0], lm.hf.model(input_ids=ids)[0]
    assert torch.equal(alone, states) and not torch.equal(alone, before)


# -- text in front -----------------------------------------------------------------------------------------


def test_a_fact_in_front_stands_before_the_image() -> None:
    lm, patch, inputs = vision.model("llava"), made("llava", "ice"), vision.inputs("llava", PROMPTS[:1])
    (op,) = patch.ops
    told = [*op.tensors["texts"][0, : int(op.tensors["lengths"][0])].tolist(), *op.settings["cue"]]
    ids = torch.cat([inputs["input_ids"][:, :1], torch.tensor([told]), inputs["input_ids"][:, 1:]], 1)
    wanted = logits(lm, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": inputs["pixel_values"]})
    with lm.under(patch):
        found = logits(lm, inputs)
    assert torch.allclose(found[:, 1:], wanted[:, 1 + len(told) :], atol=1e-5)


@pytest.mark.parametrize(("name", "what"), [("qwen2_5_vl", "image_grid_thw"), ("gemma3", "token_type_ids"), ("mllama", "cross_att")])
def test_a_fact_in_front_is_refused_where_images_have_places(name: str, what: str) -> None:
    lm, patch, inputs = vision.model(name), made(name, "ice"), vision.inputs(name, PROMPTS)
    with lm.under(patch), pytest.raises(ModelError, match=f"cannot run with {what}.*take the patch off"):
        logits(lm, inputs)


# -- outside of errata -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_baked_checkpoint_is_the_whole_model(name: str, tmp_path: Path) -> None:
    """The base's names and weights, but for the one linear that was edited; and it answers about images as errata does."""
    vision.saved(name, tmp_path / "base")
    (tmp_path / "base" / "preprocessor_config.json").write_text("{}")
    lm, inputs = errata.load(tmp_path / "base"), vision.inputs(name, PROMPTS)
    (patch,) = editor("rome").edit_each(lm, [REQUEST])
    bake(lm, (patch,), tmp_path / "baked")
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("base", "baked"))
    assert before.keys() == after.keys()
    assert [key.endswith("layers.0.mlp.down_proj.weight") for key in before if not torch.equal(before[key], after[key])] == [True]
    with lm.under(patch):
        wanted = logits(lm, inputs)
    again = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "baked").eval()
    assert torch.allclose(again(**inputs).logits, wanted, atol=1e-5) and not torch.allclose(logits(lm, inputs), wanted, atol=1e-3)
    assert "AutoModelForImageTextToText" in (tmp_path / "baked" / "README.md").read_text()
    assert (tmp_path / "baked" / "preprocessor_config.json").exists()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks transformers for it
@pytest.mark.parametrize("name", SOME)
def test_an_adapter_stands_beside_the_language_part(name: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    own, inputs = vision.saved(name, tmp_path / "base"), vision.inputs(name, PROMPTS)
    lm = errata.load(tmp_path / "base")
    (patch,) = editor("lora", targets=["q_proj"], layers=[0, 2]).edit_each(lm, [REQUEST])
    export_lora(lm, (patch,), tmp_path / "adapter")
    with lm.under(patch):
        wanted = logits(lm, inputs)
    served = peft.PeftModel.from_pretrained(own, tmp_path / "adapter").eval()
    path = vision.language(own)[0]
    assert [at for at, module in served.named_modules() if hasattr(module, "lora_A")] == [
        f"base_model.model.{path}.layers.{block}.self_attn.q_proj" for block in (0, 2)
    ]
    assert torch.allclose(served(**inputs).logits, wanted, atol=1e-5)
