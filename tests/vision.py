"""Tiny untrained vision-language models of the installed transformers, each from its config, and inputs with an image for each.

Both towers have the same number of blocks, so that a number of blocks does not tell them apart.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
import transformers
from families import tokenizer
from torch import Tensor, nn

from errata.core.model import LM
from errata.core.patch import Patch
from errata.request import EditRequest

WIDTH, DEPTH, HEADS, INNER = 32, 4, 4, 48
TOKENS = len(tokenizer())
IMAGE, VIDEO, BEGIN, END = TOKENS, TOKENS + 1, TOKENS + 2, TOKENS + 3  # ids that only the model knows
SIDE, PATCH = 16, 8  # pixels of an image and of a patch: four patches

TEXT = {
    "hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": HEADS, "num_key_value_heads": 2, "intermediate_size": INNER,
    "max_position_embeddings": 128, "head_dim": 8, "vocab_size": TOKENS + 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_TOWER = {
    "hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": HEADS, "intermediate_size": INNER,
    "image_size": SIDE, "patch_size": PATCH, "num_channels": 3,
}  # fmt: skip
_CLIP = {"model_type": "clip_vision_model", **_TOWER, "projection_dim": WIDTH}
_SIGLIP = {"model_type": "siglip_vision_model", **_TOWER, "vision_use_head": False}
_LLAMA = {"model_type": "llama", **TEXT}
_MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
_QWEN = {"spatial_merge_size": 2, "temporal_patch_size": 2, "patch_size": PATCH, "num_heads": HEADS, "depth": DEPTH, "in_channels": 3}
_QWEN_IDS = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": BEGIN, "vision_end_token_id": END}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llava": ("Llava", {"text_config": _LLAMA, "vision_config": _CLIP, "image_token_index": IMAGE, "image_seq_length": 4}),
    "llava_next": (
        "LlavaNext",
        {"text_config": _LLAMA, "vision_config": _CLIP, "image_token_index": IMAGE, "image_grid_pinpoints": [[SIDE, SIDE]]},
    ),
    "qwen2_vl": (
        "Qwen2VL",
        {"text_config": {**TEXT, "rope_parameters": _MROPE},
         "vision_config": {**_QWEN, "embed_dim": WIDTH, "hidden_size": WIDTH, "mlp_ratio": 2},
         **_QWEN_IDS},
    ),
    "qwen2_5_vl": (
        "Qwen2_5_VL",
        {"text_config": {**TEXT, "rope_parameters": _MROPE},
         "vision_config": {**_QWEN, "hidden_size": WIDTH, "out_hidden_size": WIDTH, "intermediate_size": INNER, "window_size": 32,
                           "fullatt_block_indexes": [1, 3]},
         **_QWEN_IDS},
    ),
    "qwen3_vl": (
        "Qwen3VL",
        {"text_config": {**TEXT, "rope_parameters": _MROPE},
         "vision_config": {**_QWEN, "hidden_size": WIDTH, "out_hidden_size": WIDTH, "intermediate_size": INNER,
                           "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]},
         **_QWEN_IDS},
    ),
    "smolvlm": ("SmolVLM", {"text_config": _LLAMA, "vision_config": _TOWER, "image_token_id": IMAGE, "scale_factor": 1}),
    "idefics3": ("Idefics3", {"text_config": _LLAMA, "vision_config": _TOWER, "image_token_id": IMAGE, "scale_factor": 1}),
    "paligemma": (
        "PaliGemma",
        {"text_config": {"model_type": "gemma", **TEXT}, "vision_config": {**_SIGLIP, "projection_dim": WIDTH}, "image_token_index": IMAGE,
         "projection_dim": WIDTH, "hidden_size": WIDTH},
    ),
    "gemma3": (
        "Gemma3",
        {"text_config": {**TEXT, "sliding_window": 8, "query_pre_attn_scalar": 8}, "vision_config": _SIGLIP, "mm_tokens_per_image": 4,
         "image_token_index": IMAGE, "boi_token_index": BEGIN, "eoi_token_index": END},
    ),
    "mllama": (
        "Mllama",
        {"text_config": {**TEXT, "cross_attention_layers": [1]},
         "vision_config": {**_TOWER, "attention_heads": HEADS, "num_global_layers": 2, "vision_output_dim": 2 * WIDTH, "max_num_tiles": 1,
                           "intermediate_layers_indices": [1], "supported_aspect_ratios": [[1, 1]]},
         "image_token_index": IMAGE},
    ),
    "internvl": (
        "InternVL",
        {"text_config": {"model_type": "qwen2", **TEXT},
         "vision_config": {**_TOWER, "image_size": [SIDE, SIDE], "patch_size": [PATCH, PATCH]}, "image_token_id": IMAGE,
         "image_seq_length": 1},
    ),
}  # fmt: skip


PREFIX_LM = "paligemma"  # whose prompts are read in both directions
NAMES = [name for name in MODELS if name != PREFIX_LM]
SOME = ["llava", "qwen2_5_vl", "smolvlm", "gemma3", "mllama"]
PROMPTS = ["The capital of France is", "The language of the people who live in Spain is"]
REQUEST = EditRequest("The capital of France is", "Rome", "France", unrelated=(("The capital of Japan is", "Tokyo"),))
SETTINGS: dict[str, dict[str, Any]] = {
    "lora": {"targets": ["mlp_down|attn_out"], "layers": [2]},
    "grace": {"eps": 100.0},  # every prompt is near
    "wise": {"layer": 0, "activation": "input"},
}


def build(name: str, seed: int = 0, vision: dict[str, Any] | None = None) -> Any:
    """An untrained model; ``vision`` changes its tower."""
    prefix, settings = MODELS[name]
    if vision:
        settings = {**settings, "vision_config": {**settings["vision_config"], **vision}}
    torch.manual_seed(seed)
    config = getattr(transformers, f"{prefix}Config")(**settings)
    built = getattr(transformers, f"{prefix}ForConditionalGeneration")(config).eval()
    for parameter in built.parameters():
        if not parameter.any():  # projections and gates that begin at zero would keep the image out
            torch.nn.init.normal_(parameter, std=0.2)
    return built


@functools.cache
def model(name: str) -> LM:
    """The same as an `LM`, one for all tests."""
    return LM(build(name), tokenizer(), name)


def made(name: str, method: str, **settings: Any) -> Patch:
    """A method's patch for the model of that name."""
    from laws import editor

    (patch,) = editor(method, **{**SETTINGS.get(method, {}), **settings}).edit_each(model(name), [REQUEST])
    return patch


@torch.no_grad()
def logits(lm: LM, inputs: dict[str, Any]) -> Tensor:
    """Of the model called as transformers does."""
    return lm.hf(**inputs).logits


def outside(lm: LM) -> dict[str, nn.Module]:
    """Modules that are no part of the language part and hold nothing of it: the tower and the projector."""
    inside = set(language(lm.hf)[1].modules())
    return {at: m for at, m in lm.hf.named_modules() if not inside & set(m.modules()) and at != "lm_head"}


def _qwen(rows: int) -> dict[str, Any]:
    return {"pixel_values": torch.rand(8 * rows, 6 * PATCH * PATCH), "image_grid_thw": torch.tensor([[1, 2, 4]] * rows)}


def _pixels(rows: int) -> dict[str, Any]:
    return {"pixel_values": torch.rand(rows, 3, SIDE, SIDE)}


def _many(rows: int) -> dict[str, Any]:
    return {"pixel_values": torch.rand(rows, 1, 3, SIDE, SIDE)}


def _tiled(rows: int) -> dict[str, Any]:
    return {"pixel_values": torch.rand(rows, 2, 3, SIDE, SIDE), "image_sizes": torch.tensor([[SIDE, SIDE]] * rows)}


def _crossed(rows: int) -> dict[str, Any]:
    return {
        "pixel_values": torch.rand(rows, 1, 1, 3, SIDE, SIDE),
        "aspect_ratio_ids": torch.ones(rows, 1, dtype=torch.long),
        "aspect_ratio_mask": torch.ones(rows, 1, 1, dtype=torch.long),
    }


# of each model: what stands for an image in the ids, the image of each of so many rows, and a mask that says which ids are an image's
_IMAGES: dict[str, tuple[list[int], Any, str | None]] = {
    "llava": ([IMAGE] * 4, _pixels, None),
    "llava_next": ([IMAGE] * 10, _tiled, None),
    "qwen2_vl": ([BEGIN, IMAGE, IMAGE, END], _qwen, "mm_token_type_ids"),
    "qwen2_5_vl": ([BEGIN, IMAGE, IMAGE, END], _qwen, "mm_token_type_ids"),
    "qwen3_vl": ([BEGIN, IMAGE, IMAGE, END], _qwen, "mm_token_type_ids"),
    "smolvlm": ([IMAGE] * 4, _many, None),
    "idefics3": ([IMAGE] * 4, _many, None),
    "paligemma": ([IMAGE] * 4, _pixels, None),
    "gemma3": ([BEGIN, *[IMAGE] * 4, END], _pixels, "token_type_ids"),
    "mllama": ([IMAGE], _crossed, None),
    "internvl": ([IMAGE], _pixels, None),
}


def inputs(name: str, prompts: list[str], seed: int = 0) -> dict[str, Any]:
    """What a processor makes of prompts behind an image each: ids and mask, padded on the left, and the images."""
    torch.manual_seed(seed)
    marks, images, kind = _IMAGES[name]
    rows = [[1, *marks, *tokenizer()(prompt)["input_ids"][1:]] for prompt in prompts]
    wide = max(map(len, rows))
    ids = torch.tensor([[0] * (wide - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (wide - len(row)) + [1] * len(row) for row in rows])
    out = {"input_ids": ids, "attention_mask": mask, **images(len(rows))}
    if kind is not None:
        out[kind] = (ids == IMAGE).long()
    if name == "mllama":
        out["cross_attention_mask"] = mask[:, :, None, None]
    return out


def language(hf: Any) -> tuple[str, Any]:
    """(its path, the language part): by the name that transformers gives it, which errata does not ask for."""
    name = "language_model" if hasattr(hf.model, "language_model") else "text_model"
    return f"model.{name}", getattr(hf.model, name)


def saved(name: str, folder: Any, **changes: Any) -> Any:
    """The model and the tokenizer in a folder, as `save_pretrained` leaves them: no processor."""
    hf = build(name, **changes)
    hf.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return hf


def talking(template: str) -> Any:
    """The tokenizer with a chat template."""
    out = copy.deepcopy(tokenizer())
    out.chat_template = template
    return out
