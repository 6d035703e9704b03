"""A safetensors file written tensor by tensor, a slice at a time: nothing is held but the slice.

The format: eight bytes with the header's length, a JSON header {name: {dtype, shape, data_offsets}}, padded with spaces to a
multiple of eight, then the numbers, little-endian, in row order, without gaps.
Source: the format's description at https://github.com/huggingface/safetensors.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


@dataclass(frozen=True)
class LazyTensor:
    """A tensor to come: its dtype and shape, and its rows, slice by slice."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    slices: Callable[[], Iterator[Tensor]]

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write(path: Path, tensors: Mapping[str, LazyTensor]) -> None:
    """The file is on the disk when this returns."""
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))  # wide numbers first: each starts aligned
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name in order:
        lazy = tensors[name]
        header[name] = {"dtype": NAMES[lazy.dtype], "shape": list(lazy.shape), "data_offsets": [at, at + lazy.bytes]}
        at += lazy.bytes
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    with open(path, "wb") as stream:
        stream.write(struct.pack("<Q", len(head)) + head)
        for name in order:
            for part in tensors[name].slices():
                flat = part.detach().to(tensors[name].dtype).cpu().contiguous().flatten()
                stream.write(flat.view(torch.uint8).numpy().data)
        stream.flush()
        os.fsync(stream.fileno())
        if stream.tell() != 8 + len(head) + at:
            raise AssertionError(f"{path.name}: {stream.tell()} bytes written, {8 + len(head) + at} announced")
