"""MEMIT and PMET: many facts at once, shared out over several blocks.

    R = (Z − Z_now) / (blocks left),   Δ = R Kᵀ (λ C + K Kᵀ)⁻¹

Source: Meng et al. 2023 (MEMIT) and its code: Z is the output of the last edited block at the subject's last token; each block
sees the ones already edited; λ C stands for the keys to be kept.  With few edits Δ is K's fraction s/(1+s), s = kᵀC⁻¹k/λ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from errata.core import experts
from errata.core.families import linear_sizes
from errata.core.model import LM
from errata.core.patch import Site
from errata.errors import ConfigError
from errata.methods.locate.editor import ALMANAC, FIVE, RIDGE_ALONE, LocateEditor
from errata.methods.locate.solve import small_side, whitened
from errata.methods.locate.values import Objective
from errata.text.statistics import Moments

LAMBDA_PER_INPUT = 15_000 / 11_008  # λ of LLaMA-2-7b over the size of its keys: E[kᵀC⁻¹k] is that size, so the fraction written stays alike
_LLAMA = {"layers": [4, 5, 6, 7, 8], "mom2_weight": 15_000.0}
_ALMANAC = {**ALMANAC, "layers": [0, 1, 2], "clamp": 1.5, "mom2_weight": 100.0}
_SMALL_CLAMP = {"v_decay": 0.5, "clamp": 0.75}


@dataclass(frozen=True)
class MEMIT(LocateEditor):
    """mom2_weight   λ; None: `LAMBDA_PER_INPUT` times the size of a key, and a hundredth of it where a norm follows the MLP"""

    name: ClassVar[str] = "memit"
    paper: ClassVar[str] = "Meng et al., ICLR 2023 (MEMIT)"
    EXPERTS: ClassVar[bool] = True
    DEPTHS: ClassVar[tuple[float, ...]] = FIVE
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {  # EasyEdit hparams/MEMIT; GPT-2-XL and GPT-J are the authors' own
        "gpt2-xl": {"layers": [13, 14, 15, 16, 17], "mom2_weight": 20_000.0, "v_steps": 20, **_SMALL_CLAMP},
        "gpt-j-6b": {"layers": [3, 4, 5, 6, 7, 8], "mom2_weight": 15_000.0, **_SMALL_CLAMP},
        "qwen-7b": {**_LLAMA, **_SMALL_CLAMP},
        "llama-3-8b": {**_LLAMA, **_SMALL_CLAMP, "v_lr": 0.1},  # AlphaEdit's repository
        **dict.fromkeys(("llama-2-7b", "mistral-7b", "llama-3.2-3b", "qwen2-7b", "qwen2.5-7b"), _LLAMA),
        "gemma-1.1-7b": _LLAMA,  # ours; no file was published
        "almanac": _ALMANAC,
    }

    TUNES: ClassVar[dict[str, Any]] = {**LocateEditor.TUNES, "mom2_weight": (500.0, 10_000.0)}

    mom2_weight: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mom2_weight is not None and self.mom2_weight <= 0:
            raise ConfigError(f"{self.name}: mom2_weight must be positive")

    def alone(self, lm: LM) -> Self:
        site = self.site(lm, self.target_layers(lm)[-1])
        count, size = experts.sizes(lm.module(site))[:2] if site.point == experts.POINT else (1, linear_sizes(lm.module(site))[0])
        size *= count
        return replace(self, mom2_weight=LAMBDA_PER_INPUT * size * RIDGE_ALONE) if self.mom2_weight is None else self

    def down_factors(
        self, m: Moments | None, keys: Tensor, prompt_keys: Tensor, groups: Sequence[list[int]], past_keys: Tensor | None
    ) -> list[Tensor]:
        """Kᵀ(λC + KKᵀ)⁻¹ = (λI + Kᵀ C⁻¹ K)⁻¹ Kᵀ C⁻¹: one small system a problem."""
        weight = LAMBDA_PER_INPUT * keys.shape[1] if self.mom2_weight is None else self.mom2_weight
        white, plain = whitened(m, keys), keys.double()
        return [small_side(plain[g], white[g], weight) for g in groups]


@dataclass(frozen=True)
class PMETObjective(Objective):
    """nll_factor · NLL + KL + decay.

    Once every target token of every row is the argmax, the factor is a tenth of it, and KL ≤ ``kl_stop`` ends it.
    """

    asks_right: ClassVar[bool] = True
    nll_factor: float = 1.0
    kl_stop: float = 0.01

    def total(self, nll: Tensor, kl: Tensor, decay: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        factor = torch.where(right, self.nll_factor / 10, self.nll_factor)
        loss = factor * nll + self.kl * kl + self.decay * decay
        # ended by the KL where the answer is right, never before
        return loss, torch.where(right, kl / self.kl_stop, 1 + nll)


@dataclass(frozen=True)
class PMET(MEMIT):
    """MEMIT with two shifts optimised together, of the attention's and of the MLP's output; only the MLP's is written.

    The residual is shared out by √(blocks left), which writes more than the MLP's share.  Where a norm follows the MLP and one block is
    edited, nothing would make up for the attention's share, so that the MLP's shift is optimised alone.
    Source: Li et al. 2024 (PMET) and its code; the exception is ours.

    nll_factor, kl_stop
                     weight of the NLL in the value's loss, a tenth of it once the answer is right; then a KL at or below ``kl_stop`` ends
                     it (the released code's)
    """

    name: ClassVar[str] = "pmet"
    paper: ClassVar[str] = "Li et al., AAAI 2024 (PMET)"
    EXPERTS: ClassVar[bool] = False
    VALUE_AT: ClassVar[str] = "mlp"
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {  # EasyEdit hparams/PMET; upstream's GPT-J has mom2_weight 6000
        "gpt-j-6b": {
            "layers": [3, 4, 5, 6, 7, 8], "v_lr": 0.2, "v_steps": 30, "kl": 1.0, "mom2_weight": 15_000.0, **_SMALL_CLAMP,
        },
        "gpt-neox-20b": {"layers": [6, 7, 8, 9, 10], "v_steps": 30, "kl": 0.8, "mom2_weight": 15_000.0, "v_decay": 0.5, "clamp": 0.8},
        **{key: {**_LLAMA, "v_decay": 0.5, "clamp": 1.0} for key in ("llama-2-7b", "llama-3.2-3b")},
        "almanac": {**_ALMANAC, "clamp": 15.0},  # of the MLP's output there, a tenth of the block's
    }  # fmt: skip

    nll_factor: float = 1.0
    kl_stop: float = 0.01

    def objective(self, lm: LM) -> Objective:
        return PMETObjective(self.v_lr, self.v_steps, 1.0, self.kl, self.v_decay, self.clamp_on(lm), self.nll_factor, self.kl_stop)

    def divisor(self, left: int) -> float:
        return float(left**0.5)

    def value_sites(self, site: Site, direct: bool) -> list[Site]:
        return [site, Site(site.block, "attn_out")] if direct else [site]
