"""What else an edit moved: the watch half of its neighbours (`errata.contrast`), asked of the base and under the edit.

No editor is ever shown them, so they say whether an edit keeps what it was not told to keep.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from errata.contrast.contrast import find
from errata.contrast.names import COUNT, Names
from errata.core.bank import Stack
from errata.core.model import LM
from errata.request import LOCAL_KINDS, Case, EditRequest, Probe
from errata.score.compare import Comparison, compare
from errata.score.evaluator import Progress
from errata.score.match import first_word, normalise

_TOKENS = 6  # of an answer
_PARAGRAPH = 32  # tokens of a free one
_QUESTIONS = 4


@dataclass(frozen=True)
class Watched:
    """One neighbour.

    kept    the answer's first word is the same; of a paragraph, its whole first sentence
    moved   total variation of the next token, 0 to 1
    form    how it was asked: as the edit's prompt is ("same"), as a question, or for a free paragraph
    """

    subject: str
    prompt: str
    before: str
    after: str
    kept: bool
    moved: float
    form: str = "same"


@dataclass(frozen=True)
class Kept:
    """What became of a request's neighbours, worst first; ``looked_at``: candidates they were taken from, 0 where it has no subject."""

    request: EditRequest
    watched: tuple[Watched, ...]
    looked_at: int

    @property
    def of(self) -> int:
        """Neighbours asked as the edit's prompt asks."""
        return sum(w.form == "same" for w in self.watched)

    @property
    def count(self) -> int:
        """Those of them that kept their answers."""
        return sum(w.kept for w in self.watched if w.form == "same")

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        lost = [
            {"prompt": w.prompt, "before": w.before, "after": w.after, "moved": round(w.moved, 4), "form": w.form}
            for w in self.watched
            if not w.kept
        ]
        return {"kept": self.count, "of": self.of, "otherwise": len(self.watched) - self.of, "looked_at": self.looked_at, "lost": lost}

    def __str__(self) -> str:
        if not self.of:
            why = "the request names no subject" if self.request.subject is None else "no neighbour is answered with confidence"
            return f"neighbours: none to watch, for {why}"
        return f"neighbours kept: {self.count} of {self.of}"


def watch(
    lm: LM,
    requests: Sequence[EditRequest],
    stacks: Sequence[Stack],
    *,
    count: int = COUNT,
    names: Names | None = None,
    otherwise: bool = False,
) -> list[Kept]:
    """The watch half of each request, asked of the base and under its stack.  What a patch of the stack writes, or was trained on, is no
    neighbour.  ``otherwise``: also a few in other forms (`in_other_forms`)."""
    out = []
    for request, stack in zip(requests, stacks, strict=True):
        found = find(lm, request, count=count, names=names, exclude=("\n".join(_trained(stack, request)),))
        asked = [(n.subject, n.prompt, "same") for n in found.watch]
        asked += in_other_forms([(n.subject, n.prompt) for n in found.watch]) if otherwise else []
        own = [
            Watched(subject, prompt, c.before.text, c.after.text, _kept(form, c.before.text, c.after.text), c.moved, form)
            for (subject, prompt, form), c in zip(asked, _sides(lm, asked, stack), strict=True)
        ]
        out.append(Kept(request, tuple(sorted(own, key=lambda w: (w.kept, -w.moved))), found.looked_at))
    return out


def _sides(lm: LM, asked: Sequence[tuple[str, str, str]], stack: Stack) -> list[Comparison]:
    """Base and edited answers; a paragraph has more tokens, so it is asked by itself."""
    out: dict[str, Comparison] = {}
    for free, tokens in ((False, _TOKENS), (True, _PARAGRAPH)):
        prompts = [prompt for _, prompt, form in asked if (form == "paragraph") == free]
        out |= dict(zip(prompts, compare(lm, prompts, ((), stack), tokens), strict=True)) if prompts else {}
    return [out[prompt] for _, prompt, _ in asked]


def in_other_forms(asked: Sequence[tuple[str, str]]) -> list[tuple[str, str, str]]:
    """(subject, prompt, form) of a few (subject, prompt) pairs: the first ones as questions, the very first for a free paragraph.  A prompt
    that is a question already, or a rendered chat, is not made into one."""
    plain = [(subject, prompt) for subject, prompt in asked if not prompt.rstrip().endswith("?") and "\n" not in prompt]
    questions = [(subject, f"Question: {prompt.rstrip()} what?\nAnswer:", "question") for subject, prompt in plain[:_QUESTIONS]]
    free = [(subject, f"Here is what an encyclopedia says about {subject}: {subject}", "paragraph") for subject, _ in asked[:1]]
    return [*questions, *free]


def _kept(form: str, before: str, after: str) -> bool:
    return normalise(before) == normalise(after) if form == "paragraph" else first_word(before) == first_word(after)


def add_watch_probes(
    lm: LM, cases: Sequence[Case], count: int = COUNT, *, together: bool = False, progress: Progress | None = None
) -> list[Case]:
    """Cases with up to ``count`` probes of kind "watch" each: the watch half of their first request.

    None is about a subject that its case asks about or, where cases are edited ``together`` (on one stack), that another edits.
    """
    out = []
    for case in cases:
        own = {r.prompt for r in case.requests}
        others = "\n".join(r.prompt for other in cases for r in other.requests if r.prompt not in own) if together else ""
        asked = "\n".join(p.prompt for p in case.probes if p.kind != "watch")
        found = find(lm, case.request, count=count, exclude=(asked, others))  # for single edits: the search that training made
        out.append(replace(case, probes=(*case.probes, *(Probe("watch", n.prompt) for n in found.watch))))
        if progress is not None:
            progress(len(out), len(cases))
    return out


def to_watch(asked: int | None, cases: Sequence[Case]) -> int:
    """How many neighbours of a case are watched: as many as were ``asked`` for, else `COUNT` where no case brings a probe of what should
    stay, so that nothing else would say what an edit moved."""
    local = any(probe.kind in LOCAL_KINDS for case in cases for probe in case.probes)
    return (0 if local else COUNT) if asked is None else asked


def _trained(stack: Stack, request: EditRequest) -> Iterable[str]:
    for patch in stack:
        for own in patch.requests:
            if own.id != request.id:  # what it was itself shown is seen to by `find`
                yield from (own.prompt, *own.paraphrases, *(prompt for prompt, _ in own.unrelated))
