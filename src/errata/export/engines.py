"""What serving programs ask of an adapter's folder, as checks on the files that were written; no engine is needed.

Rules read in the programs' documentation and source (2025 and 2026): vLLM's `peft_helper` and `lora_model`, SGLang's `mem_pool`,
llama.cpp's `llama-adapter.h`.
Nothing here has loaded an adapter in them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open

from errata.errors import PatchError
from errata.export.lora import CONFIG, RANKS, WEIGHTS

# model_type -> whether vLLM's class of it takes LoRA ("supported models" of its documentation); types without a row are not judged
_VLLM_LORA = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3"), True),
    **dict.fromkeys(("gpt2", "gptj", "gpt_neox"), False),
}
_PREFIX = "base_model.model."
_LINEARS = frozenset(
    ("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "gate_proj", "up_proj", "gate_up_proj", "down_proj")
)  # that vLLM's classes of the types above wrap


def objections(folder: str | Path, model_type: str) -> list[str]:
    """Why vLLM would refuse the adapter in ``folder``, or run it as something else; empty where nothing speaks against it.

    ``model_type``: of the base's config.  `PatchError` where there is no adapter.
    """
    folder = Path(folder)
    try:
        config: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        with safe_open(folder / WEIGHTS, "pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, ValueError) as error:
        raise PatchError(f"{folder} holds no LoRA adapter ({error}); `errata patch export --format lora` writes one") from None
    return [*_of_model(model_type), *_of_config(config), *_of_tensors(config, shapes, model_type)]


def _of_model(model_type: str) -> list[str]:
    if _VLLM_LORA.get(model_type, True):
        return []
    return [f"vLLM runs {model_type} without LoRA; give it the baked checkpoint"]


def _of_config(config: dict[str, Any]) -> list[str]:
    found = []
    rank = config.get("r")
    if config.get("peft_type") != "LORA":
        found.append(f"peft_type is {config.get('peft_type')!r}, not 'LORA'")
    if not isinstance(rank, int) or not 1 <= rank <= RANKS[-1]:
        found.append(f"rank {rank} is not one that --max-lora-rank can hold (at most {RANKS[-1]}); export with --rank, or bake")
    if config.get("rank_pattern") or config.get("alpha_pattern"):
        found.append(
            "linears of different rank or alpha (rank_pattern, alpha_pattern): older versions do not read them: one r and one alpha count"
        )
    for key, wanted in (("bias", "none"), ("modules_to_save", None), ("use_dora", False)):
        if (config.get(key) or wanted) != wanted:
            found.append(f"{key} is {config[key]!r}; only {wanted!r} is taken")
    return found


def _of_tensors(config: dict[str, Any], shapes: dict[str, tuple[int, ...]], model_type: str) -> list[str]:
    found, paths = [], set()
    for name, shape in sorted(shapes.items()):
        path, _, kind = name.removeprefix(_PREFIX).rpartition(".lora_")
        if not name.startswith(_PREFIX) or kind not in ("A.weight", "B.weight") or len(shape) != 2:
            found.append(f"{name} is no {_PREFIX}PATH.lora_A.weight or .lora_B.weight")
            continue
        paths.add(path)
        rank = shape[0 if kind == "A.weight" else 1]
        if rank != config.get("r"):
            found.append(f"{name} has rank {rank}, the adapter {config.get('r')}: llama.cpp would scale it by their ratio")
        if f"{_PREFIX}{path}.lora_{'B' if kind == 'A.weight' else 'A'}.weight" not in shapes:
            found.append(f"{name} has no partner")
        if _VLLM_LORA.get(model_type) and path.rpartition(".")[2] not in _LINEARS:
            found.append(f"{path} is no linear that vLLM adapts")
    targets = config.get("target_modules")
    if not isinstance(targets, list) or set(targets) != paths:
        found.append("target_modules are not the linears that the tensors are of")
    return found
