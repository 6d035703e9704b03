"""The most likely token is the one torch names, ties and NaN included."""

from __future__ import annotations

import pytest
import torch

from errata.core.greedy import argmax


@pytest.mark.parametrize("size", [1, 511, 1024, 1025, 5000, 49_152])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_same_place_as_torchs(size: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(size)
    logits = torch.randint(-9, 9, (64, size), generator=generator).to(dtype)  # many are equal: the first counts
    assert torch.equal(argmax(logits), logits.argmax(-1))
    smooth = torch.randn(3, 5, size, generator=generator).to(dtype)
    assert torch.equal(argmax(smooth), smooth.argmax(-1))
    assert int(argmax(smooth[0, 0])) == int(smooth[0, 0].argmax())


@pytest.mark.parametrize("place", [0, 700, 1030])
def test_nan_and_infinity(place: int) -> None:
    logits = torch.zeros(1, 1040)
    logits[0, 1039] = torch.inf
    logits[0, 3] = torch.inf
    assert argmax(logits).tolist() == [3]
    logits[0, place] = torch.nan
    assert argmax(logits).tolist() == logits.argmax(-1).tolist() == [place]
    assert argmax(torch.full((2, 1040), -torch.inf)).tolist() == [0, 0]
    logits[0, 1035] = torch.nan
    assert argmax(logits).tolist() == [place]
