"""Where a gated patch (BaFT, eq. 2) opens: its weights on edited, rephrased and other inputs, its failure signs, and a paired test.

An input is a probe's prompt with its answer behind it, its weights the mean of w(h) over the tokens the patch acts on (the last prompt
tokens and the answer), or, where gates look for the subject on every token, the largest.  Kinds: `_OPEN`, where gates should open, and
the benchmark's local kinds, where they should not.

The signs (`errata.analyse.gate_statistics` has formulas and bounds):

    collapse    w nearly constant over inputs: BaFT has become a ReFT
    imbalance   few bases carry over 90 % of the weight on edited inputs
    locality    agreement on facts that should stay, falling from an early mark T of a continual run to its last
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from errata.analyse import gate_statistics as statistics
from errata.core.bank import Stack, active_patches
from errata.core.model import LM
from errata.core.patch import Op
from errata.core.tokens import Encoded, positions
from errata.errors import InputError, PatchError
from errata.request import LOCAL_KINDS, Case, EditRequest
from errata.score.evaluator import distinct, key
from errata.score.metrics import difference

_OPEN = {"rewrite": "edited", "rephrase": "rephrased"}
KINDS = (*_OPEN.values(), *LOCAL_KINDS)
ROWS = 64  # of a batch
LEAST = 10  # cases behind a sign of falling locality: resampling a handful says nothing
LOCALITY = ("locality_agreement", "teacher_forced")

Told = Callable[[int, int], None]


@dataclass(frozen=True)
class GateWeights:
    """Mean weights w [r] of one block on one case's inputs of one kind (``inputs`` of them), under the patches ``stack``."""

    case: str
    kind: str
    block: int
    stack: str
    inputs: int
    w: np.ndarray


def _subspaces(stack: Stack, gated: bool = True) -> dict[int, Op]:
    """{block: the op of BaFT, without ``gated`` also of ReFT}; `PatchError` where two of the stack are at one block."""
    found: dict[int, Op] = {}
    for op in (op for patch in active_patches(stack) for op in patch.ops if op.kind == "subspace"):
        if gated and op.settings["gate"] == "none":
            continue
        if op.site.block in found:
            raise PatchError(
                f"two edits of this stack act at block {op.site.block}; "
                "analyse them one at a time, or edit with opens=answer and resume=true"
            )
        found[op.site.block] = op
    return found


@dataclass(frozen=True)
class GateInputs:
    """What the gates of ``stack`` are asked of one case: (kind, prompt, answer or None) each."""

    case: str
    texts: tuple[tuple[str, str, str | None], ...]
    stack: Stack


def of_case(case: Case, stack: Stack) -> GateInputs:
    """A case's own probes."""
    kinds = {**_OPEN, **{kind: kind for kind in LOCAL_KINDS}}
    return GateInputs(case.id, tuple((kinds[p.kind], p.prompt, p.target) for p in case.probes if p.kind in kinds), stack)


def of_request(request: EditRequest, stack: Stack) -> GateInputs:
    """What a request itself says, all of which the editor may have trained on."""
    texts = [("edited", request.prompt, request.target), *(("rephrased", p, request.target) for p in request.paraphrases)]
    return GateInputs(request.id, (*texts, *(("unrelated", p, a) for p, a in request.unrelated)), stack)


def read(lm: LM, inputs: Sequence[GateInputs], progress: Told | None = None, what: str = "gate") -> list[GateWeights]:
    """The weights of every case under its own stack; rows of a batch run each under its own.

    ``what``: "gate" w, or "update" |w ∘ (A h + b − R h)|, of ReFT too.
    """
    ops = [_subspaces(one.stack, what == "gate") for one in inputs]
    if not ops or not all(ops):
        raise InputError("there is no gate to look at: make the patch with baft")
    texts = [(i, *text) for i, one in enumerate(inputs) for text in one.texts]
    encoded = [lm.encode([prompt], None if answer is None else [answer])[0] for _, _, prompt, answer in texts]
    forms = [_form(ops[i]) for i, *_ in texts]
    order = sorted(range(len(texts)), key=lambda j: (forms[j], len(encoded[j].ids)))
    read: dict[tuple[int, str, int], list[np.ndarray]] = {}
    start = 0
    while start < len(order):
        part = [j for j in order[start : start + ROWS] if forms[j] == forms[order[start]]]
        owners = [texts[j][0] for j in part]
        for block, w in _batch(lm, [encoded[j] for j in part], [inputs[i].stack for i in owners], ops[owners[0]], what).items():
            for i, j, own in zip(owners, part, w, strict=True):
                read.setdefault((i, texts[j][1], block), []).append(own)
        start += len(part)
        if progress:
            progress(start, len(order))
    return [
        GateWeights(inputs[i].case, kind, block, key(inputs[i].stack), len(own), np.mean(own, axis=0))
        for (i, kind, block), own in sorted(read.items())
    ]


def _form(ops: Mapping[int, Op]) -> str:
    """Alike where ops can share banks."""
    return repr(sorted((block, op.signature()) for block, op in ops.items()))


def _batch(lm: LM, rows: Sequence[Encoded], stacks: Sequence[Stack], ops: Mapping[int, Op], what: str) -> dict[int, np.ndarray]:
    """{block: means over the tokens acted on, [B, r]}."""
    batch = lm.batch(rows).to(lm.device)
    unique, which = distinct(stacks)
    plan = lm.plan(unique, which, len(rows))
    plan.prompt_lengths = batch.prompt_lengths
    plan.recorded = {}
    with torch.no_grad(), lm.running(plan):
        lm.forward(batch.ids, batch.mask, use_cache=False, **lm.last_logits_kwargs)
    position = positions(batch.mask)
    out = {}
    for block, op in ops.items():
        w = plan.recorded[op.site, what][:, -position.shape[1] :].double().abs()  # context may stand in front
        last = op.settings["last"]
        if last is None:
            out[block] = (w * (position >= 0).to(w).unsqueeze(-1)).amax(1).cpu().numpy()
            continue
        on = ((position >= 0) & (position >= batch.prompt_lengths[:, None] - last)).to(w).unsqueeze(-1)
        out[block] = ((w * on).sum(1) / on.sum(1)).cpu().numpy()
    return out


def of(found: Sequence[GateWeights], kind: str | None = None, block: int | None = None) -> list[GateWeights]:
    """Those of one kind, of one block."""
    return [f for f in found if kind in (None, f.kind) and block in (None, f.block)]


def summary(found: Sequence[GateWeights]) -> list[dict[str, Any]]:
    """A row a block and kind: cases, inputs, quantiles over cases of the weight (mean over bases), and each basis' mean weight."""
    out = []
    for block in sorted({f.block for f in found}):
        for kind in (k for k in KINDS if of(found, k, block)):
            mine = of(found, kind, block)
            w = np.stack([f.w for f in mine])
            weight = [round(float(q), 5) for q in np.quantile(w.mean(1), (0.05, 0.25, 0.5, 0.75, 0.95))]
            row = {"block": block, "kind": kind, "cases": len(mine), "inputs": sum(f.inputs for f in mine), "weight": weight}
            out.append({**row, "bases": [round(float(v), 5) for v in w.mean(0)]})
    return out


def signs(found: Sequence[GateWeights], by_mark: Mapping[int, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """The failure signs, a row a block (locality: one row): sign, block, value, bound, fires (None: not measured), says.

    ``by_mark``: {T: the records of cases 1..T after T edits}, of one method.
    """
    out = []
    for block in sorted({f.block for f in found}):
        mine = of(found, None, block)
        out.append(_collapse(block, mine))
        out.append(_imbalance(block, of(mine, "edited")))
    return [*out, falling(by_mark)]


def _collapse(block: int, mine: Sequence[GateWeights]) -> dict[str, Any]:
    value = statistics.variation(np.stack([f.w for f in mine]), [f.stack for f in mine])
    row = {"sign": "collapse", "block": block, "value": value, "bound": statistics.COLLAPSED}
    if np.isnan(value):
        return {**row, "value": None, "fires": None, "says": "no patch was read on two inputs"}
    fires = value <= statistics.COLLAPSED
    what = f"a constant weight explains {100 * (1 - value):.1f} % of the weights' squares"
    return {**row, "fires": fires, "says": what + ("; BaFT is a ReFT here" if fires else "")}


def _imbalance(block: int, edited: Sequence[GateWeights]) -> dict[str, Any]:
    if not edited:
        return {"sign": "imbalance", "block": block, "value": None, "bound": None, "fires": None, "says": "no edited input"}
    means = np.stack([f.w for f in edited]).mean(0)
    count, bound = statistics.carriers(means), statistics.few(len(means))
    effective = statistics.participation_ratio(means)
    says = f"{count} of {len(means)} bases carry {100 * statistics.CARRIED:.0f} % of the weight; {effective:.1f} effective"
    fires = count <= bound if bound else None
    return {"sign": "imbalance", "block": block, "value": count, "bound": bound, "fires": fires, "says": says}


def falling(by_mark: Mapping[int, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Locality at the last mark minus that at the first with at least `LEAST` cases, on the cases of the latter, with its interval."""
    row = {"sign": "locality", "block": None, "value": None, "bound": -statistics.FALL, "fires": None}
    marks = [t for t in sorted(by_mark) if len({r["case"] for r in by_mark[t] if r["kind"] in LOCAL_KINDS}) >= LEAST]
    if len(marks) < 2:
        return {**row, "says": f"needs a continual run scored at two marks T with at least {LEAST} cases with facts that should stay"}
    first, last = marks[0], marks[-1]
    found = difference(by_mark[last], by_mark[first], *LOCALITY)
    fires = found["high"] < 0 and found["value"] < -statistics.FALL
    says = f"T = {first} to {last}: {100 * found['value']:+.1f} [{100 * found['low']:+.1f}, {100 * found['high']:+.1f}] points"
    return {**row, "value": found["value"], "fires": fires, "says": f"{says} on the same {found['n_cases']} cases"}


def tests(found: Sequence[GateWeights], seed: int = 0) -> list[dict[str, Any]]:
    """Whether weights differ between kinds of input, paired by case: a row a block and pair: n, p, gap, p adjusted over all rows."""
    rows = []
    for block in sorted({f.block for f in found}):
        there = [k for k in KINDS if of(found, k, block)]
        pairs = [(a, b) for i, a in enumerate(there) for b in there[i + 1 :] if a in _OPEN.values()]
        for a, b in pairs:
            sides = [{(f.case, f.stack): f.w for f in of(found, kind, block)} for kind in (a, b)]
            common = [c for c in sides[0] if c in sides[1]]
            if common:
                left, right = (np.stack([side[c] for c in common]) for side in sides)
                rows.append({"block": block, "a": a, "b": b, **statistics.paired(left, right, seed)})
    return [{**row, "adjusted": p} for row, p in zip(rows, statistics.holm([r["p"] for r in rows]), strict=True)]
