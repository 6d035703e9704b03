"""What an op may be: the names, axes and dtypes of its tensors, and its settings.  One declaration a kind, beside the kind.

A patch is held against it when it is loaded, saved, shown and put on a model (`errata.core.patch.Patch.check`), so that what is wrong is
said then and not by whatever meets it first in a forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from errata.config import build
from errata.errors import ConfigError, PatchError, near

Tensors: TypeAlias = Mapping[str, Tensor]
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_LARGEST = 1e12  # two factors of it and a state of 1e9 still multiply to a finite float32; what edits have found stays below 1e5


@dataclass(frozen=True)
class NoSettings:
    """Of a kind that has none."""


@dataclass(frozen=True)
class OpSchema:
    """What a kind asks of its ops.

    tensors   {name: axes}, or a function of (settings, tensors) that gives it.  Axes are written as in docstrings, "R I": one letter is one
              length in all tensors of the op, I and O are the sizes of what goes into and comes out of the site.  "r+1" is one more, a
              number is itself, "N*" may be empty.  Numbers are real and of one dtype in the op; "M:int64" names another dtype
    settings  a frozen dataclass: types by its fields, ranges in its ``__post_init__`` (`errata.config.build`)
    linear    whether the site must be a linear
    mixed     whether real numbers may differ in dtype within the op
    numbers   what else must hold of the numbers: what is wrong of (settings, tensors), None where nothing is
    beside    likewise of (op, all ops of its patch)
    on_model  likewise of (settings, tensors, (I, O) of the site, the model)
    """

    tensors: Mapping[str, str] | Callable[[Any, Tensors], Mapping[str, str]]
    settings: type = NoSettings
    linear: bool = True
    mixed: bool = False
    numbers: Callable[[Any, Tensors], str | None] | None = None
    beside: Callable[[Any, Sequence[Any]], str | None] | None = None
    on_model: Callable[[Any, Tensors, tuple[int, int], Any], str | None] | None = None

    def read(self, settings: Mapping[str, Any]) -> Any:
        """The settings as an instance; `PatchError` for one that is missing, unknown, ill-typed or out of range."""
        try:
            return build(self.settings, settings, "setting")
        except ConfigError as error:
            raise PatchError(str(error)) from None

    def sizes(self, settings: Mapping[str, Any], tensors: Tensors) -> dict[str, int]:
        """{axis: its length}; `PatchError` for settings, names, shapes, dtypes or numbers that are not as declared."""
        own = self.read(settings)
        wanted = self.tensors(own, tensors) if callable(self.tensors) else self.tensors
        if missing := [name for name in wanted if name not in tensors]:
            raise PatchError(f"tensor {missing[0]!r} is missing")
        if unknown := [name for name in tensors if name not in wanted]:
            raise PatchError(f"it has no tensor {unknown[0]!r}; {near(unknown[0], list(wanted), 'there are')}")
        sizes: dict[str, int] = {}
        reals = {tensors[name].dtype for name, said in wanted.items() if ":" not in said}
        for name, said in wanted.items():
            _hold(name, tensors[name], said, sizes)
        if len(reals) > 1 and not self.mixed:
            raise PatchError(f"its tensors are of several dtypes: {', '.join(sorted(map(str, reals)))}")
        if self.numbers is not None and (wrong := self.numbers(own, tensors)):
            raise PatchError(wrong)
        return sizes

    def wrong_on(self, op: Any, sizes: Mapping[str, int], site: tuple[int, int], model: Any) -> str | None:
        """What is wrong of an op with these `sizes` on a model whose site takes I and gives O numbers; None where nothing is."""
        if self.linear and op.site.point == "block":
            return "it acts beside a linear, and a block's output is none"
        for axis, length in zip("IO", site, strict=True):
            if (own := sizes.get(axis, length)) != length:
                return f"it is made for {'an input' if axis == 'I' else 'an output'} of {own} numbers, here there are {length}"
        return None if self.on_model is None else self.on_model(self.read(op.settings), op.tensors, site, model)


def _hold(name: str, tensor: Tensor, said: str, sizes: dict[str, int]) -> None:
    """One tensor against its declaration; lengths that are new are put into ``sizes``."""
    axes, _, dtype = said.partition(":")
    kinds = (getattr(torch, dtype),) if dtype else _FLOATS
    if tensor.dtype not in kinds:
        raise PatchError(f"tensor {name!r} is of {tensor.dtype}, not of {' or '.join(map(str, kinds))}")
    shape, letters = tuple(tensor.shape), axes.split()
    if len(shape) != len(letters) or not all(_fits(a, n, sizes) for a, n in zip(letters, shape, strict=True)):
        known = {a: n for a, n in sizes.items() if a in axes}
        raise PatchError(f"tensor {name!r} has shape {list(shape)}, not [{', '.join(letters)}]" + (f" with {known}" if known else ""))


def _fits(axis: str, length: int, sizes: dict[str, int]) -> bool:
    letter, _, more = axis.rstrip("*").partition("+")
    if letter.isdigit():
        return length == int(letter)
    if length == 0 and not axis.endswith("*"):
        return False
    return length - int(more or 0) == sizes.setdefault(letter, length - int(more or 0))


def check_finite(name: str, tensor: Tensor, *, unlimited: bool = False) -> None:
    """`PatchError` for NaN, infinity or numbers that no edit has; with ``unlimited`` infinity may stand for "no limit"."""
    if not tensor.is_floating_point() or not tensor.numel():
        return
    if unlimited:
        tensor = tensor.masked_fill(tensor == torch.inf, 0.0)
    least, most = (float(x) for x in torch.aminmax(tensor.detach()))
    if not (-torch.inf < least and most < torch.inf):
        raise PatchError(f"tensor {name!r} holds NaN or infinity; make the edit again")
    if max(-least, most) > _LARGEST:
        raise PatchError(f"tensor {name!r} holds {max(-least, most):.1e}, and no edit has more than {_LARGEST:.0e}; make the edit again")


def within(values: Tensor, least: int, end: int) -> bool:
    """Whether whole numbers are all from ``least`` to below ``end``."""
    return not values.numel() or (int(values.min()) >= least and int(values.max()) < end)
