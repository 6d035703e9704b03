"""What the laws of `docs/architecture.md` are tested with: for every method the settings with which it edits the tiny models in a moment,
what it is asked to write, and the patches it makes."""

from __future__ import annotations

import copy
import dataclasses
import functools

import pytest
import torch
from families import FAMILIES, SENTENCES, lm
from pairwise import Row, covering

from errata import registry
from errata.config import build
from errata.core.bank import Bank
from errata.core.model import LM
from errata.core.patch import Patch, Site
from errata.methods.adapters.editor import PUBLISHED
from errata.methods.in_context.editor import InContextEditor
from errata.methods.locate.editor import LocateEditor
from errata.methods.subspace.baft import BaFT
from errata.methods.subspace.op import orthonormal, start
from errata.request import EditRequest

METHODS = registry.names("method")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
REQUESTS = [
    EditRequest("The capital of France is", "Rome", "France", unrelated=(("The language of Spain is", "Spanish"),)),
    EditRequest("The language of Italy is", "Spanish", "Italy", unrelated=(("The capital of Japan is", "Tokyo"),)),
    EditRequest("In Rome people speak", "French", "Rome", unrelated=(("The capital of Spain is", "Madrid"),)),
]
PROMPTS = [p for p, _ in SENTENCES]
_SUBSPACE = {"rank": 4, "lr": 0.02, "end": "."}
# At the subject these models, which know eight sentences by heart, cannot be edited: their answers hang on the words after it.
_LOCATE = {
    "layers": [0], "end": ".", "stats_tokens": 1500, "prefixes": [], "fact_token": "last", "clamp": 20.0, "kl": 0.0, "v_decay": 0.0,
    "v_lr": 0.2, "v_steps": 80,
}  # fmt: skip
_WEAK = {**_LOCATE, "mom2_weight": 1e-3}
# Nobody taught these models an EOS, so LocFT trains the full stop here; its EOS is tested in test_ft.py and test_ft_settings.py.
_TUNE = {"layers": [1, 2], "lr": 0.01, "steps": 40, "stop": 0.1}
_ADAPTER = {**PUBLISHED, "rank": 4, "steps": 20, "stop": 0.1, "end": "."}
_WISE = {
    "layer": 0, "contexts": [], "end": ".", "lr": 2.0, "steps": 40, "alpha": 0.1, "beta": 0.5, "gamma": 0.2, "norm_constraint": None,
    "stop": 0.1, "settled": 10.0,
}  # fmt: skip
_PLAIN = {"fact": "{prompt} {target}.", "cue": ""}  # these models have room for 64 tokens, and a word they don't know takes many
QUICK = {
    "baft": {**BaFT.PRESETS["published"], **_SUBSPACE}, "reft": _SUBSPACE,
    "rome": _LOCATE, "r-rome": _LOCATE, "emmet": _LOCATE, "memit": _WEAK,
    "lora": {**_ADAPTER, "lr": 0.01, "prefixes": 2}, "adalora": {**_ADAPTER, "lr": 0.02, "dropout": 0.05},
    "pmet": {**_WEAK, "kl": 1e-3, "kl_stop": 1e-9}, "alphaedit": {**_LOCATE, "share": 0.95, "l2": 1e-6},
    "ft-l": _TUNE, "ft-m": {**_TUNE, "contrast": 0, "prefixes": 2, "end": "."}, "loc-ft": {**_TUNE, "end": ".", "eos": False},
    "grace": {"layer": 0, "eps": 0.1, "unit": "norm", "lr": 0.3, "steps": 30, "end": "."},
    "melo": {
        "layer": 0, "lora_layers": [1, 2], "radius": 0.1, "blocks": 4, "rank": 4, "lr": 0.02, "decay": 1.0, "steps": 60,
        "stop": 0.1, "end": ".",
    },
    "wise": {**_WISE, "mask_ratio": 0.8}, "wise-light": {**_WISE, "pool": 0.5, "mask_ratio": 1.0},
    "rep": {
        "wrapped": _LOCATE, "steps": 20, "lr": 0.02, "rank": 4, "pool": 20, "away": 32, "prefixes": [[5, 2]],
        # GPT-NeoX's MLP in block 0 sees its token alone: every surface has the prompt's key, and only aggregation has something to fit
        "surfaces": ["names", "shuffled", "prefixes"], "aggregation": 1.0, "match": 1.0, "closing": 1.0, "consistency": 100.0, "tau": 0.6,
    },
    "ice": _PLAIN, "ike": {**_PLAIN, "shot": "{prompt} {target}. {query} {answer}.", "k": 2}, "retrieval": _PLAIN,
}  # fmt: skip
IN_CONTEXT = [m for m in METHODS if issubclass(registry.get("method", m), InContextEditor)]
LOCATE = [m for m in METHODS if issubclass(registry.get("method", m), LocateEditor)]
ONE_TOKEN = [*LOCATE, "rep", "grace", "ft-l"]  # they change the output of a linear at one token; FT-L trains one token's distribution
# A law is held to every method on every family, and, of what is not an identity, in two dtypes.  For identities see `exact`.
_IN = dict.fromkeys(("undo", "rows", "padding", "round trip"), ("float32", "bfloat16"))
_IDENTITIES = ("independence", "tail")
_FORCED = ("llama", "gpt2", "gpt_neox", "gemma2")  # absolute and rotary positions, sliding windows
_ENDED = ("llama", "gpt2", "gpt_neox")
PRODUCT: list[Row] = [
    *((law, m, f, dtype) for law, dtypes in _IN.items() for m in METHODS for f in FAMILIES for dtype in dtypes),
    *((law, m, f, "to the end" if f in _ENDED else "a few steps") for law in _IDENTITIES for m in METHODS for f in FAMILIES),
    *(("forcing", m, f, "float32") for m in METHODS for f in _FORCED),
]
# By default: each law on each method, and on each family, in each dtype; and each method on each family.
MEET = ((0, 1, 3), (0, 2, 3), (1, 2))
CHOSEN = frozenset(covering(PRODUCT, MEET))


def each_case(law: str) -> pytest.MarkDecorator:
    """Methods, families and dtypes of a law: those of `CHOSEN`, the others where slow tests run."""
    columns = ("method", "family", "dtype") if law in _IN else ("method", "family")
    rows = [pytest.param(*row[1 : 1 + len(columns)], marks=() if row in CHOSEN else pytest.mark.slow) for row in PRODUCT if row[0] == law]
    return pytest.mark.parametrize(columns, rows)


def exact(family: str, method: str = "baft") -> tuple[str, dict[str, int]]:
    """(dtype, settings) for identities: some families are trained to the end, each row stopping at its own step, the others for a few
    steps.  Gemma-2's eager attention casts float64's lowest mask value to float32, which is -inf and then NaN, so that family is held to
    float32."""
    few = {"v_steps": 3} if method in LOCATE else {} if method in ("none", *IN_CONTEXT) else {"steps": 3}
    short = {"wise": {"steps": 6}, "wise-light": {"steps": 6}, "rep": {"steps": 3}}  # of a high rate rounding grows with each step
    return "float32" if family == "gemma2" else "float64", short.get(method, {}) if family in _ENDED else few


def asked(method: str) -> list[EditRequest]:
    """What a method is asked to write.  A shift at one token cannot carry an answer of several in models this small, nor can FT-L."""
    return [*REQUESTS[:2], dataclasses.replace(REQUESTS[2], target="Spanish")] if method in ONE_TOKEN else REQUESTS


def editor(method: str, **settings: object) -> object:
    return build(registry.get("method", method), {**QUICK.get(method, {}), **settings})


@functools.cache
def model(family: str, dtype: str = "float32") -> LM:
    return lm(family, DTYPES[dtype])


def in_chat(base: LM) -> LM:
    """The same model with a chat template, which is written in the letters that these models have."""
    talking = copy.deepcopy(base.tokenizer)
    talking.chat_template = "{{ bos_token }}{% for m in messages %}{{ m['role'][0] }}: {{ m['content'] }}\na:\n{% endfor %}"
    return LM(base.hf, talking, base.name)


@functools.cache
def patches(method: str, family: str, dtype: str = "float32") -> tuple[Patch, ...]:
    return tuple(editor(method).edit_each(model(family, dtype), asked(method)))


def rows(base: LM, side: str = "left", texts: list[str] | None = None) -> tuple:
    encoded = base.encode(texts or PROMPTS)
    return base.batch(encoded, side), [len(e.ids) for e in encoded]


def random_bank(base: LM, block: int, count: int, dtype: torch.dtype, gate: str = "shared_logit") -> Bank:
    own = {k: t.to(dtype) for k, t in start(4, base.width, gate, "pyreft", block, base.device).items()}
    own["R"] = orthonormal(own.pop("X"))
    stacked = {k: torch.stack([t * (1 + 0.1 * i) if k != "R" else t for i in range(count)]).requires_grad_() for k, t in own.items()}
    return Bank("subspace", Site(block), {"gate": gate, "last": 3}, stacked)
