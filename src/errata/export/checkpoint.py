"""`bake`: base plus stack as a plain Hugging Face checkpoint, W + ΔW rounded once to the dtype it is stored in."""

from __future__ import annotations

import copy
import errno
import json
import math
import os
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from errata import storage
from errata.core import offload
from errata.core.bank import Stack
from errata.core.families import text_config
from errata.core.loading import auto_class
from errata.core.model import LM
from errata.errors import ModelError
from errata.export import tensors
from errata.export.changes import (
    ExportReport,
    WeightDelta,
    Written,
    base_file,
    base_folder,
    dtype_named,
    mark,
    place,
    share,
    slice_of,
    weight_deltas,
)
from errata.export.tensors import LazyTensor

INDEX = "model.safetensors.index.json"
FILES = (
    r"(generation_|(video_)?preprocessor_|processor_|tokenizer_)?config\.json|tokenizer.*|special_tokens_map\.json|added_tokens\.json|vocab\..*|"
    r"merges\.txt|spiece\.model|chat_template.*|[\w.-]+\.safetensors|model\.safetensors\.index\.json|errata\.json|README\.md|\w+\.py"
)
_PROCESSOR = ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json")  # how images become numbers
_USE = (
    "A plain transformers checkpoint, the edits in its weights: `{auto}.from_pretrained(THIS_FOLDER)`; "
    "vLLM, TGI and llama.cpp's converter read it as they read the base."
)


def bake(lm: LM, stack: Stack, folder: str | Path, *, dtype: str | torch.dtype | None = None, force: bool = False) -> ExportReport:
    """Write the model that ``stack`` (low-rank and dense ops) makes of ``lm`` as a checkpoint that needs no errata.

    ``dtype``: of the floating weights written; None keeps each one's own.  Weights are read, never changed, and pass through memory a
    slice at a time; only fused experts that are edited, all of a block at once.  The folder appears whole or not at all; one that is
    there is replaced only with ``force``, and only if it is a checkpoint.
    """
    out, wanted = Path(folder), dtype_named(dtype)
    found = weight_deltas(lm, stack)
    place(lm, out, force, "a checkpoint", FILES, "config.json")
    lost: dict[str, tuple[float, float]] = {}
    lazy = _checkpoint(lm, found, wanted, lost)
    files = _files(lm, lazy)
    stored = str(wanted or lm.dtype).removeprefix("torch.")
    with storage.atomic_folder(out) as temporary:
        for name, names in files.items():
            tensors.write(temporary / name, {n: lazy[n] for n in names})
        if len(files) > 1:
            total = {"total_parameters": sum(math.prod(t.shape) for t in lazy.values()), "total_size": sum(t.bytes for t in lazy.values())}
            index = {"metadata": total, "weight_map": dict(sorted((n, f) for f, names in files.items() for n in names))}
            storage.write(temporary / INDEX, json.dumps(index, indent=2).encode())
        _rest(lm, temporary, wanted)
        written = tuple(Written(c.path, c.rank, share(*lost[c.path])) for c in found)
        mark(lm, stack, temporary, _USE.format(auto=auto_class(lm.hf.config, [type(lm.hf).__name__])), written, stored)
    return ExportReport(out, stored, written)


def _checkpoint(lm: LM, found: list[WeightDelta], dtype: torch.dtype | None, lost: dict[str, tuple[float, float]]) -> dict[str, LazyTensor]:
    """Every tensor by the name it has in a checkpoint; those that change know how.  ``lost`` is filled while they are written."""
    if getattr(lm.hf, "hf_quantizer", None) is not None or getattr(lm.hf.config, "quantization_config", None) is not None:
        raise ModelError("the model is quantised, nothing can be added to its weights; load it unquantised, or export the patch as LoRA")
    state: dict[str, Tensor] = {k: v for k, v in lm.hf.state_dict().items() if isinstance(v, Tensor)}
    for name, tensor in state.items():
        if tensor.device.type == "meta":
            raise ModelError(
                f"the values of {name} are not in memory (offloaded or on meta); load the model without device_map and bake again"
            )
        if tensor.dtype not in tensors.NAMES:
            raise ModelError(f"{name} is stored as {tensor.dtype}, which is no plain weight; load the model in float32 or bfloat16")
    sources = {_place(_plain(change, state)): change for change in found if not change.fused}
    for mixture in (c for c in found if c.fused):  # checkpoints may name each expert: the weight is cut apart once it is edited
        weight = state[name := f"{mixture.path}.down_proj"]
        state[name] = torch.cat(list(_edited(weight, mixture, dtype or weight.dtype, lost)))
    out: dict[str, LazyTensor] = {}
    for name, tensor in _as_saved(lm.hf, state).items():
        change = sources.pop(_place(tensor), None)
        kept = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        slices = partial(_slices, tensor) if change is None else partial(_edited, tensor, change, kept, lost)
        out[name] = LazyTensor(kept, tuple(tensor.shape), slices)
    for change in sources.values():
        raise ModelError(f"{change.path} is stored fused with other weights in checkpoints of this model; serve the patch with errata")
    return out


def _place(t: Tensor) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    """Equal for two names of the same numbers."""
    return t.data_ptr(), tuple(t.shape), t.stride()


def _plain(change: WeightDelta, state: dict[str, Tensor]) -> Tensor:
    """The linear's own weight [O, I] (Conv1D: [I, O]); `ModelError` where there is none, or where others use it too."""
    module, (inner, outer) = change.module, change.sizes
    plain = change.transposed or (isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward)
    weight = state.get(f"{change.path}.weight")
    if not plain or weight is None or not weight.is_floating_point():
        raise ModelError(f"{change.path} is a {type(module).__name__} without a plain floating-point weight; serve the patch with errata")
    if tuple(weight.shape) != ((inner, outer) if change.transposed else (outer, inner)):
        raise ModelError(f"{change.path} keeps its weight as {tuple(weight.shape)}, not {(outer, inner)}; serve the patch with errata")
    if len(users := [name for name, t in state.items() if t.data_ptr() == weight.data_ptr()]) > 1:
        raise ModelError(
            f"the weight of {change.path} is shared ({', '.join(users)}): baking would change all; serve the patch with errata"
        )
    return weight


def _as_saved(hf: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """References under the names ``save_pretrained`` gives: each tied weight once, transformers 5's renamings undone."""
    ignored = set(getattr(hf, "_keys_to_ignore_on_save", None) or ())
    tied = offload.tied_weights_keys(hf)
    once: dict[Any, str] = {}
    for name in sorted(state, key=lambda n: n in tied):  # of two names the one that is not filled from the other
        once.setdefault(_place(state[name]) if state[name].numel() else name, name)
    keep = {k: state[k] for k in state if k in set(once.values()) and k not in ignored}
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # transformers 4 keeps checkpoint names in memory
        return keep
    out: dict[str, Tensor] = revert_weight_conversion(hf, keep)
    return out


def _slices(tensor: Tensor) -> Iterator[Tensor]:
    if tensor.ndim == 0:
        yield tensor
    else:
        yield from torch.split(tensor, slice_of(math.prod(tensor.shape[1:])))


def _edited(weight: Tensor, change: WeightDelta, dtype: torch.dtype, lost: dict[str, tuple[float, float]]) -> Iterator[Tensor]:
    """W + ΔW, the sum in float64, rounded once; what rounding moved is added up beside the size of ΔW."""
    at, error, size = 0, 0.0, 0.0
    for delta in change.rows(change.transposed):
        exact = weight[at : at + len(delta)].detach().cpu().double() + delta
        rounded = exact.to(dtype)
        if not torch.isfinite(rounded).all():
            raise ModelError(f"{change.path}: edited weights are too large for {dtype}; bake with dtype bfloat16 or float32")
        error += float((rounded.double() - exact).square().sum())
        size += float(delta.square().sum())
        at += len(delta)
        yield rounded
    lost[change.path] = error, size


def _files(lm: LM, lazy: dict[str, LazyTensor]) -> dict[str, list[str]]:
    """Tensors by file: as the base is cut, where that is known and names them all; else as ``save_pretrained`` would."""
    index = base_file(lm, INDEX)
    if index is not None:
        try:
            where = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files: dict[str, list[str]] = {}
            for name in lazy:
                files.setdefault(Path(str(where[name])).name, []).append(name)
            return dict(sorted(files.items()))
        except (OSError, ValueError, KeyError, TypeError):
            pass  # not the names this model saves: cut afresh
    import inspect

    from huggingface_hub import split_torch_state_dict_into_shards

    size = inspect.signature(type(lm.hf).save_pretrained).parameters["max_shard_size"].default
    empty = {name: torch.empty(t.shape, dtype=t.dtype, device="meta") for name, t in lazy.items()}
    cut = split_torch_state_dict_into_shards(empty, filename_pattern="model{suffix}.safetensors", max_shard_size=size)
    return {file: list(names) for file, names in cut.filename_to_tensors.items()}


def _rest(lm: LM, folder: Path, dtype: torch.dtype | None) -> None:
    """Config, generation config, tokenizer, what makes numbers of images and, for a model with code of its own, that code."""
    config = copy.deepcopy(lm.hf.config)
    config.architectures = [type(lm.hf).__name__]
    for part in {id(c): c for c in (config, text_config(config))}.values():
        setattr(part, "dtype" if hasattr(part, "dtype") else "torch_dtype", dtype or lm.dtype)
    try:
        config.save_pretrained(folder)
        generation = base_file(lm, "generation_config.json")
        if generation is not None:
            shutil.copyfile(generation, folder / generation.name)
        elif getattr(lm.hf, "generation_config", None) is not None:
            lm.hf.generation_config.save_pretrained(folder)
        lm.tokenizer.save_pretrained(folder)
        for path in filter(None, (base_file(lm, name) for name in _PROCESSOR)):
            shutil.copyfile(path, folder / path.name)
        base = base_folder(lm)
        for code in base.glob("*.py") if base is not None and getattr(config, "auto_map", None) else ():
            shutil.copyfile(code, folder / code.name)
    except Exception as error:  # tokenizers raises a bare Exception for a full disk
        if "os error 28" not in str(error) and "No space left" not in str(error):
            raise
        raise OSError(errno.ENOSPC, "No space left on device") from None  # `storage.atomic_folder` says the rest
    for path in folder.iterdir():
        with open(path, "rb") as stream:
            os.fsync(stream.fileno())
