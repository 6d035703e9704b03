"""What else an edit moved: the watch half of its neighbours (`errata.contrast`), asked of the base and under the edit.

No editor is ever shown them, so they say whether an edit keeps what it was not told to keep.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from errata.contrast.contrast import COUNT, find
from errata.contrast.names import Names
from errata.core.bank import Stack
from errata.core.model import LM
from errata.request import EditRequest
from errata.score.compare import compare
from errata.score.match import normalise

_TOKENS = 6  # of an answer


@dataclass(frozen=True)
class Watched:
    """One neighbour.  ``kept``: the answer's first word is the same; ``moved``: total variation of the next token, 0 to 1."""

    subject: str
    prompt: str
    before: str
    after: str
    kept: bool
    moved: float


@dataclass(frozen=True)
class Kept:
    """What became of a request's neighbours, worst first; ``looked_at``: candidates they were taken from, 0 where it has no subject."""

    request: EditRequest
    watched: tuple[Watched, ...]
    looked_at: int

    @property
    def count(self) -> int:
        """Neighbours that kept their answers."""
        return sum(w.kept for w in self.watched)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        moved = [{"prompt": w.prompt, "before": w.before, "after": w.after, "moved": round(w.moved, 4)} for w in self.watched if not w.kept]
        return {"kept": self.count, "of": len(self.watched), "looked_at": self.looked_at, "lost": moved}

    def __str__(self) -> str:
        if not self.watched:
            why = "the request names no subject" if self.request.subject is None else "no neighbour is answered with confidence"
            return f"neighbours: none to watch, for {why}"
        return f"neighbours kept: {self.count} of {len(self.watched)}"


def watch(
    lm: LM, requests: Sequence[EditRequest], stacks: Sequence[Stack], *, count: int = COUNT, names: Names | None = None
) -> list[Kept]:
    """The watch half of each request, asked of the base and under its stack.  What a patch of the stack writes, or was trained on, is no
    neighbour."""
    out = []
    for request, stack in zip(requests, stacks, strict=True):
        found = find(lm, request, count=count, names=names, exclude=("\n".join(_trained(stack, request)),))
        sides = compare(lm, [n.prompt for n in found.watch], ((), stack), _TOKENS) if found.watch else []
        own = [
            Watched(n.subject, n.prompt, c.before.text, c.after.text, same_first_word(c.before.text, c.after.text), c.moved)
            for n, c in zip(found.watch, sides, strict=True)
        ]
        out.append(Kept(request, tuple(sorted(own, key=lambda w: (w.kept, -w.moved))), found.looked_at))
    return out


def _trained(stack: Stack, request: EditRequest) -> Iterable[str]:
    for patch in stack:
        for own in patch.requests:
            if own.id != request.id:  # what it was itself shown is seen to by `find`
                yield from (own.prompt, *own.paraphrases, *(prompt for prompt, _ in own.unrelated))


def same_first_word(a: str, b: str) -> bool:
    """Whether two answers begin with the same word, articles aside; two that say nothing are alike."""
    return normalise(a).partition(" ")[0] == normalise(b).partition(" ")[0]
