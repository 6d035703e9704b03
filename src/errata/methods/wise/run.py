"""One run of WISE: the site, what the edits go on from, what stays underneath, and the patch that comes of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from errata.config import to_dict
from errata.core.bank import Stack
from errata.core.families import linear_sizes
from errata.core.lanes import Progress
from errata.core.model import LM
from errata.core.patch import Patch
from errata.methods.wise.memory import Memories
from errata.methods.wise.texts import Texts, contexts
from errata.methods.wise.training import Training
from errata.request import EditRequest


class WISERun:
    """One call: the site, what the edits go on from, what stays underneath."""

    def __init__(self, editor: Any, lm: LM, on: Stack, runner: Any) -> None:
        self.editor, self.lm, self.runner, self.site = editor, lm, runner, editor.target_site(lm)
        inner, outer = linear_sizes(lm.module(self.site))
        self.shape, self.act = (outer, inner), editor.act(lm)
        self.settings = to_dict(editor) | {"layer": self.site.block}
        mine = [p for p in on if p.method == editor.name and editor.made_with(p.settings, self.settings) and p.ops]
        self.before = mine[-1] if mine else None
        self.under = tuple(p for p in on if p is not self.before)
        self.memories = Memories(editor, outer * inner)
        if self.before is not None:
            self.memories = self.memories.resumed(self.before.ops[0], int(self.before.running("edits", 1, whole=True)))
        self.contexts = contexts(lm, editor.contexts)

    def texts(self, request: EditRequest) -> Texts:
        return Texts.of(self.lm, request, self.contexts, self.editor.end, self.editor.contrast > 0)

    def train(self, lm: LM, texts: list[Texts], memories: Memories, progress: Progress | None) -> list[tuple[Memories, dict[str, Any]]]:
        return Training(self.editor, lm, texts, memories, self.site, self.shape, self.act, self.under, self.runner).run(progress)

    def patch(self, requests: Sequence[EditRequest], memories: Memories, notes: dict[str, Any], seconds: float) -> Patch:
        op = memories.op(self.site, self.shape, self.act)
        state = {"edits": torch.tensor([memories.edits])}
        notes = {**notes, "seconds": round(seconds, 4)}
        return Patch.continued_from(self.before, self.editor.name, self.settings, self.lm.fingerprint, requests, [op], state, notes)
