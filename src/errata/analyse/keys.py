"""Where the keys of a fact's surfaces lie, seen from the edit, and how REP moves them.

An edit of the locate-and-edit family adds Λ (uᵀk) with u ∝ C⁻¹k*, so it acts on a key k in the ratio

    β(k, k*) / β(k*, k*),    β(k, k*) = kᵀ C⁻¹ k*

of what it does to the edited key.  Robustness (REP, Lemma 4.6) wants the ratio of every surface of the fact above some β_min,
specificity (Lemma 4.7) that of every other key below some β_max.  The paper's definitions of the two could not be read; here both are
measured on the edited prompt itself: the patch is scaled by s from 0 to 1, which does to it what it does to a key with the ratio s.

    β_min   the least s from which on the answer begins as the new one does
    β_max   the largest s up to which the answer begins as before the edit
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from errata.core.model import LM
from errata.core.patch import Op, Patch, Site
from errata.core.tail import Tail
from errata.errors import InputError
from errata.methods.locate.run import POINT, LocateThenEditRun
from errata.methods.locate.solve import whitened
from errata.methods.locate.text import LocatedText, placed, prefixes
from errata.methods.rep.op import gate_logit, threshold
from errata.methods.rep.rep import REP
from errata.methods.rep.run import STATE, split_patch
from errata.methods.rep.surfaces import end_of, fitting, original, strangers
from errata.methods.rep.training import projected
from errata.request import EditRequest
from errata.text import surfaces

FACT = ("prompt", "names_seen", "names_unseen", "shuffled_seen", "shuffled_unseen", "prefixed", "long")  # where the edit should act
_OTHER = ("same prompt, another name", "another fact")  # and where it should not
STEPS = 20  # of s
OTHERS = 5  # keys of each kind in `_OTHER`, a case


@dataclass(frozen=True)
class KeyComparison:
    """rows: case, block, kind, before and after (the ratio of the native and of the moved key), opened (whether a gate was);
    limits: case, beta_min (None where the edit fails), beta_max."""

    rows: list[dict[str, Any]]
    limits: list[dict[str, Any]]


def compare(lm: LM, requests: Sequence[EditRequest], editor: REP) -> KeyComparison:
    """Edits every request with ``editor`` (REP on some method) and looks at the keys under the wrapped patch and under REP's."""
    if any(r.subject is None for r in requests):
        raise InputError("keys are read at the subject; give the key 'subject' of every request")
    patches = editor.edit_each(lm, requests)
    job = LocateThenEditRun(editor.inner(lm), lm, [[r] for r in requests], (), Tail)
    job.place()
    rows = [row for block in job.blocks for row in _block(lm, job, patches, block)]
    return KeyComparison(rows, limits(lm, requests, [split_patch(p)[0] for p in patches]))


def _block(lm: LM, job: LocateThenEditRun, patches: Sequence[Patch], block: int) -> list[dict[str, Any]]:
    """Every surface's ratio at one block, under the wrapped patches and under REP's."""
    site = Site(block, POINT)
    asked = [(i, kind, place) for i in range(len(patches)) for kind, place in _places(lm, job.requests, i, job.before)]
    places, owner = [place for _, _, place in asked], torch.tensor([i for i, _, _ in asked], device=lm.device)
    second = job.editor.prepare(lm).get(site)
    ratios = []
    for adapted in (False, True):
        ops = [[op for op in p.ops if adapted or op.kind != "key_adaptor"] for p in patches]
        keys, _ = job.read_at(places, site, ops, owner)
        mean = job.average(job.read_keys(block, ops)[0])
        opened = torch.zeros(len(keys), dtype=torch.bool, device=keys.device)
        if adapted:
            keys, opened = _moved(keys, patches, site, owner)
        direction = whitened(second, mean)  # C⁻¹k*
        whole = (direction * mean.double()).sum(1)
        ratios.append(((keys.double() * direction[owner]).sum(1) / whole[owner]).tolist())
    return [
        {"case": job.requests[i].id, "block": block, "kind": kind, "before": round(a, 6), "after": round(b, 6), "opened": bool(o)}
        for (i, kind, _), a, b, o in zip(asked, *ratios, opened.tolist(), strict=True)
    ]


def _moved(keys: Tensor, patches: Sequence[Patch], site: Site, owner: Tensor) -> tuple[Tensor, Tensor]:
    """(k̂ of each key under its own patch, whether the gate was open)."""
    out, opened = keys.clone(), torch.zeros(len(keys), dtype=torch.bool, device=keys.device)
    for i, patch in enumerate(patches):
        mine = (owner == i).nonzero().squeeze(1)
        op: Op = next(op for op in patch.ops if op.site == site and op.kind == "key_adaptor")
        p = {k: t.to(keys.device)[None] for k, t in op.tensors.items()}
        k = keys[mine].to(p["a"].dtype)
        open_ = gate_logit(p, k[None])[0, :, 0] > threshold(op.settings["tau"]) if op.settings["gate"] else torch.ones_like(mine).bool()
        b = patch.state[f"{STATE}{site.block}.b"].to(k)
        b = b[0] if b.ndim == 3 else b
        change = projected({"a": p["a"][0, 0], "b": b}, k, op.settings["constant"])
        out[mine] = torch.where(open_[:, None], k + change, k).to(keys.dtype)
        opened[mine] = open_
    return out, opened


def _places(lm: LM, requests: Sequence[EditRequest], i: int, before: Sequence[str]) -> list[tuple[str, LocatedText]]:
    """(kind, place): the request's own surfaces, then keys that are none of its business."""
    request, found = requests[i], surfaces.make_surfaces(lm, requests[i])

    def end(name: str | None = None) -> int:
        return end_of(request, name, "subject_last", "keys")

    texts: list[tuple[str, str, int]] = [("prompt", request.prompt, end())]
    for kind in FACT[1:5]:
        texts += [(kind, surfaces.fill(request, name), end(name)) for name in getattr(found, kind)]
    heads = [*(("prefixed", h) for h in prefixes(lm, ((10, 5),), 0)[1:]), *(("long", fitting(lm, p)) for p in found.passages_unseen)]
    texts += [(kind, head + request.prompt, len(head) + end()) for kind, head in heads if head]
    step = max(1, len(strangers()) // OTHERS)
    names = strangers()[i % step :: step][:OTHERS]
    texts += [(_OTHER[0], surfaces.fill(request, name), end(name)) for name in names]
    out = list(zip([kind for kind, _, _ in texts], placed(lm, [t for _, t, _ in texts], [s for _, _, s in texts]), strict=True))
    others = [requests[(i + j) % len(requests)] for j in range(1, min(OTHERS, len(requests) - 1) + 1)]
    return [*out, *((_OTHER[1], original(lm, other, "subject_last", "keys")) for other in others)]


def limits(lm: LM, requests: Sequence[EditRequest], patches: Sequence[Patch]) -> list[dict[str, Any]]:
    """β_min and β_max of each patch on its own prompt, s in steps of 1 / `STEPS`; all scaled patches in one batch a case."""
    out = []
    for request, patch in zip(requests, patches, strict=True):
        stacks = [(dataclasses.replace(patch.scale(s / STEPS), replaces=()),) for s in range(STEPS + 1)]
        batch = lm.batch(lm.encode([request.prompt] * len(stacks)))
        said = lm.logits(batch, stacks, range(len(stacks)))[:, -1].argmax(-1).tolist()
        wanted = lm.encode([request.prompt], [request.continuation])[0].target[0]
        failing = [s for s, token in enumerate(said) if token != wanted]
        moved = [s for s, token in enumerate(said) if token != said[0]]
        least = None if said[-1] != wanted else (failing[-1] + 1) / STEPS if failing else 0.0
        out.append({"case": request.id, "beta_min": least, "beta_max": (moved[0] - 1) / STEPS if moved else 1.0})
    return out


def summary(found: KeyComparison) -> list[dict[str, Any]]:
    """A row a block and kind: n, quantiles of the ratios, how many gates opened, and the share of keys where the lemmas want them
    (surfaces of the fact at or above their case's β_min, others at or below its β_max), before and after."""
    limit = {row["case"]: row for row in found.limits}
    out = []
    for block in sorted({r["block"] for r in found.rows}):
        for kind in (*FACT, *_OTHER):
            mine = [r for r in found.rows if r["block"] == block and r["kind"] == kind]
            if not mine:
                continue
            row: dict[str, Any] = {"block": block, "kind": kind, "n": len(mine), "opened": sum(r["opened"] for r in mine) / len(mine)}
            for when in ("before", "after"):
                values = torch.tensor([r[when] for r in mine], dtype=torch.float64)
                row[when] = [round(float(q), 4) for q in values.quantile(torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95], dtype=torch.float64))]
                good = [_holds(r[when], kind, limit[r["case"]]) for r in mine]
                row[f"{when} holds"] = sum(good) / len(good)
            out.append(row)
    return out


def _holds(ratio: float, kind: str, limit: dict[str, Any]) -> bool:
    if kind in _OTHER:
        return bool(abs(ratio) <= limit["beta_max"])
    return limit["beta_min"] is not None and ratio >= limit["beta_min"] - 1e-9
