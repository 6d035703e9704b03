"""Which names are nearest to a subject, by the model's own states, and what the base says about them.

The candidates are names of the subject's kind.  All of them are put in the subject's place and run once.  Two numbers come of that:

    similarity  cosine of the states at the prompt's last token, the output of the middle block, minus the candidates' mean.  That is
                where the model knows what is asked of whom, and what an edit of a later block acts on
    confidence  the probability of the base's first token there
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from errata.contrast.names import Names, plain, share
from errata.core.decode import PrefilledBatch, decode, detokenize
from errata.core.model import LM, STOPS
from errata.core.patch import Site
from errata.core.read import activation_hooks, read_activations
from errata.request import EditRequest, fill
from errata.storage import cache_folder, write_atomic
from errata.subjects import names_in

_CANDIDATES = 96  # names that are looked at
_ENOUGH = 40  # names of one kind, below which a subject's other kinds are looked at as well
_SAMPLE = 6  # names of each kind that stand for it
_KINDS = 2  # kinds taken for a subject that no list holds
_NEAREST = 3  # of a kind's sample, whose mean similarity is the kind's
_ASKED = "Let us talk about"  # before a name alone: a text's first token has a state of its own, whatever it is
_ROWS = 64  # of a pass


@dataclass(frozen=True)
class Candidate:
    """A name in the subject's place."""

    name: str
    prompt: str
    similarity: float
    confidence: float


class Nearest:
    """Names of the subject's kind in its place, nearest first (``found``), and what the base says about some of them (`answers`).

    None stands in one of the texts ``banned``, in the subject or the target, and none holds the subject.
    """

    def __init__(self, lm: LM, request: EditRequest, names: Names, banned: Sequence[str] = ()) -> None:
        assert request.subject is not None
        own = _pool(lm, request, names, (*banned, request.subject, request.target))
        self.found: list[Candidate] = []
        if not own:
            return
        prompts = [fill(request, name) for name in own]
        states, first = self._look(lm, [*prompts, request.prompt])
        states = torch.nn.functional.normalize(states - states[:-1].mean(0), dim=1)
        similar = (states[:-1] @ states[-1]).tolist()
        found = [Candidate(*row) for row in zip(own, prompts, similar, first[:-1].tolist(), strict=True)]
        self.found = sorted(found, key=lambda c: (-c.similarity, c.name))

    @torch.no_grad()
    def _look(self, lm: LM, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """(states [n, d] at each prompt's last token in the middle block, probability [n] of the base's first token)."""
        site, rows = Site(lm.nearest_block(lm.depth // 2)), lm.encode(prompts)
        order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
        states: list[Tensor] = []
        self._parts: list[PrefilledBatch] = []
        self._place: dict[str, tuple[int, int]] = {}  # of a prompt: its batch and its row there

        def keep(_: Site, __: Tensor, y: Tensor) -> None:
            states.append(y[:, -1].float())

        for start in range(0, len(order), _ROWS):
            part = order[start : start + _ROWS]
            self._place |= {prompts[i]: (len(self._parts), at) for at, i in enumerate(part)}
            batch = lm.batch([rows[i] for i in part]).to(lm.device)
            with activation_hooks(lm, [site], len(part), keep, stop=False):
                self._parts.append(PrefilledBatch.prefill(lm, batch, lm.plan([()], None, len(part))))
        first = torch.cat([part.next_token_logits.float().softmax(-1).amax(-1) for part in self._parts])
        back = torch.tensor(sorted(range(len(order)), key=order.__getitem__), device=lm.device)
        return torch.cat(states)[back], first[back]

    @torch.no_grad()
    def answers(self, some: Sequence[Candidate], tokens: int) -> list[str]:
        """The base's greedy answers of up to ``tokens`` tokens; they go on from what has run."""
        out: dict[str, str] = {}
        for number, part in enumerate(self._parts if some else ()):
            mine = [c.prompt for c in some if self._place[c.prompt][0] == number]
            if mine:
                rows = torch.tensor([self._place[prompt][1] for prompt in mine], device=part.ids.device)
                said = decode(part.select(rows), tokens, STOPS)
                out |= {prompt: detokenize(part.lm.tokenizer, ids, STOPS) for prompt, ids in zip(mine, said, strict=True)}
        return [out[c.prompt] for c in some]


def _pool(lm: LM, request: EditRequest, names: Names, banned: Sequence[str]) -> list[str]:
    """At most `_CANDIDATES` names.  Where a kind holds more, half are those whose tokens are most like the subject's, half any."""
    subject = request.subject or ""
    kinds = names.kinds_of(subject) or _kinds_by_state(lm, subject, names)
    if kinds and len(names.kinds[kinds[0]]) >= _ENOUGH:  # lists are in order: the well-known names come first
        kinds = kinds[:1]
    spelt = {plain(name): name for kind in reversed(kinds) for name in names.kinds[kind]}  # "the Netherlands" and "Netherlands" are one
    every = list(spelt.values())
    barred = {name for text in banned for name in names_in(text, every)}
    every = [name for name in every if name not in barred and not names_in(name, (subject, request.target))]
    mixed = sorted(every, key=share)
    if len(mixed) <= _CANDIDATES:
        return mixed
    alike = _by_tokens(lm, subject, mixed)[: _CANDIDATES // 2]
    return list(dict.fromkeys([*alike, *mixed]))[:_CANDIDATES]


def _by_tokens(lm: LM, subject: str, names: Sequence[str]) -> list[str]:
    """Names sorted by the cosine of their mean input embedding with the subject's: cheap, and enough to prefer names of one language."""
    table = lm.hf.get_input_embeddings().weight
    rows = lm.tokenizer([f"{_ASKED} {name}" for name in (subject, *names)], add_special_tokens=False)["input_ids"]
    skipped = len(lm.tokenizer(_ASKED, add_special_tokens=False)["input_ids"])
    means = torch.stack([table[torch.tensor(row[skipped:] or row, device=table.device)].float().mean(0) for row in rows])
    means = torch.nn.functional.normalize(means - means.mean(0), dim=1)
    order = (means[1:] @ means[0]).argsort(descending=True, stable=True).tolist()
    return [names[i] for i in order]


def _kinds_by_state(lm: LM, subject: str, names: Names) -> tuple[str, ...]:
    """The kinds whose sample is nearest to a subject that no list holds."""
    if len(names.kinds) <= _KINDS:
        return tuple(names.kinds)
    kinds, states = _samples(lm, names)
    own = _named(lm, [subject])[0]
    centre = states.mean((0, 1))
    similar = torch.nn.functional.cosine_similarity(states - centre, (own - centre)[None, None], dim=-1)  # [kinds, sample]
    best = similar.topk(min(_NEAREST, similar.shape[1]), dim=1).values.mean(1)
    return tuple(kinds[i] for i in best.topk(_KINDS).indices.tolist())


def _samples(lm: LM, names: Names) -> tuple[list[str], Tensor]:
    """(kinds, states [kinds, sample, d] of some names of each); kept on the disk, as a large model takes a while."""
    from safetensors import SafetensorError
    from safetensors.torch import load, save

    key = "contrast kinds", names.digest
    kinds = [kind for kind, own in names.kinds.items() if len(own) >= _SAMPLE]
    if key not in lm.base_cache:
        path = cache_folder() / "contrast" / f"{lm.fingerprint}-{names.digest}.safetensors"
        try:
            lm.base_cache[key] = load(path.read_bytes())["states"].float().to(lm.device)
        except (OSError, SafetensorError, KeyError):
            asked = [name for kind in kinds for name in sorted(names.kinds[kind], key=share)[:_SAMPLE]]
            states = _named(lm, asked)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, save({"states": states.half().cpu().contiguous()}))
            lm.base_cache[key] = states.half().float()
    return kinds, lm.base_cache[key].view(len(kinds), _SAMPLE, -1)


def _named(lm: LM, names: Sequence[str]) -> Tensor:
    """[n, d] states at names' last token, behind a neutral text, from a quarter of the depth."""
    site = Site(lm.nearest_block(lm.depth // 4 - 1))
    out: Tensor = read_activations(lm, lm.encode([f"{_ASKED} {name}" for name in names]), [site])[site][1]
    return out
