"""Vision-language models: the folder loads whole, the language part is edited, images pass through."""

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
from torch import Tensor, nn

import errata
from errata.cli import main
from errata.core.describe import describe
from errata.core.families import resolve
from errata.core.loading import auto_class
from errata.core.model import LM
from errata.core.patch import Op, Patch, Site
from errata.errors import ConfigError, ModelError, PatchError
from errata.export import bake, export_lora
from errata.request import EditRequest
from errata.text.statistics import moments
from errata.trace.causal_trace import trace
from errata.trace.facts import Fact

PREFIX_LM = "paligemma"
NAMES = [name for name in vision.MODELS if name != PREFIX_LM]
SOME = ["llava", "qwen2_5_vl", "smolvlm", "gemma3", "mllama"]
PROMPTS = ["The capital of France is", "The language of the people who live in Spain is"]
REQUEST = EditRequest("The capital of France is", "Rome", "France", unrelated=(("The capital of Japan is", "Tokyo"),))
SETTINGS: dict[str, dict[str, Any]] = {
    "lora": {"targets": ["mlp_down|attn_out"], "layers": [2]},
    "grace": {"eps": 100.0},  # every prompt is near
    "wise": {"layer": 0, "activation": "input"},
}


def made(name: str, method: str, **settings: Any) -> Patch:
    (patch,) = editor(method, **{**SETTINGS.get(method, {}), **settings}).edit_each(vision.model(name), [REQUEST])
    return patch


@torch.no_grad()
def logits(lm: LM, inputs: dict[str, Any]) -> Tensor:
    return lm.hf(**inputs).logits


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


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tower", ["alike", "deeper"])
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


@pytest.mark.parametrize("name", SOME)
def test_text_is_edited_undone_padded_and_cached(name: str) -> None:
    """As `scripts/verify_architectures.py` tries it: BaFT, ROME, MEMIT, LoRA, GRACE, WISE."""
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
    outside, ran = _outside(lm), []
    for path, module in outside.items():
        module.register_forward_hook(lambda *_, path=path: ran.append(path))
    for method, settings in (("lora", {"targets": ["q_proj", "v_proj", "out_proj|o_proj"], "layers": None}), ("ft-m", {}), ("rome", {})):
        (patch,) = editor(method, **settings).edit_each(lm, [REQUEST])
        assert all(lm.module(op.site) in set(vision.language(lm.hf)[1].modules()) for op in patch.ops), method
    moments(lm, [Site(1, "mlp_down")], tokens=300)
    assert set(ran) <= {"lm_head"}
    after = lm.hf.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


# -- images ------------------------------------------------------------------------------------------------


def _outside(lm: LM) -> dict[str, nn.Module]:
    """Modules that are no part of the language part and hold nothing of it: the tower and the projector."""
    inside = set(vision.language(lm.hf)[1].modules())
    return {at: m for at, m in lm.hf.named_modules() if not inside & set(m.modules()) and at != "lm_head"}


@torch.no_grad()
def _seen(lm: LM, inputs: dict[str, Any]) -> tuple[dict[str, list[Tensor]], Tensor]:
    """(what every module of the tower and the projector gave, the logits) of a call with images."""
    found: dict[str, list[Tensor]] = {}

    def keep(path: str) -> Any:
        return lambda _, __, output: found.setdefault(path, []).append(output.clone()) if isinstance(output, Tensor) else None

    handles = [module.register_forward_hook(keep(path)) for path, module in _outside(lm).items()]
    out = logits(lm, inputs)
    for handle in handles:
        handle.remove()
    return found, out


@pytest.mark.parametrize("method", ["baft", "rome", "lora", "grace"])
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
