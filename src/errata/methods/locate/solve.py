"""The linear algebra of the locate-then-edit family, in float64; keys are rows [n, I] here."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from errata.text.statistics import Moments


def whitened(m: Moments | None, keys: Tensor, ridge: float = 0.0) -> Tensor:
    """(C + ridge·I)⁻¹ k of each key [N, I]; k itself without C."""
    return keys.double() if m is None else m.solve(keys.double().T.to(m.second_moment.device), ridge).T.to(keys.device)


def coordinates(keys: Tensor, bases: Sequence[Tensor]) -> Tensor:
    """[n, Σ m] of keys [n, I], or [n, E·I] with a basis [I, m] for each expert."""
    return torch.cat([part @ basis for part, basis in zip(keys.chunk(len(bases), 1), bases, strict=True)], 1)


def from_coordinates(rows: Tensor, bases: Sequence[Tensor]) -> Tensor:
    """[n, I] or [n, E·I] of `coordinates`."""
    parts = rows.split([basis.shape[1] for basis in bases], 1)
    return torch.cat([part @ basis.T for part, basis in zip(parts, bases, strict=True)], 1)


def small_side(keys: Tensor, white: Tensor, ridge: float) -> Tensor:
    """(ridge·I + Kᵀ C⁻¹ K)⁻¹ Kᵀ C⁻¹, [n, I]; ``keys`` and ``white`` = (C⁻¹ K)ᵀ are [n, I].

    Equal to Kᵀ (ridge·C + K Kᵀ)⁻¹ without a system of size I.
    """
    gram = keys @ white.T
    gram = (gram + gram.T) / 2 + ridge * torch.eye(len(keys), dtype=keys.dtype, device=keys.device)
    out: Tensor = torch.linalg.solve(gram, white)
    return out


def ridge_rows(own: Tensor, past: Tensor, l2: float) -> Tensor:
    """Rows [n, m] of ((AᵀA + l2 I)⁻¹ ownᵀ)ᵀ with A = own on past [n + p, m]; solved on the smaller side."""
    both = torch.cat([own, past])
    if len(both) < both.shape[1]:  # own (AᵀA + l2)⁻¹ = E (A Aᵀ + l2)⁻¹ A, where E picks own's rows
        gram = both @ both.T + l2 * torch.eye(len(both), dtype=both.dtype, device=both.device)
        out: Tensor = torch.linalg.solve(gram, both)[: len(own)]
        return out
    gram = both.T @ both + l2 * torch.eye(both.shape[1], dtype=both.dtype, device=both.device)
    out = torch.linalg.solve(gram, own.T).T
    return out
