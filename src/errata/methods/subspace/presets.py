"""BaFT's settings by name: what the paper states, and what the almanac's tables were measured with."""

from __future__ import annotations

from typing import Any

from errata.methods.subspace.editor import PAPER_DEPTHS

# the paper's positions and gates; nothing that is errata's own
_AS_PAPER: dict[str, Any] = {
    "init": "pyreft",
    "gate_start": "random",
    "opens": "answer",
    "threshold": 0.0,
    "alpha": 0.01,
    "beta": 0.05,
    "gamma": 0.02,
    "other_facts": 0,
    "prefixes": 0,
    "contrast": 0,
    "resume": True,
    "depths": list(PAPER_DEPTHS),
}
# What the paper states; R_loc acts on a request's own ``unrelated`` texts alone.
_PUBLISHED = {
    **_AS_PAPER,
    "gate": "shared_logit",
    "rescale": "max",
    "stop": 0.01,
    "stop_on": "mean",
    "lr": 3e-4,
    "steps": 40,
    "batched_lr": 1e-4,
    "weight_decay": 0.0,
}
_LLAMA2 = {"layers": [9, 18, 24, 28], "alpha": 0.01, "beta": 0.05, "gamma": 0.02}
# as docs/results measured it, chosen on dev: the benchmark's requests bring ``unrelated``; the loss counts its full stop
_ALMANAC = {
    **_AS_PAPER,
    "rescale": "margin",
    "steps": 40,
    "stop": 0.01,
    "end": ".",
}

BAFT: dict[str, dict[str, Any]] = {
    "published": _PUBLISHED,
    "published llama-2-7b": _LLAMA2,
    "published llama-3-8b": {"layers": [9, 18, 24, 28], "alpha": 0.01, "beta": 0.1, "gamma": 0.05},
    "published gemma-1.1-7b": {"layers": [18, 20, 22, 24], "alpha": 0.01, "beta": 0.1, "gamma": 0.05},
    "published-all-layers": {**_PUBLISHED, **_LLAMA2, "layers": list(range(32)), "rank": 16},  # appendix D.3, LLaMA-2-7b
    "almanac": _ALMANAC,
}
# what `errata tune` tries
BAFT_TUNES: dict[str, Any] = {
    "layers": (4 / 30, 8 / 30, 10 / 30),
    "init": ("pyreft",),
    "other_facts_weight": (0.1, 1.0),
    "prefixes": (8,),
    "steps": (120,),
    "threshold": (0.05, 0.2),
    "train_gates": (True,),
}
