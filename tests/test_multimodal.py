"""Vision-language models: the folder loads whole, and the language part is found and edited by text (images: test_multimodal_images.py)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import verify_architectures as matrix
import vision
from families import tokenizer
from laws import editor
from safetensors.torch import load_file, save_file
from torch import nn
from vision import NAMES, PREFIX_LM, PROMPTS, REQUEST, SETTINGS, SOME, logits, made, outside

import errata
from errata.cli import main
from errata.core.describe import describe
from errata.core.families import resolve
from errata.core.loading import auto_class
from errata.core.model import LM
from errata.core.patch import Op, Patch, Site
from errata.errors import ConfigError, ModelError, PatchError
from errata.text.statistics import moments
from errata.trace.causal_trace import trace
from errata.trace.facts import Fact

# -- loading -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_loads_whole(name: str, tmp_path: Path) -> None:
    """The tower, the projector and the language part, weight by weight, with the tokenizer; there is no processor in the folder."""
    own = vision.saved(name, tmp_path)
    lm = errata.load(tmp_path)
    assert type(lm.hf) is type(own)
    before, after = own.state_dict(), lm.hf.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert lm.tokenizer("In Rome")["input_ids"] == tokenizer()("In Rome")["input_ids"]
    inputs = vision.inputs(name, PROMPTS)
    assert torch.equal(logits(lm, inputs), own(**inputs).logits)


def test_a_checkpoint_that_names_no_class_loads_whole(tmp_path: Path) -> None:
    vision.saved("mllama", tmp_path)  # of a type that has a text class, too, for which transformers would drop the tower
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "architectures"}))
    assert isinstance(errata.load(tmp_path).hf, transformers.MllamaForConditionalGeneration)


def test_the_checkpoint_says_which_class_it_is_of() -> None:
    config = transformers.MllamaConfig()
    assert auto_class(config, ["MllamaForCausalLM"]) == "AutoModelForCausalLM"
    assert auto_class(config, ["MllamaForConditionalGeneration"]) == "AutoModelForImageTextToText"
    assert auto_class(transformers.LlamaConfig(), []) == "AutoModelForCausalLM"
    assert auto_class(transformers.Qwen2AudioConfig(), []) == "AutoModelForMultimodalLM"


@pytest.mark.parametrize(("kind", "config"), [("Llama", "Llama"), ("Gemma3", "Gemma3Text"), ("Qwen3_5", "Qwen3_5Text")])
def test_a_text_part_alone_loads_as_before(kind: str, config: str, tmp_path: Path) -> None:
    settings = {**vision.TEXT, "layer_types": ["full_attention"] * 4} if kind == "Qwen3_5" else vision.TEXT
    own = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{config}Config")(**settings))
    own.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    lm = errata.load(tmp_path)
    assert type(lm.hf) is type(own) and "beside text" not in describe(lm)


def test_a_folder_without_its_tower_is_refused(tmp_path: Path) -> None:
    vision.saved("llava", tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {key: value for key, value in weights.items() if "vision" not in key}
    assert len(kept) < len(weights)
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"the weights lack 'model\.vision_tower"):
        errata.load(tmp_path)


def test_packages_for_images_are_not_needed(tmp_path: Path) -> None:
    """With a processor in the folder, and neither Pillow nor torchvision to be imported."""
    vision.saved("llava", tmp_path)
    said = {"processor_class": "LlavaProcessor", "image_processor_type": "CLIPImageProcessor"}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(said))
    (tmp_path / "processor_config.json").write_text(json.dumps({"processor_class": "LlavaProcessor"}))
    program = f"import sys; sys.modules.update(PIL=None, torchvision=None); import errata; print(errata.load({str(tmp_path)!r}).depth)"
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert out.stdout.strip() == "4", out.stderr


# -- parts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "tower"), [*((name, "alike") for name in NAMES), *((name, "deeper") for name in SOME)])
def test_parts_are_those_of_the_language_part(name: str, tower: str) -> None:
    key = "depth" if name.startswith("qwen") else "num_hidden_layers"
    lm = vision.model(name) if tower == "alike" else LM(vision.build(name, vision={key: vision.DEPTH + 2}), tokenizer(), name)
    path, part = vision.language(lm.hf)
    assert lm.family.blocks == f"{path}.layers" and list(lm.blocks) == list(part.layers)
    assert resolve(lm.hf, lm.family.embedding) is part.embed_tokens and lm.hf.get_output_embeddings() is lm.hf.lm_head
    assert resolve(lm.hf, lm.family.final_norm or lm.roles.final_norm) is part.norm
    for block in set(range(lm.depth)) - set(lm.family.idle):
        assert lm.linear_path(Site(block, "mlp_down")) == "mlp.down_proj"
        assert lm.linear_path(Site(block, "attn_out")) == "self_attn.o_proj"


def test_a_tower_of_the_depth_that_the_config_names_is_no_language_part() -> None:
    hf = vision.build("llava", vision={"num_hidden_layers": 5})
    hf.config.text_config.num_hidden_layers = 5
    with pytest.raises(ModelError, match="found 0 lists of 5 blocks"):
        LM(hf, tokenizer())


def test_two_lists_that_a_text_runs_are_refused_by_name() -> None:
    hf = vision.build("llava")
    part = hf.model.language_model
    part.beside = nn.ModuleList([nn.Sequential(nn.Linear(vision.WIDTH, vision.WIDTH)) for _ in range(vision.DEPTH)])
    forward = part.norm.forward
    part.norm.forward = lambda states: forward(states) + sum(block(states) for block in part.beside)
    with pytest.raises(ModelError, match=r"2 lists of 4 blocks \(model\.language_model\.layers, model\.language_model\.beside\)"):
        LM(hf, tokenizer())


def test_a_model_that_reads_ahead_is_refused() -> None:
    """PaliGemma attends to the whole prompt; nothing that errata computes ahead would be right."""
    with pytest.raises(ModelError, match=r"paligemma: .* read a text from left to right"):
        LM(vision.build(PREFIX_LM), tokenizer())


def test_a_model_that_needs_an_image_is_refused() -> None:
    hf = vision.build("llava")
    forward = hf.model.forward

    def asks(*args: Any, pixel_values: Any = None, **kwargs: Any) -> Any:
        if pixel_values is None:
            raise ValueError("pixel_values must be given")
        return forward(*args, pixel_values=pixel_values, **kwargs)

    hf.model.forward = asks
    with pytest.raises(ModelError, match=r"llava: does not run for text alone.*pixel_values must be given"):
        LM(hf, tokenizer())


# -- text --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["qwen2_5_vl", "smolvlm", "mllama"])
def test_text_is_edited_undone_padded_and_cached(name: str) -> None:
    """As `scripts/verify_architectures.py` tries it: BaFT, ROME, MEMIT, LoRA, GRACE, WISE (others: docs/families.md)."""
    found = matrix.verify(name)
    assert {cell: told for cell, told in found.items() if told} == {}


@pytest.mark.parametrize("method", ["reft", "melo", "ft-m"])
def test_other_families_of_methods_edit_text(method: str) -> None:
    lm, patch = vision.model("qwen2_5_vl"), made("qwen2_5_vl", method)
    batch = lm.batch(lm.encode(PROMPTS))
    before = lm.logits(batch)
    with lm.under(patch):
        assert not torch.equal(lm.logits(batch), before)
    assert torch.equal(lm.logits(batch), before)


def test_the_tower_is_neither_run_nor_trained_by_an_edit_of_text() -> None:
    """Not by LoRA on every projection that the tower has, too, not by fine-tuning, not by statistics."""
    lm = LM(vision.build("llava"), tokenizer())
    before = {key: value.clone() for key, value in lm.hf.state_dict().items()}
    ran: list[str] = []
    for path, module in outside(lm).items():
        module.register_forward_hook(lambda *_, path=path: ran.append(path))
    for method, settings in (("lora", {"targets": ["q_proj", "v_proj", "out_proj|o_proj"], "layers": None}), ("ft-m", {}), ("rome", {})):
        (patch,) = editor(method, **settings).edit_each(lm, [REQUEST])
        assert all(lm.module(op.site) in set(vision.language(lm.hf)[1].modules()) for op in patch.ops), method
    moments(lm, [Site(1, "mlp_down")], tokens=300)
    assert set(ran) <= {"lm_head"}
    after = lm.hf.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


# -- blocks that only an image runs ------------------------------------------------------------------------


def test_blocks_that_only_an_image_runs_are_not_edited() -> None:
    """Mllama's block 1 looks at the image, and text alone leaves it out: an edit there would do nothing."""
    lm = vision.model("mllama")
    assert lm.family.idle == (1,) and [lm.nearest_block(b) for b in (-1, 0, 1, 2, 9)] == [0, 0, 0, 2, 3]
    for method, settings in (
        ("baft", {"layers": (1,)}), ("lora", {"layers": (1,)}), ("rome", {"layers": (1,)}), ("ft-m", {"layers": (1,)}),
        ("grace", {"layer": 1}), ("wise", {"layer": 1}), ("retrieval", {"block": 1}),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match="block 1 runs beside an image only"):
            editor(method, **{**SETTINGS.get(method, {}), **settings}).edit_each(lm, [REQUEST])
    for method in ("baft", "lora", "grace"):
        free = {"layers": None} if method != "grace" else {"layer": None}
        patch = made("mllama", method, **free)
        assert {op.site.block for op in patch.ops} <= {0, 2, 3}
    op = Op("low_rank", Site(1, "mlp.down_proj"), {"down": torch.ones(1, vision.INNER), "up": torch.ones(vision.WIDTH, 1)})
    there = Patch("rome", {}, lm.fingerprint, (REQUEST,), (op,))
    with pytest.raises(PatchError, match="block 1 runs beside an image only"):
        lm.attach(there)
    with pytest.raises(ModelError, match="run beside an image only"):
        trace(lm, [Fact("The capital of France is", "France")])


# -- what is said ------------------------------------------------------------------------------------------


def test_inspect_says_what_the_model_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vision.saved("smolvlm", tmp_path)
    assert main(["inspect", str(tmp_path)]) == 0
    assert "takes images beside text: its language part is edited" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["also_takes"] == ["images"] and found["family"]["blocks"] == "model.text_model.layers"
    assert "block 1: runs beside an image only" in describe(vision.model("mllama"))


# -- chats -------------------------------------------------------------------------------------------------

_PARTS = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'][0] }}: {% for part in m['content'] %}{% if part['type'] == 'text' %}"
    "{{ part['text'] }}{% elif part['type'] == 'image' %}<image>{% endif %}{% endfor %}{{ ' a: ' }}{% endfor %}"
)


def test_a_template_that_takes_text_in_parts_shows_the_words() -> None:
    """As SmolVLM's and LLaVA's: of a message that is plain text they write nothing at all."""
    talking = vision.talking(_PARTS)
    lm = LM(vision.model("smolvlm").hf, talking, "smolvlm")
    rendered = "<s>u: In Rome people speak a: "
    assert lm.encode(["In Rome people speak"], chat=True) == lm.encode([rendered])
    patch = errata.edit(lm, "In Rome people speak", "French", "Rome", method="rome", chat=True, layers=[0], v_steps=2, stats_tokens=300)
    assert patch.requests[0].prompt == rendered
