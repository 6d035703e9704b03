"""ICE and IKE: the new fact stands in the context, no weight changes.

ICE   New Fact: {prompt} {target}\\nPrompt: {query}
IKE   the same behind k demonstrations of how a new fact is used (Zheng et al. 2023)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from errata.config import to_dict
from errata.core.bank import Stack, live
from errata.core.lanes import Progress
from errata.core.model import LM
from errata.core.patch import Patch
from errata.core.tail import Tail
from errata.errors import ConfigError
from errata.methods.base import Editor
from errata.methods.in_context.demonstrations import choose
from errata.methods.in_context.text import blank, block_for, context_op
from errata.request import EditRequest


@dataclass(frozen=True)
class InContextEditor(Editor):
    """Hyper-parameters of editors that put text in front of the prompt.

    fact     a fact as text, from {prompt} and {target}
    cue      text between the facts and the prompt
    budget   tokens of context at most, of the whole stack; None: half of the model's positions.  The newest facts that fit are
             shown, then demonstrations; a fact that no longer fits is without effect
    """

    fact: str = "New Fact: {prompt} {target}\n"
    cue: str = "Prompt: "
    budget: int | None = None

    def __post_init__(self) -> None:
        blank(self.name, "fact", self.fact, ("prompt", "target"))
        if self.budget is not None and self.budget < 1:
            raise ConfigError(f"{self.name}: budget must be at least 1 token, not {self.budget}")

    def room(self, lm: LM) -> int:
        """The budget on this model."""
        return self.budget or (1024 if lm.window is None else lm.window // 2)

    def facts(self, requests: Sequence[EditRequest]) -> list[str]:
        return [self.fact.format(prompt=r.prompt.rstrip(), target=r.target.strip()) for r in requests]

    def edit(
        self, lm: LM, requests: Sequence[EditRequest], *, on: Stack = (), runner: Any = Tail, progress: Progress | None = None
    ) -> Patch:
        """One patch of all facts."""
        self.require_requests([requests])
        patch = self._patches(lm, [list(requests)], live(tuple(on)))[0]
        if progress is not None:
            progress(1, 0, 0.0)
        return patch

    def edit_each(
        self, lm: LM, requests: Sequence[EditRequest], *, on: Stack = (), runner: Any = Tail, progress: Progress | None = None
    ) -> list[Patch]:
        """A patch for each request, as if it were made alone on ``on``."""
        patches = self._patches(lm, [[r] for r in requests], live(tuple(on)))
        if progress is not None and requests:
            progress(1, 0, 0.0)
        return patches

    def _patches(self, lm: LM, problems: Sequence[Sequence[EditRequest]], on: Stack) -> list[Patch]:
        """A patch for each list of requests."""
        raise NotImplementedError


@dataclass(frozen=True)
class ICE(InContextEditor):
    """In-context editing without demonstrations, the papers' baseline: the facts of a patch stand in front of every prompt.

    A patch stands on its own: in continual editing the stack's facts are shown one after another, in its order, and the newest
    that fit into ``budget`` count.  Nothing is retrieved, so every prompt is read behind the facts, related or not.
    """

    name: ClassVar[str] = "ice"
    paper: ClassVar[str] = "in-context editing without demonstrations, as in Zheng et al., EMNLP 2023 (IKE), and EasyEdit"
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {"almanac": {"fact": "{prompt} {target}.", "cue": ""}}  # dev; see IKE

    def _patches(self, lm: LM, problems: Sequence[Sequence[EditRequest]], on: Stack) -> list[Patch]:
        self.require_requests(problems)
        out = []
        for requests, shown in zip(problems, self.shown(lm, problems, on), strict=True):
            op = context_op(lm, self, shown, self.facts(requests))
            out.append(Patch(self.name, to_dict(self), lm.fingerprint, tuple(requests), (op,)))
        return out

    def shown(self, lm: LM, problems: Sequence[Sequence[EditRequest]], on: Stack) -> list[list[str]]:
        """The demonstrations of each patch; none for ICE."""
        return [[] for _ in problems]


@dataclass(frozen=True)
class IKE(ICE):
    """In-context knowledge editing.  Fields beside those of `ICE`:

    k               demonstrations of a fact; 0 is ICE
    mix             how many of copy : paraphrase : unrelated they are (paper: 1:3:4); () takes the nearest of any kind, as EasyEdit does
    shot            a demonstration as text, from {prompt}, {target} (its fact) and {query}, {answer} (copy: the same; paraphrase: a
                    paraphrase with the target; unrelated: another prompt with its own answer)
    demonstrations  where they come from: a JSONL file of requests with ``paraphrases`` and ``unrelated``, or "almanac" (64 facts of its
                    dev split, in the package); None: nothing but the requests of the stack and the request itself.  These last two
                    always serve too.  An editor sees no benchmark, so no question it is scored with
    encoder         a sentence encoder for the similarity (EasyEdit: all-MiniLM-L6-v2); None: the base's own states, the mean over
                    the text's tokens (or its last token, ``pool``) after ``block`` (None: 7/8 of the depth)

    Demonstrations are chosen for the fact when the patch is made, nearest last, and stand in front of every prompt.  The paper asks for
    k = 32 and chooses by cosine within its mix; EasyEdit's code has k = 16 and no mix.  The default is 16 with the paper's mix, in
    EasyEdit's wording.  A patch stands on its own (see `ICE`).
    """

    name: ClassVar[str] = "ike"
    paper: ClassVar[str] = "Zheng et al., EMNLP 2023 (IKE)"
    needs: ClassVar[frozenset[str]] = frozenset({"paraphrases?", "unrelated?"})
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        # chosen on dev: a model this small learns nothing from its context, plain sentences disturb it least
        "almanac": {"fact": "{prompt} {target}.", "cue": "", "shot": "{prompt} {target}.{query} {answer}.", "demonstrations": "almanac"}
    }

    k: int = 16
    mix: tuple[int, ...] = (1, 3, 4)
    shot: str = "New Fact: {prompt} {target}\nPrompt: {query} {answer}\n\n"
    demonstrations: str | None = None
    encoder: str | None = None
    block: int | None = None
    pool: Literal["mean", "last"] = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        blank(self.name, "shot", self.shot, ("prompt", "target", "query", "answer"))
        if self.k < 0:
            raise ConfigError(f"{self.name}: k must not be negative, not {self.k}")
        if self.mix and (len(self.mix) != 3 or min(self.mix) < 0 or not sum(self.mix)):
            raise ConfigError(f"{self.name}: mix holds three shares (copy, paraphrase, unrelated), or nothing; got {list(self.mix)}")

    def shown(self, lm: LM, problems: Sequence[Sequence[EditRequest]], on: Stack) -> list[list[str]]:
        block_for(lm, self)
        earlier = [r for patch in on for r in patch.requests]
        return [choose(lm, self, requests, earlier) for requests in problems]
