"""What the editors that put text in front of the prompt share: facts as text, the room there is for them, one patch or many."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from errata.core.bank import Stack, active_patches
from errata.core.chat import user_words
from errata.core.lanes import Progress
from errata.core.model import LM
from errata.core.patch import Patch
from errata.core.tail import Tail
from errata.errors import ConfigError
from errata.methods.base import Editor
from errata.methods.in_context.text import beside, blank
from errata.request import EditRequest


@dataclass(frozen=True)
class InContextEditor(Editor):
    """Hyper-parameters of editors that put text in front of the prompt.

    fact     a fact as text, from {prompt} and {target}
    cue      text between the facts and the prompt
    budget   tokens of context at most, of the whole stack; None: half of the model's positions.  The newest facts that fit are
             shown, then demonstrations; a fact that no longer fits is without effect
    """

    TUNES: ClassVar[dict[str, Any]] = {"fact": ("{prompt} {target}.", "{prompt} {target}.\n"), "cue": ("",)}

    fact: str = "New Fact: {prompt} {target}\n"
    cue: str = "Prompt: "
    budget: int | None = None

    def __post_init__(self) -> None:
        blank(self.name, "fact", self.fact, ("prompt", "target"))
        if self.budget is not None and self.budget < 1:
            raise ConfigError(f"{self.name}: budget must be at least 1 token, not {self.budget}")

    def context_budget(self, lm: LM) -> int:
        """The budget on this model."""
        return self.budget or (1024 if lm.context_length is None else lm.context_length // 2)

    def facts(self, lm: LM, requests: Sequence[EditRequest]) -> list[str]:
        """Facts as text: of a prompt in the chat template, the user's words."""
        asked = [(user_words(lm.tokenizer, r.prompt), r) for r in requests]
        templates = [beside(self.fact, ("prompt", "target"), words, r.continuation) for words, r in asked]
        return [fact.format(prompt=words, target=r.target.strip()) for fact, (words, r) in zip(templates, asked, strict=True)]

    def edit(
        self, lm: LM, requests: Sequence[EditRequest], *, on: Stack = (), runner: Any = Tail, progress: Progress | None = None
    ) -> Patch:
        """One patch of all facts."""
        self.require_requests([requests])
        patch = self._patches(lm, [list(requests)], active_patches(tuple(on)))[0]
        if progress is not None:
            progress(1, 0, 0.0)
        return patch

    def edit_each(
        self, lm: LM, requests: Sequence[EditRequest], *, on: Stack = (), runner: Any = Tail, progress: Progress | None = None
    ) -> list[Patch]:
        """A patch for each request, as if it were made alone on ``on``."""
        patches = self._patches(lm, [[r] for r in requests], active_patches(tuple(on)))
        if progress is not None and requests:
            progress(1, 0, 0.0)
        return patches

    @abstractmethod
    def _patches(self, lm: LM, problems: Sequence[Sequence[EditRequest]], on: Stack) -> list[Patch]:
        """A patch for each list of requests."""
