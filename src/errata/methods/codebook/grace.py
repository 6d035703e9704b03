"""GRACE: a codebook beside one linear.  A prompt whose key is near a stored one gets that entry's value as the linear's output.

    j = argmin ‖q − κ_j‖;   if ‖q − κ_j‖ ≤ ε_j:  output ← ν_j   at the replaced positions

Keys and radii follow from rules (`errata.methods.codebook.lookup`); only values are trained, and a row of a batch hits one entry at
most, so the values of one patch are independent problems: all of them, and those of all patches, train in one batch.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from errata.core.bank import Stack
from errata.core.lanes import Progress
from errata.core.model import LM
from errata.core.patch import Op, Patch, Site
from errata.errors import ConfigError
from errata.methods.codebook.editor import CodebookEditor, check_site, read_keyed_texts
from errata.methods.codebook.store import FilledCodebook
from errata.methods.codebook.training import train_values
from errata.request import EditRequest


@dataclass(frozen=True)
class GRACE(CodebookEditor):
    """Hyper-parameters (EasyEdit ``hparams/GRACE``):

    layer, point  block and linear; None: by depth, 27/32 of it as for LLaMA-7B, but never the last block, which writes the answer's
                  first token only
    eps           radius of a new key; ``unit`` "norm": as a share of the key's own norm; "absolute": the published unit.  At the published
                  1.0 hardly anything but the edited prompt itself is hit, which is why published generality is near 0
    replace       "last": at the last prompt token (EasyEdit, the default: nothing else is touched, so decoding needs no memory);
                  "prompt": at the tokens before it (the authors' code); "all": at every token of the text, the answer's too
    expand        a key of the same label beyond its neighbour's radius: "coverage" widens the radius to it, "moving_average" also moves
                  the old key half-way to the new one
    value         start of a new value: "cold" uniform in [0, 1), "warm" what the linear gave
    lr, steps     Adam's; ``stop`` ends an entry below that mean loss a token (0: never, as published)
    end           text trained after the target
    rounding      what a comparison with a radius allows for last bits, as a share of the query's norm; None: by the model's dtype
    seed          of new values

    The query is always what the linear reads at the last *prompt* token, so cached, uncached and teacher-forced answers agree.  The
    released codes take the last token of the first text fed after an edit and keep its number: fed prompt and target together, they look
    up another token.  Labels are lists of the target's token ids, compared exactly (released: the mean id).  Paraphrases of a
    request are put in after its prompt, with its label.  A text trains the entry it hits in the finished codebook if that has its label;
    one whose place a later text of the same patch took trains nothing (``notes["lost"]``).

    On a stack whose last live patch is a codebook of this method with the same site, positions and rounding, the edit goes on from it
    and replaces it: one growing codebook.  Taking the patch back leaves the older one.
    """

    name: ClassVar[str] = "grace"
    paper: ClassVar[str] = "Hartvigsen et al., NeurIPS 2023 (GRACE)"
    needs: ClassVar[frozenset[str]] = frozenset()
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        **{key: {"layer": 27, "steps": 50} for key in ("llama-7b", "llama-2-7b", "llama-3.2-3b", "llama3.2-3b")},
        **{key: {"layer": 18, "steps": 50} for key in ("qwen2-7b", "qwen2.5-7b")},
        "qwen3.5-9b": {"layer": 18, "steps": 50, "eps": 5.0},
        "gpt2-xl": {"layer": 35, "point": "mlp.c_fc", "steps": 200},
        "gpt-j-6b": {"layer": 25, "steps": 200},
        "llama-3-8b": {"layer": 27, "steps": 250},  # as BaFT's paper ran it
        "gemma-1.1-7b": {"layer": 24, "steps": 100},  # as BaFT's paper ran it
        # chosen on dev: what the MLP's first linear reads tells rephrases from neighbours far better than what its last one reads
        "almanac": {"layer": 5, "point": "mlp.gate_proj", "eps": 0.65, "unit": "norm", "replace": "all", "end": "."},
    }

    TUNES: ClassVar[dict[str, Any]] = {
        "radius": [{"unit": "norm", "eps": share} for share in (0.1, 0.2, 0.35, 0.5)],
        "layer": (8 / 30, 16 / 30, 22 / 30),
        "contrast": (16,),
    }

    layer: int | None = None
    point: str = "mlp_down"
    eps: float = 1.0
    unit: Literal["absolute", "norm"] = "absolute"
    replace: Literal["last", "prompt", "all"] = "last"
    expand: Literal["coverage", "moving_average"] = "coverage"
    value: Literal["cold", "warm"] = "cold"
    lr: float = 1.0
    steps: int = 100
    stop: float = 0.0
    rounding: float | None = None
    end: str = ""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.eps < 0 or (self.rounding or 0) < 0:
            raise ConfigError("grace: eps and rounding must not be negative")
        if self.lr <= 0 or self.steps < 1:
            raise ConfigError("grace: lr must be positive and steps at least 1")
        self.require_seed(self.seed)
        self.require_contrast()

    def target_site(self, lm: LM) -> Site:
        """The linear to stand beside; `ConfigError` where there is none or where it could not matter."""
        block = lm.nearest_block(min(lm.depth - 2, int(lm.depth * 27 / 32 + 0.5))) if self.layer is None else self.layer
        site = check_site(lm, self.name, block, self.point)
        if self.replace == "prompt" and block == lm.depth - 1:
            raise ConfigError(f"grace: nothing reads earlier tokens of the last block ({block}); choose a lower layer or replace=last")
        return site

    def _make(self, lm: LM, problems: Sequence[list[EditRequest]], on: Stack, runner: Any, progress: Progress | None) -> list[Patch]:
        self.require_requests(problems)
        began, site, rounding = time.perf_counter(), self.target_site(lm), self.tolerance(lm)
        settings = {"replace": self.replace, "rounding": rounding}
        before, under = self.resume_from(on, [site], settings)
        books = [
            FilledCodebook(self, before, texts, rounding)
            for texts in read_keyed_texts(lm, problems, self.end, site, under, self.contrast > 0)
        ]
        train_values(self, lm, books, site, under, runner, progress)
        seconds, out = (time.perf_counter() - began) / max(1, len(problems)), []
        for book, requests in zip(books, problems, strict=True):
            op = Op("codebook", site, {"keys": book.book.keys.clone(), "values": torch.stack(book.values), "radii": book.radii}, settings)
            notes = book.notes() | {"seconds": round(seconds, 4)}
            out.append(self.packed(lm, before, requests, [op], book.book, {"layer": site.block}, notes))
        return out
