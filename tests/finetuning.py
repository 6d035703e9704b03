"""What the fine-tuning editors are asked in the tests, and the float64 models that they edit there."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import pytest
import torch
from families import lm

from errata.config import build
from errata.core.model import LM
from errata.core.tokens import Encoded
from errata.methods.finetune.editor import FineTuneEditor
from errata.request import EditRequest

REQUESTS = [
    EditRequest("The capital of France is", "Tokyo", "France"),  # targets of several tokens, and of one
    EditRequest("The language of Italy is", "Spanish", "Italy"),
    EditRequest("In Rome people speak", "French", "Rome"),
    EditRequest("The capital of Japan is", "Madrid", "Japan"),
    EditRequest("The language of Spain is", "Italian", "Spain"),
]
SHARED = {"layers": [1], "lr": 5e-3, "steps": 6}
TIGHT = {"atol": 1e-7, "rtol": 0.0}
families = pytest.mark.parametrize("family", ["llama", "gpt2"])  # gpt2's linears are Conv1D


@functools.cache
def base(family: str) -> LM:
    return lm(family, torch.float64)


def make(cls: type[FineTuneEditor], **more: object) -> FineTuneEditor:
    return build(cls, {**cls.PRESETS.get("published", {}), **SHARED, **more})


def encoded(family: str, requests: Sequence[EditRequest], end: str = "") -> list[Encoded]:
    return base(family).encode([r.prompt for r in requests], [r.target + end for r in requests])
