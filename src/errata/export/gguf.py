"""`export_gguf`, `bake_gguf`: a stack for llama.cpp and what is built on it, as a LoRA adapter of one file or in a copy of the base's file.

llama.cpp computes y + s B (A x) beside a weight, with s = alpha / rank; alpha 0 means s = 1.  So each weight keeps its own rank, nothing is
padded, and an op's down and up are A and B.  A GGUF has names of its own and, of some weights, another order of rows than transformers.
The names are those of the package `gguf`; the order is what transformers' own reader of GGUFs undoes.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from errata import __version__, storage
from errata.core import catalogue
from errata.core.bank import Stack, active_patches
from errata.core.families import text_config
from errata.core.gguf import find, joined
from errata.core.model import LM
from errata.errors import ConfigError, ModelError, StorageError
from errata.export.changes import ExportReport, WeightDelta, Written, dtype_named, share, weight_deltas
from errata.export.lora import checked_rank, factors, lost_of

_READER = "transformers.modeling_gguf_pytorch_utils"
_SAME_AS = {"mistral": "llama"}  # what llama.cpp calls the architecture of a model type, where a table has it under another name
_NO_LAYOUT = (
    "general",
    "tokenizer",
    "t5",
    "umt5",
    "deci",
    "qwen2_moe",
    "qwen3_moe",
    "gpt_oss",
    "minimax_m2",
)  # no model, or none of plain linears
_TYPES = ("float16", "bfloat16", "float32")
_SAME = "same"
_FIELDS = "errata"  # ours in a file, which llama.cpp skips


@dataclass(frozen=True)
class Layout:
    """How a GGUF keeps a model: the name of its architecture, of its weights, and the order of their rows."""

    architecture: str
    _names: Any
    _reader: Any

    @classmethod
    def of(cls, lm: LM) -> Layout:
        """`ModelError` for a model whose rows no table orders, or without the package `gguf`."""
        try:
            gguf, reader = importlib.import_module("gguf"), importlib.import_module(_READER)
        except ImportError as error:
            raise ModelError(f"to write a GGUF the package {error.name} is needed; pip install 'errata[gguf]'") from None
        config = text_config(lm.hf.config)
        kind = config.model_type.removesuffix("_text")
        architecture = next((v for v in gguf.MODEL_ARCH_NAMES.values() if v == _SAME_AS.get(kind, kind)), None)
        if architecture is None or kind in _NO_LAYOUT or kind not in reader.GGUF_SUPPORTED_ARCHITECTURES:
            raise ModelError(
                f"the order of rows of a {kind} model in a GGUF is not known here; write a LoRA adapter (--format lora) "
                "and convert it with llama.cpp's convert_lora_to_gguf.py"
            )
        number = next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == architecture)
        made = reader.TENSOR_PROCESSORS.get(architecture, reader.TensorProcessor)(config=config.to_dict())
        return cls(architecture, gguf.get_tensor_name_map(number, lm.depth), made)

    def name(self, change: WeightDelta) -> str:
        """Of the weight that is changed."""
        found = None if change.fused else self._names.get_name(change.path)
        if found is None:
            raise ModelError(f"{change.path} has no weight of its own in a {self.architecture} GGUF; serve the patch with errata")
        return f"{found}.weight"

    def rows(self, change: WeightDelta) -> torch.Tensor:
        """[O] which row of the GGUF's weight each output of the linear is: what the reader makes of a weight of row numbers."""
        inner, outer = change.sizes
        of_row, of_column = np.indices((outer, inner), dtype=np.int32)
        read = [self._reader.process(weights=t, name=self.name(change)).weights for t in (of_row, of_column)]
        rows, columns = (t.T if change.transposed else t for t in read)
        order = rows[:, 0]
        if rows.shape != (outer, inner) or not ((rows == order[:, None]).all() and (columns == of_column).all()):
            raise ModelError(f"{change.path} is kept in a GGUF as more than another order of its rows; serve the patch with errata")
        return torch.from_numpy(order.astype(np.int64))


def export_gguf(
    lm: LM, stack: Stack, out: str | Path, *, rank: int | None = None, dtype: str | torch.dtype = "float32", force: bool = False
) -> ExportReport:
    """Write ``stack`` as a LoRA adapter of ``lm``'s base for llama.cpp, on the base in any quantisation.

    ``rank``, ``dtype`` (float32, float16, bfloat16): as `errata.export.export_lora` has them; there is no padding to a common rank.
    """
    path, wanted, layout = Path(out), _stored(dtype), Layout.of(lm)
    checked_rank(rank)
    found = weight_deltas(lm, stack)
    names = [layout.name(change) for change in found]
    place(path, force)
    written = []
    with _writer(path, layout.architecture) as (gguf, writer):
        _about(writer, lm, stack)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, 0.0)
        for change, name in zip(found, names, strict=True):
            op = factors(change, rank, wanted)
            up = torch.empty_like(op.tensors["up"])
            up[layout.rows(change)] = op.tensors["up"]
            for letter, t in (("a", op.tensors["down"]), ("b", up)):
                kind = gguf.GGMLQuantizationType[_ggml(wanted)]
                writer.add_tensor(f"{name}.lora_{letter}", gguf.quantize(t.float().contiguous().numpy(), kind), raw_dtype=kind)
            written.append(Written(change.path, len(op.tensors["down"]), lost_of(change, op)))
    return ExportReport(path, str(wanted).removeprefix("torch."), tuple(written))


def bake_gguf(
    lm: LM, stack: Stack, out: str | Path, *, base: str | Path | None = None, dtype: str = "float16", force: bool = False
) -> ExportReport:
    """Copy the base's GGUF with ``stack`` in its weights: what is not edited stays bit for bit, what is becomes W + ΔW in ``dtype``.

    ``base``: the file; without it the one that ``lm`` was loaded from.  ``dtype``: float16, bfloat16, float32, or "same": each weight's own
    quantisation, whose steps may be larger than the edit; the report tells what share of the change is lost.
    """
    path, layout = Path(out), Layout.of(lm)
    wanted = None if dtype == _SAME else _stored(dtype)
    found = {layout.name(change): change for change in weight_deltas(lm, stack)}
    place(path, force)
    with _base(lm, base) as source, _writer(path, layout.architecture) as (gguf, writer):
        if path.exists() and path.resolve() == source.resolve():
            raise StorageError(f"{path} is the base model itself, which is never written; give another name")
        reader = _read(gguf, source, layout.architecture)
        _about(writer, lm, stack)
        _copy_fields(gguf, reader, writer)
        written, kinds = [], set()
        for tensor in reader.tensors:
            change = found.pop(tensor.name, None)
            if change is None:
                writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
                continue
            kind = tensor.tensor_type if wanted is None else gguf.GGMLQuantizationType[_ggml(wanted)]
            data, kind, lost = _edited(gguf, tensor, change, layout.rows(change), kind)
            writer.add_tensor(tensor.name, data, raw_dtype=kind)
            written.append(Written(change.path, change.rank, lost))
            kinds.add(kind.name)
        for name, change in found.items():
            raise ModelError(f"{source} has no weight {name}, which {change.path} is; it is of another model, or ties it to another weight")
    return ExportReport(path, ", ".join(sorted(kinds)), tuple(written))


def _edited(gguf: Any, tensor: Any, change: WeightDelta, rows: torch.Tensor, kind: Any) -> tuple[Any, Any, float]:
    """(the weight with its change, packed; how it is packed; the share of the change that went).  What `gguf` cannot pack is float16."""
    before = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
    delta = torch.cat([part.float() for part in change.rows()])
    if before.shape != tuple(delta.shape):
        raise ModelError(f"{tensor.name} is {before.shape} in the base's file, {tuple(delta.shape)} in this model; it is of another model")
    moved = np.empty_like(before)
    moved[rows.numpy()] = delta.numpy()
    wanted = before + moved
    with np.errstate(over="ignore"):  # said below
        try:
            packed = gguf.quantize(wanted, kind)
        except NotImplementedError:
            kind = gguf.GGMLQuantizationType.F16
            packed = gguf.quantize(wanted, kind)
    got = gguf.dequantize(packed, kind).astype(np.float32)
    if not np.isfinite(got).all():
        raise ModelError(f"{change.path}: edited weights are too large for {kind.name}; bake with bfloat16 or float32")
    return packed, kind, share(float(np.square(got - wanted, dtype=np.float64).sum()), float(np.square(moved, dtype=np.float64).sum()))


# -- files -------------------------------------------------------------------------------------------------------


@contextmanager
def _writer(path: Path, architecture: str) -> Iterator[tuple[Any, Any]]:
    """(the package `gguf`, its writer of a file that appears whole at the end)."""
    gguf = importlib.import_module("gguf")
    storage.within_reach(path)
    with storage.disk_errors(path), TemporaryDirectory(prefix=f".{path.name}.", dir=path.absolute().parent) as folder:
        temporary = Path(folder, path.name)
        writer = gguf.GGUFWriter(temporary, architecture)
        yield gguf, writer
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with open(temporary, "rb") as stream:
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    storage.flush([path.absolute().parent])


def _about(writer: Any, lm: LM, stack: Stack) -> None:
    """From what the file was made."""
    patches = [{"id": p.id, "method": p.method, "edits": len(p.requests)} for p in active_patches(stack)]
    writer.add_string(f"{_FIELDS}.version", __version__)
    writer.add_string(f"{_FIELDS}.base", lm.fingerprint)
    writer.add_string(f"{_FIELDS}.patches", json.dumps(patches))


def _copy_fields(gguf: Any, reader: Any, writer: Any) -> None:
    writer.data_alignment = reader.alignment
    for key, field in reader.fields.items():
        if not key.startswith(("GGUF.", f"{_FIELDS}.")) and key != gguf.Keys.General.ARCHITECTURE:
            listed = field.types[0] == gguf.GGUFValueType.ARRAY
            writer.add_key_value(key, field.contents(), field.types[0], sub_type=field.types[-1] if listed else None)


def _read(gguf: Any, source: Path, architecture: str) -> Any:
    reader = gguf.GGUFReader(source)
    field = reader.fields.get(gguf.Keys.General.ARCHITECTURE)
    kind = None if field is None else field.contents()
    if kind != architecture:
        raise ModelError(f"{source} holds a {kind} model, not a {architecture} one; name the base's own file")
    if gguf.Keys.Split.LLM_KV_SPLIT_COUNT in reader.fields and reader.fields[gguf.Keys.Split.LLM_KV_SPLIT_COUNT].contents() > 1:
        raise ModelError(f"{source} is one part of a split file; join the parts first (llama-gguf-split --merge)")
    return reader


@contextmanager
def _base(lm: LM, base: str | Path | None) -> Iterator[Path]:
    """The base's GGUF in one piece."""
    source = find(str(base)) if base is not None else (catalogue.find(lm.name) or find(lm.name))
    if source is None or not source.pieces:
        raise ModelError(f"{base or lm.name} is no GGUF file, of which a copy is to be edited; name one with --base FILE.gguf")
    if len(source.pieces) == 1:
        yield source.pieces[0]
        return
    with TemporaryDirectory() as folder:
        yield joined(source.pieces, Path(folder, "base.gguf"))


def place(path: Path, force: bool) -> None:
    """`StorageError` unless ``path`` is free, or ``force`` and a file that errata wrote; `ConfigError` for a name of another kind."""
    storage.no_dangling_link(path)
    if path.suffix != ".gguf":
        raise ConfigError(f"{path}: the name of a GGUF ends in .gguf; give another")
    if not path.exists():
        return
    if not path.is_file() or not _ours(path):
        raise StorageError(f"{path} exists and is not a GGUF that errata wrote; it is left alone, give another name")
    if not force:
        raise StorageError(f"{path} exists already; give another name, or force=True (--force) to replace it")


def _ours(path: Path) -> bool:
    gguf = importlib.import_module("gguf")
    try:
        return f"{_FIELDS}.base" in gguf.GGUFReader(path).fields
    except Exception:  # the reader stumbles over a file of another kind in many ways
        return False


def _stored(dtype: str | torch.dtype) -> torch.dtype:
    found = dtype_named(dtype)
    if str(found).removeprefix("torch.") not in _TYPES:
        raise ConfigError(f"dtype {str(dtype)!r} is none that a GGUF keeps weights in; there are {', '.join(_TYPES)}")
    assert found is not None
    return found


def _ggml(dtype: torch.dtype) -> str:
    return {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[dtype]
