"""A tiny GGUF, written with the `gguf` package: a llama of two blocks with a byte-level tokenizer."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np

WIDTH, DEPTH, HEADS, INNER = 32, 2, 2, 64
SPECIAL = ("<unk>", "<s>", "</s>")


def _bytes() -> list[str]:
    """GPT-2's printable name of each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(others)) for b in range(256)]


def write(path: Path, architecture: str = "llama", seed: int = 0, broken: float | None = None, without: str = "") -> Path:
    """``broken``: this number among the weights; ``without``: this tensor is left out."""
    writer = gguf.GGUFWriter(path, architecture)
    tokens = [*SPECIAL, *_bytes(), "Ġt", "he", "Ġthe"]
    writer.add_name("tiny")
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(DEPTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * len(SPECIAL) + [gguf.TokenType.NORMAL] * (len(tokens) - len(SPECIAL)))
    writer.add_token_merges(["Ġ t", "h e", "Ġt he"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    numbers = np.random.default_rng(seed)
    shapes = {"token_embd": (len(tokens), WIDTH), "output_norm": (WIDTH,)}
    for block in range(DEPTH):
        shapes |= {f"blk.{block}.{name}": (WIDTH, WIDTH) for name in ("attn_q", "attn_k", "attn_v", "attn_output")}
        shapes |= {f"blk.{block}.{name}": (WIDTH,) for name in ("attn_norm", "ffn_norm")}
        shapes |= {f"blk.{block}.{name}": (INNER, WIDTH) for name in ("ffn_gate", "ffn_up")}
        shapes[f"blk.{block}.ffn_down"] = (WIDTH, INNER)
    for name, shape in shapes.items():
        values = np.ones(shape, np.float32) if len(shape) == 1 else numbers.normal(0, 0.3, shape).astype(np.float32)
        if broken is not None and name == "token_embd":
            values[0, 0] = broken
        if name != without:
            writer.add_tensor(f"{name}.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def rewritten(source: Path, out: Path, change: Callable[[str, Any], tuple[Any, Any]], without: tuple[str, ...] = ()) -> Path:
    """A copy of a GGUF: ``change(name, tensor)`` gives the numbers that are written and their type; ``without``: fields left out."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(out, reader.fields["general.architecture"].contents())
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key not in ("general.architecture", *without):
            listed = field.types[0] == gguf.GGUFValueType.ARRAY
            writer.add_key_value(key, field.contents(), field.types[0], sub_type=field.types[-1] if listed else None)
    for tensor in reader.tensors:
        values, kind = change(tensor.name, tensor)
        writer.add_tensor(tensor.name, values, raw_dtype=kind)
    for write_ in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        write_()
    return out


def numbers(tensor: Any) -> Any:
    """A tensor of a file as float32, in its shape."""
    return gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32).reshape(tuple(reversed(tensor.shape.tolist())))


def folders(cache: Path) -> list[str]:
    """What lies in the cache, but for lock files."""
    return sorted(p.name for p in cache.iterdir() if p.is_dir() and p.name != "files")


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
