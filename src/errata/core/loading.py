"""`load`: a model by name, from a folder, a GGUF file or the hub, as an `errata.core.model.LM`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from errata.core import catalogue, gguf
from errata.core.model import LM
from errata.errors import ModelError

_AUTO = {  # auto class: what its table is called; the whole model before its language part
    "AutoModelForImageTextToText": "IMAGE_TEXT_TO_TEXT",
    "AutoModelForMultimodalLM": "MULTIMODAL_LM",
    "AutoModelForCausalLM": "CAUSAL_LM",
}


def load(
    name: str | Path = "almanac",
    *,
    dtype: str | torch.dtype | None = None,
    device: str | None = None,
    progress: gguf.Progress | None = None,
    **more: Any,
) -> LM:
    """A model by name or folder, or a GGUF file; ``"almanac"`` is the one in the package, `errata models` lists other names.

    ``progress`` is told how a GGUF is converted, once.  ``more`` goes to transformers: device_map, quantization_config, revision …
    """
    label, where = str(name), str(name)
    if label == "almanac":
        where = str(Path(__file__).parents[1] / "almanac" / "model")
        dtype = dtype or "float32"
    if isinstance(dtype, str) and dtype != "auto":
        if not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise ModelError(f"dtype {dtype!r} is not one of torch's; try float32, bfloat16 or auto")
        dtype = getattr(torch, dtype)
    source = catalogue.find(label) or gguf.find(label, more.get("revision"))
    if source is None:
        return _load(where, label, dtype, device, more)
    dtype = dtype or getattr(torch, gguf.fast_dtype() if device in (None, "cpu") else "float32")
    more = {key: value for key, value in more.items() if key != "revision"}
    folder = gguf.converted(source, progress)
    try:
        return _load(str(folder), label, dtype, device, more)
    except ModelError:
        if gguf.whole(folder, deep=True):
            raise
    return _load(str(gguf.converted(source, progress, deep=True)), label, dtype, device, more)


def _load(where: str, label: str, dtype: str | torch.dtype | None, device: str | None, more: dict[str, Any]) -> LM:
    """A folder saved by transformers, or a hub name."""
    import transformers
    from transformers import AutoConfig, AutoTokenizer

    if Path(where).exists() and not (Path(where) / "config.json").exists():
        raise ModelError(f"{where}: holds no config.json; give a folder saved by transformers, or a hub name")
    try:
        keyword = "torch_dtype" if _old() else "dtype"
        config, _ = AutoConfig.from_pretrained(where, return_unused_kwargs=True, **more)
        auto = getattr(transformers, auto_class(config, config.architectures or ()))
        hf, info = auto.from_pretrained(where, output_loading_info=True, **{keyword: dtype or "auto"}, **more)
        tokenizer = AutoTokenizer.from_pretrained(where)
    except (OSError, ValueError, RuntimeError) as error:
        first = str(error).strip().split("\n")[0]
        raise ModelError(f"{label}: cannot be loaded: {first}") from error
    except Exception as error:  # safetensors raises its own type for a damaged file
        if type(error).__name__ != "SafetensorError":
            raise
        raise ModelError(f"{label}: the weights are damaged or truncated ({error}); fetch them again") from error
    if info["missing_keys"]:  # transformers would go on with random numbers in their place
        raise ModelError(
            f"{label}: the weights lack {sorted(info['missing_keys'])[0]!r}; the folder is incomplete or its config.json is another's"
        )
    return LM(hf if device is None else hf.to(device), tokenizer, label)


def auto_class(config: Any, architectures: Sequence[str]) -> str:
    """transformers' auto class of the whole model, towers for images and sound included.

    The one whose class is among ``architectures``, as a checkpoint names it; where none is, the first that knows the config's type.
    """
    import transformers
    from transformers.models.auto import modeling_auto

    found = {}
    for name, kind in _AUTO.items():
        known = getattr(modeling_auto, f"MODEL_FOR_{kind}_MAPPING_NAMES", {}).get(config.model_type, ())
        if known and hasattr(transformers, name):
            found[name] = {known} if isinstance(known, str) else set(known)
    named = [name for name, classes in found.items() if classes & set(architectures)]
    return next(iter([*named, *found]), "AutoModelForCausalLM")


def _old() -> bool:
    import transformers

    return int(transformers.__version__.split(".")[0]) < 5
