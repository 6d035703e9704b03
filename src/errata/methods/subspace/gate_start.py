"""A gate in closed form: the ridge solution that is open on the edit and shut on what should stay.

    v = argmin_v Σ_i c_i (v·x_i − y_i)² + λ |v|²,     x_i = h_i / rms(h_i) [d],   y_i = `_OPEN` where it opens, `_SHUT` elsewhere

h_i are the base's states at the positions an edit touches.  Where gates open at the subject, y_i is `_OPEN` on its last token, in the
prompt alone and behind short texts, and `_SHUT` on every other token, on the same texts about its neighbours, and on common text.  Else it
is `_OPEN` from the subject's last token on (what stands before is the same whoever is asked about) to the target's last but one (at its
last the gate is shut: what follows is the model's own again), and `_SHUT` on neighbours.  c_i gives what opens and what stays shut the
same weight, and of the latter common text a half.

A random start leaves every gate half open, and some dozens of steps at a small rate only close it in part: what is written through gates of
a tenth is then large, and a gate of a twenty-fifth on a neighbour lets a third of it through.  From the ridge solution the gate has only to
be kept, and the rest is learnt.

Where gates open at the subject they stay there (``train_gates=False``).  Adam moves every entry of v by about the rate at every step,
whatever the slope, so fifty steps move v·x by as much as the solution does, and along what all states have in common: of 857 tokens of
other facts' prompts a solved gate opened on one in 10,000, a trained one on one in 220, at like reliability and generality (SmolLM2, 12
edits of ZsRE; Gemma 3: one in 1,500 and in 530; scripts/gate_openings.py, docs/results/subject-gates.md).  On a stack of hundreds that is
an open gate or two on every token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from errata.core.window import beginnings
from errata.text.corpora import open_corpus

_OPEN, _SHUT = 2.0, -6.0  # logits: a gate of 0.88, and of 0.0025
_RIDGE = 0.03  # λ as a part of the mean |x|², which is d
_SPREAD = 0.1  # of the random start, which stays between the bases of a patch
_EPS = 1e-6
_TEXTS, _WORDS, _MOST = 32, 16, 512  # of common text, and tokens of each at most


@dataclass
class _States:
    """States that make gates: {block: [n, d]}, which of them belong to a problem ([n] bool), and where a gate opens ([n] bool)."""

    at: Mapping[int, Tensor]
    of: Callable[[int], Tensor]
    opens: Tensor
    common: bool = False


def ridge_gates(training: Any) -> dict[int, dict[int, Tensor]]:
    """{problem: {block: v [d]}}: of every problem where gates open at the subject, else of those that say what should stay
    (``contrast``, ``unrelated``)."""
    subject, stays = training.editor.at_subject, training.irrelevant_states()
    problems = range(len(training.problems)) if subject else [] if stays is None else stays[2].tolist()
    if not problems:
        return {}
    parts = [_own(training)] + ([] if stays is None else [_stays(*stays)]) + ([_common(training)] if subject else [])
    return {p: _solve(parts, p) for p in problems}


def _own(training: Any) -> _States:
    """Of the edits themselves."""
    begins = [0 if training.editor.at_subject else tokens[0] for tokens in training.opens]
    states, text = training.states_from(training.encoded, begins)
    rows = zip(training.encoded, begins, training.opens, strict=True)
    opens = torch.tensor([t in tokens for e, begin, tokens in rows for t in range(begin, len(e.ids))], device=text.device)
    owner = training.owner[text]
    return _States(states, lambda problem: owner == problem, opens)


def _stays(states: Mapping[int, Tensor], where: Tensor, owner: Tensor) -> _States:
    """Of what requests say should stay, from `Training.irrelevant_states`."""
    there = where.squeeze(-1)
    owner = owner[:, None].expand_as(there)[there]
    return _States({b: h[there] for b, h in states.items()}, lambda problem: owner == problem, torch.zeros_like(owner, dtype=torch.bool))


def _common(training: Any) -> _States:
    """Of common text, without the texts that name a problem's subject."""
    texts = [" ".join(text.split()[:_WORDS]) for text in open_corpus("bundled").texts[:_TEXTS]]
    states, text = training.states_from(beginnings(training.lm, texts, _MOST), [0] * len(texts))

    def of(problem: int) -> Tensor:
        names = {name.lower() for r in training.problems[problem] for name in (r.subject, *r.aliases) if name}
        return torch.tensor([not any(name in own.lower() for name in names) for own in texts], device=text.device)[text]

    return _States(states, of, torch.zeros_like(text, dtype=torch.bool), common=True)


def _solve(parts: Sequence[_States], problem: int) -> dict[int, Tensor]:
    """{block: v [d]} of a problem, by the dual: n is some hundreds, d may be thousands."""
    mine = [part.of(problem) for part in parts]
    wanted = torch.cat([part.opens[own] for part, own in zip(parts, mine, strict=True)])
    common = torch.cat([torch.full_like(part.opens[own], part.common) for part, own in zip(parts, mine, strict=True)])
    group = torch.where(wanted, 0, 1 + common.long())
    sizes = torch.bincount(group, minlength=3).double()
    shares = torch.tensor([1.0, 0.5, 0.5] if sizes[2] else [1.0, 1.0, 0.0], device=sizes.device, dtype=sizes.dtype)
    weight = (shares / sizes.clamp_min(1))[group] * len(group) / 2
    y = torch.where(wanted, _OPEN, _SHUT).double()
    out = {}
    for block, states in parts[0].at.items():
        x = torch.cat([part.at[block][own] for part, own in zip(parts, mine, strict=True)]).double()
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + _EPS)
        gram = x @ x.T + torch.diag(_RIDGE * x.square().sum(-1).mean() / weight)
        out[block] = (x.T @ torch.linalg.solve(gram, y)).to(states)
    return out


def set_gates(params: Mapping[str, Tensor], found: Mapping[int, Mapping[int, Tensor]], blocks: Sequence[int]) -> dict[str, Tensor]:
    """Parameters [E, blocks, …] with the gates' V [E, blocks, r, d] about these directions."""
    if not found:
        return dict(params)
    gates = params["V"].clone()
    for problem, own in found.items():
        for i, block in enumerate(blocks):
            gates[problem, i] = gates[problem, i] * _SPREAD + own[block]
    return {**params, "V": gates}
