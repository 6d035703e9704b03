"""Fine-tuning as an editor: FT-L, FT-M, and LocFT, the plain strong baseline.

    W ← W + ΔW,   ΔW = argmin of the target's loss by Adam,   W one MLP's last matrix

FT-L and FT-M are what EasyEdit's FT runs (objective_optimization "prompt_last" and "target_new"): up to ``steps`` passes over the requests
in mini-batches, no update where a mini-batch's loss is below ``stop``, the end with the pass whose mean is.  LocFT (Yang et al., ICLR 2026)
showed that ordinary mini-batches over all requests, an EOS behind the target and the right matrix make this a strong editor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from errata.core.model import LM
from errata.core.tokens import Encoded
from errata.errors import ConfigError
from errata.methods.finetune.editor import FineTuneEditor
from errata.methods.finetune.training import Objective, PromptLast
from errata.writing import NO_SPACE

# What is errata's own in `FTM`, as EasyEdit has it
_PLAIN: dict[str, Any] = {
    "depth": 21 / 32, "steps": 25, "stop": 1e-2, "batch_size": 1, "contrast": 0, "contrast_batch": 4, "prefixes": 0,
}  # fmt: skip
# EasyEdit hparams/FT (causal models that errata knows); both objectives share them.  Gemma as BaFT's authors ran it, with LLaMA's.
PUBLISHED: dict[str, dict[str, Any]] = {
    **{name: {"layers": [21]} for name in ("llama-2-7b", "llama-3-8b", "llama-3.2-3b", "gpt-j-6b", "baichuan", "gemma-1.1-7b")},
    **{name: {"layers": [27]} for name in ("qwen2-7b", "qwen2.5-7b", "qwen3.5-9b")},
    "mistral-7b": {"layers": [21], "norm_constraint": 5e-5},
    "qwen-7b": {"layers": [31], "norm_constraint": 5e-5},
    "gpt2-xl": {"layers": [0], "norm_constraint": 5e-4, "batch_size": 3},
}


@dataclass(frozen=True)
class FTL(FineTuneEditor):
    """FT-L: every target token under the distribution behind the prompt, averaged; no target token is ever fed.  A target of several
    tokens cannot be learned so, which is why the papers' FT-L rows are low.  BaFT §3.1 speaks of a KL term; the code has none.

    target_ids   "joint": the target's ids as they follow the prompt; "alone": those of the target behind a space tokenised by itself,
                 special tokens included, so that LLaMA learns a BOS too (the released code)

    WISE's FT-L rows are block 27 with 50 passes on LLaMA-2.
    """

    name: ClassVar[str] = "ft-l"
    paper: ClassVar[str] = "Meng et al. 2022 (ROME), appendix; as run by EasyEdit, WISE, BaFT (prompt_last)"
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {**PUBLISHED, "almanac": {"layers": [7], "lr": 2e-3}}

    target_ids: Literal["joint", "alone"] = "joint"

    def objective(self, lm: LM, prompts: Sequence[str], targets: Sequence[str]) -> Objective:
        encoded = self.encode(lm, prompts, targets)
        ids = [e.target for e in encoded]
        if self.target_ids == "alone":
            ids = [tuple(row) for row in lm.tokenizer([f" {t.lstrip(NO_SPACE).strip()}" for t in targets])["input_ids"]]
        return PromptLast(lm, encoded, ids)


@dataclass(frozen=True)
class FTM(FineTuneEditor):
    """FT-M: cross-entropy of the target's tokens, each behind those before it, averaged over the target, then over rows.

    end   text trained after the target, so that a free answer ends there; EasyEdit trains none

    ``published`` is EasyEdit's: two thirds up, on the prompt alone.  On a real model the answer then spreads to whatever is asked in the
    same words, and to no other wording.  The default trains the block that a fact is read in (LLaMA's block 6), beside neighbours whose
    answers stay, and behind short texts, all in one mini-batch.
    """

    name: ClassVar[str] = "ft-m"
    paper: ClassVar[str] = "Zhang et al. 2024, arXiv:2401.01286 (FT-M; EasyEdit's target_new)"
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "published": _PLAIN,
        **{f"published {name}": settings for name, settings in PUBLISHED.items()},
        "almanac": {**_PLAIN, "layers": [7], "lr": 1e-2, "end": "."},
    }

    depth: float = 6 / 32
    steps: int = 60
    stop: float = 0.03
    batch_size: int = 5
    contrast: int = 16
    contrast_batch: int = 2
    prefixes: int = 4
    end: str = ""

    def encode(self, lm: LM, prompts: Sequence[str], targets: Sequence[str]) -> list[Encoded]:
        return lm.encode(prompts, [t + self.end for t in targets])


@dataclass(frozen=True)
class LocFT(FTM):
    """LocFT-BF: FT-M with an EOS behind every target, shuffled mini-batches of 100 over all requests, and a matrix found by search.

    eos   train the tokenizer's EOS behind the target and ``end``

    Numbers are the released files'.  The matrix differs widely between models (block 6 of 28 in Qwen2.5, 22 of 32 in LLaMA-3): for others
    the rule is a guess.  The released file for Mistral trains the whole of block 23 at lr 5e-5; here it is that block's MLP matrix.
    """

    name: ClassVar[str] = "loc-ft"
    paper: ClassVar[str] = "Yang et al., ICLR 2026, arXiv:2509.22072 (LocFT-BF)"
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "llama-3-8b": {"layers": [22]},
        "qwen2.5-7b": {"layers": [6]},
        "mistral-7b": {"layers": [23], "lr": 5e-5},
        # chosen on dev, 50 requests at once: the last block spreads furthest to rephrasings; 25 passes of one mini-batch are too few
        "almanac": {"layers": [7], "lr": 5e-3, "batch_size": 10, "end": "."},
    }

    depth: float = 22 / 32  # LLaMA-3's
    steps: int = 25
    stop: float = 1e-2
    batch_size: int = 100
    shuffle: bool = True
    contrast: int = 0
    contrast_batch: int = 4
    prefixes: int = 0
    eos: bool = True

    def encode(self, lm: LM, prompts: Sequence[str], targets: Sequence[str]) -> list[Encoded]:
        encoded = super().encode(lm, prompts, targets)
        if not self.eos:
            return encoded
        last = lm.tokenizer.eos_token_id
        if not isinstance(last, int):
            raise ConfigError(f"{self.name}: this tokenizer has no EOS; set eos=false, and end to a text that ends an answer")
        return [Encoded((*e.ids, last), e.prompt_length) for e in encoded]
