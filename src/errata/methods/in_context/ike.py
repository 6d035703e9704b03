"""IKE: ICE behind k demonstrations of how a new fact is used.

    New Fact: {prompt} {target}\\nPrompt: {query} {answer}\\n\\n   k times, then   New Fact: {prompt} {target}\\nPrompt: {query}

Source: Zheng et al., EMNLP 2023.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from errata.core.bank import Stack
from errata.core.model import LM
from errata.errors import ConfigError
from errata.methods.in_context.demonstrations import choose
from errata.methods.in_context.ice import ICE
from errata.methods.in_context.text import blank, block_for
from errata.request import EditRequest


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

    TUNES: ClassVar[dict[str, Any]] = {**ICE.TUNES, "k": (0, 4)}

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

    def choose_demonstrations(self, lm: LM, problems: Sequence[Sequence[EditRequest]], on: Stack) -> list[list[str]]:
        block_for(lm, self)
        earlier = [r for patch in on for r in patch.requests]
        return [choose(lm, self, requests, earlier) for requests in problems]
