"""ICE: the new fact stands in the context, no weight changes.

    New Fact: {prompt} {target}\\nPrompt: {query}

In-context editing without demonstrations is the baseline of Zheng et al. 2023 (IKE).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from errata.config import to_dict
from errata.core.bank import Stack
from errata.core.model import LM
from errata.core.patch import Patch
from errata.methods.in_context.editor import InContextEditor
from errata.methods.in_context.text import context_op
from errata.request import EditRequest


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
        for requests, shown in zip(problems, self.choose_demonstrations(lm, problems, on), strict=True):
            op = context_op(lm, self, shown, self.facts(lm, requests))
            out.append(Patch(self.name, to_dict(self), lm.fingerprint, tuple(requests), (op,)))
        return out

    def choose_demonstrations(self, lm: LM, problems: Sequence[Sequence[EditRequest]], on: Stack) -> list[list[str]]:
        """The demonstrations of each patch; none for ICE."""
        return [[] for _ in problems]
