"""What the locate-then-edit editors are asked in the tests, and the float64 models that they edit there."""

from __future__ import annotations

import functools

import torch
from families import lm
from torch import Tensor

from errata.config import build
from errata.core.model import LM
from errata.core.patch import Patch, Site
from errata.core.tail import Tail
from errata.methods.locate.editor import LocateEditor
from errata.methods.locate.run import LocateThenEditRun
from errata.request import EditRequest

REQUESTS = [
    EditRequest("The capital of France is", "Rome", "France"),
    EditRequest("The language of Italy is", "Madrid", "Italy"),
    EditRequest("In Rome people speak", "French", "Rome"),
]
SHARED = {"stats_tokens": 1500, "prefixes": [[2, 2], [3, 1]], "v_steps": 8, "v_lr": 0.2}
TIGHT = {"atol": 1e-9, "rtol": 1e-9}


@functools.cache
def base(family: str) -> LM:
    return lm(family, torch.float64)


def make(cls: type[LocateEditor], **more: object) -> LocateEditor:
    return build(cls, {**SHARED, **more})


def job(
    family: str, editor: LocateEditor, problems: list[list[EditRequest]], on: tuple[Patch, ...] = ()
) -> tuple[LocateThenEditRun, list[Patch]]:
    found = LocateThenEditRun(editor, base(family), problems, on, Tail)
    return found, found.run()


def linear(model: LM, block: int) -> tuple[Tensor, Tensor]:
    """W [O, I] and its bias."""
    module = model.module(Site(block, "mlp_down"))
    w = module.weight.T if type(module).__name__ == "Conv1D" else module.weight
    return w.detach(), module.bias.detach() if module.bias is not None else torch.zeros(w.shape[0], dtype=w.dtype)
