"""WISE: edits live in a side memory W' beside one MLP matrix W, and what a prompt does in it decides which of the two answers.

    L = L_edit + [Δ(x_u) − α]₊ + [β − Δ(x_e)]₊ + [γ + Δ(x_u) − Δ(x_e)]₊,   Δ(x) = mean over tokens of ‖σ(W x) − σ(W' x)‖₂
    W' answers where Δ ≥ act_ratio × the least Δ of its edits

Edits change a random part of W' (a mask); every ``save_freq`` edits a new memory with a new mask begins, every ``merge_freq`` edits the
last ones are TIES-merged.  Source: Wang et al., NeurIPS 2024, and EasyEdit's code.  Only ΔW = W' − W on its mask is stored; W is not read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from errata.methods.wise.editor import WISEEditor

_LLAMA, _QWEN = {"layer": 27}, {"layer": 23}
# Chosen on dev: its states are large (a step of L_a would be thousands), its W small (a memory holds few edits).  Δ/least at the median
# is 1 for edited prompts, 0.7 rephrased, 0.5 neighbours', 0.3 unrelated, hence act_ratio.
_ALMANAC: dict[str, Any] = {
    "layer": 6, "lr": 10.0, "steps": 40, "unit": 30.0, "act_ratio": 0.6, "contexts": [[5, 3]], "save_freq": 4, "merge_freq": 16, "end": ".",
}  # fmt: skip
_CHAT = {"layer": 29, "alpha": 5.0, "beta": 10.0, "gamma": 10.0, "lr": 0.9, "steps": 30}
# EasyEdit hparams/WISE; wrapping prompts in a chat template, as its chat files do, is left to the user
_PRESETS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("llama-2-7b", "llama-7b", "mistral-7b", "llama-3.2-3b"), _LLAMA),
    "llama-3-8b": {**_CHAT, "alpha": 2.0, "beta": 20.0, "act_ratio": 0.5},
    "llama-3.1-8b": _CHAT,
    **dict.fromkeys(("qwen2.5-7b", "qwen3.5-9b"), _QWEN),
    "gpt-j-6b": {"layer": 21, "alpha": 15.0, "beta": 40.0, "gamma": 20.0},
    "gpt2": {"layer": 8, "point": "mlp.c_fc", "steps": 40, "act_ratio": 0.8},  # gpt2-xl.yaml, whose model is the small one
    "gpt2-xl": {"point": "mlp.c_fc", "steps": 40, "act_ratio": 0.8},
    "almanac": _ALMANAC,
}


@dataclass(frozen=True)
class WISE(WISEEditor):
    """Where paper and released code differ, or ours differs from both:

    layer, point      the linear: block (None: at LLaMA's relative depth 27/32) and its place in it
    lr, steps, weight_decay, stop, settled
                      SGD; ends when the loss is below ``stop`` and moved by at most ``settled`` (the code looks at the two losses before).
                      The code decays all of W' towards 0; here ΔW decays, so W' towards W, and what is not in the mask stays
    norm_constraint   |ΔW| ≤ this, entry by entry; None: no bound
    alpha, beta, gamma, act_ratio
                      margins of Δ, and the share of the least Δ at which a memory opens
    unit              what Δ is counted in: margins are multiples of it, and L_a is of Δ / unit.  1 as published, for states of LLaMA's
                      size; where states are s times larger, unit s leaves the balance of L_edit and L_a as it is there
    edit_mean         L_edit is the target's summed NLL over its "m" tokens, or over "m+1" (the code, whose mask begins one token early, at
                      one that adds nothing).  As L_a is not divided, the code's L_edit weighs m / (m + 1) of ours beside it
    least             the Δ of an edit that counts for the least is that "after" its last update, which is what its prompt has at use, or
                      "before" it (the code).  An edit that reaches ``stop`` has one for both
    activation        "output": Δ as above (the code); "input": ‖A(x)(W' − W)‖₂, no σ (the paper)
    act_on            tokens that Δ is the mean of in training: the "prompt"'s, which is what decides at use (see
                      `errata.methods.wise.op`), or the whole "text" with its target (the code)
    contexts          (tokens, count) of greedy texts the prompt is trained behind, beside the bare prompt; equal ones count once
    mask_ratio, pool  masks are Bernoulli(mask_ratio) draws in a fixed random share ``pool`` of W; with mask_ratio 1 the pool is the mask
    save_freq, merge_freq
                      edits of one memory, and edits after which the last memories are merged
    seed              of the masks
    retrieve          True: memories stay apart, the last merge_freq / save_freq of them merged into one every merge_freq edits (the
                      code's default); False: one is kept, merged every merge_freq edits with weight ``old_weight`` for what it was (the
                      paper's main rows), and one least Δ is kept over all edits.  What is saved and not yet merged answers for itself (the
                      code merges it at the first call); a shut newest memory does not outbid an open one (in the code it may)
    densities         share of W's entries a memory keeps in merging
    end               text trained after the target; the papers train none

    x_u are all ``unrelated`` texts of a request (the code takes one); a request without any is trained against the contexts themselves.
    With ``contrast``, a request's contrast pairs are x_u, too.
    Not made: the code's other form of L_a for an irrelevant prompt that is the subject (its tokens against the rest of the prompt; here
    ``unrelated`` always is what should stay), and its replay of earlier edits.
    A joint edit writes its requests one by one, as released.  An edit goes on from, and replaces, the stack's last patch of these settings.
    """

    name: ClassVar[str] = "wise"
    paper: ClassVar[str] = "Wang et al., NeurIPS 2024 (WISE)"
    needs: ClassVar[frozenset[str]] = frozenset({"unrelated?"})
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = _PRESETS

    TUNES: ClassVar[dict[str, Any]] = {
        "layer": (9 / 30, 18 / 30, 24 / 30), "lr": (0.3,), "act_ratio": (0.7,), "contrast": (16,), "steps": (40,)
    }  # fmt: skip

    layer: int | None = None
    point: str = "mlp_down"
    lr: float = 1.0
    steps: int = 70
    weight_decay: float = 1e-5
    stop: float = 0.02
    settled: float = 1e-4
    norm_constraint: float | None = 1.0
    alpha: float = 5.0
    beta: float = 20.0
    gamma: float = 10.0
    act_ratio: float = 0.88
    unit: float = 1.0
    edit_mean: Literal["m", "m+1"] = "m"
    least: Literal["after", "before"] = "after"
    activation: Literal["output", "input"] = "output"
    act_on: Literal["prompt", "text"] = "prompt"
    contexts: tuple[tuple[int, ...], ...] = ((5, 5), (10, 5))
    mask_ratio: float = 0.2
    pool: float = 1.0
    retrieve: bool = True
    save_freq: int = 500
    merge_freq: int = 1000
    densities: float = 0.53
    old_weight: float = 0.6
    end: str = ""
    seed: int = 0

    def __post_init__(self) -> None:
        need = self.require
        need(self.steps >= 1 and self.lr > 0, "steps must be at least 1 and lr positive")
        need(min(self.weight_decay, self.stop, self.settled, self.alpha, self.beta, self.gamma) >= 0, "decay, stops, margins: not negative")
        need(0 < self.mask_ratio <= 1 and 0 < self.pool <= 1 and 0 < self.densities <= 1, "mask_ratio, pool, densities lie in (0, 1]")
        need(0 < self.old_weight < 1, "old_weight lies between 0 and 1")
        need(self.norm_constraint is None or self.norm_constraint > 0, "norm_constraint must be positive, or null for none")
        need(self.act_ratio > 0 and self.unit > 0, "act_ratio and unit must be positive")
        need(self.save_freq >= 1 and self.merge_freq >= 1, "save_freq and merge_freq must be at least 1")
        need(self.merge_freq % self.save_freq == 0, f"merge_freq ({self.merge_freq}) must be a multiple of save_freq ({self.save_freq})")
        need(all(len(c) == 2 and min(c) >= 1 for c in self.contexts), "contexts are pairs (tokens, count), both at least 1")
        self.require_seed(self.seed)
        self.require_contrast()


@dataclass(frozen=True)
class WISELight(WISE):
    """WISE restricted to a fixed random eighth of W, as BaFT's paper compares with (its Table 3 counts |W| / 8).  That paper does not say
    whether the masks are drawn inside the eighth (the default) or the eighth is the mask (mask_ratio=1).  In the latter case all memories
    share one mask, and merging averages them away: keep merge_freq out of reach.

    A step of SGD moves the output by what the trained entries move, and an eighth of them moves an eighth as far.  At WISE's rate of 1,
    which ``published`` has, 4 of 10 facts were written on SmolLM2; the default is 8.
    """

    name: ClassVar[str] = "wise-light"
    paper: ClassVar[str] = "Liu et al., ICLR 2025 (BaFT), after Wang et al., NeurIPS 2024 (WISE)"

    # on dev the eighth as the mask does better on so small a W; merged every 16 edits, nothing was left of them after 48
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        **_PRESETS, "published": {"lr": 1.0}, "almanac": {**_ALMANAC, "mask_ratio": 1.0, "merge_freq": 4000},
    }  # fmt: skip

    lr: float = 8.0
    pool: float = 0.125
