"""What GRACE and MELO share as editors: the texts with their keys, the site that is read, one patch or many."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from errata.config import to_dict
from errata.core.bank import Stack, active_patches
from errata.core.lanes import Progress
from errata.core.model import LM
from errata.core.patch import Op, Patch, Site
from errata.core.read import read_activations
from errata.core.tail import Tail
from errata.errors import ConfigError, PatchError
from errata.methods.base import Editor
from errata.methods.codebook.lookup import rounding_of
from errata.methods.codebook.store import KeyedText, pack
from errata.request import EditRequest


def read_keyed_texts(lm: LM, problems: Sequence[Sequence[EditRequest]], end: str, site: Site, on: Stack) -> list[list[KeyedText]]:
    """Prompts and paraphrases of each patch's requests, in order, with their keys under ``on``; one pass over all."""
    texts = [[(i, text, r.target + end) for i, r in enumerate(rs) for text in (r.prompt, *r.paraphrases)] for rs in problems]
    flat = [text for own in texts for text in own]
    if not flat:
        return []
    rows = lm.encode([text for _, text, _ in flat], [target for _, _, target in flat])
    x, y = read_activations(lm, rows, [site], at=[row.prompt_length - 1 for row in rows], on=on)[site]
    asked = iter([KeyedText(i, row, key, value) for (i, _, _), row, key, value in zip(flat, rows, x, y, strict=True)])
    return [[next(asked) for _ in own] for own in texts]


def check_site(lm: LM, name: str, block: int, point: str) -> Site:
    """The site on this model; `ConfigError` where there is none."""
    if point == "block":
        raise ConfigError(
            f"{name}: a key is what a linear reads, so the point must be a linear (mlp_down, attn_out or a path), not 'block'"
        )
    try:
        lm.check_site(Site(block, point))
    except PatchError as error:
        raise ConfigError(f"{name}: {error}") from None
    return Site(block, point)


class CodebookEditor(Editor):
    """What GRACE and MELO share as editors: one patch or many, made by the method's ``_make``."""

    rounding: float | None

    def resume_from(self, on: Stack, sites: Sequence[Site], settings: Mapping[str, Any]) -> tuple[Patch | None, Stack]:
        """(the last patch of the stack, where the edit goes on from it, what runs underneath)."""
        on = active_patches(tuple(on))
        last = on[-1] if on and on[-1].method == self.name else None
        same = last is not None and tuple(op.site for op in last.ops) == tuple(sites) and dict(last.ops[0].settings) == settings
        return (last, on[:-1]) if same and last is not None and self.can_resume(last) else (None, on)

    def can_resume(self, last: Patch) -> bool:
        """Whether more than sites and settings have to agree, and does."""
        return True

    def tolerance(self, lm: LM) -> float:
        """``rounding``, or what the model's dtype asks for."""
        return rounding_of(lm.dtype) if self.rounding is None else self.rounding

    def packed(
        self, lm: LM, before: Patch | None, requests: Sequence[EditRequest], ops: Sequence[Op], labels: Iterable[tuple[int, ...]],
        resolved: Mapping[str, Any], notes: Mapping[str, Any],
    ) -> Patch:  # fmt: skip
        """The patch; ``resolved``: settings as they were found out for this model."""
        settings = to_dict(self) | dict(resolved)
        return Patch.continued_from(before, self.name, settings, lm.fingerprint, requests, ops, {"labels": pack(labels)}, notes)

    def edit(
        self, lm: LM, requests: Sequence[EditRequest], *, on: Stack = (), runner: Any = Tail, progress: Progress | None = None
    ) -> Patch:
        """One patch with all requests, put in one after another; what they train, they train at once."""
        return self._make(lm, [list(requests)], on, runner, progress)[0]

    def edit_each(
        self, lm: LM, requests: Sequence[EditRequest], *, on: Stack = (), runner: Any = Tail, progress: Progress | None = None
    ) -> list[Patch]:
        """A patch a request, as if it were made alone on ``on``."""
        return self._make(lm, [[r] for r in requests], on, runner, progress)

    @abstractmethod
    def _make(self, lm: LM, problems: Sequence[list[EditRequest]], on: Stack, runner: Any, progress: Progress | None) -> list[Patch]:
        """A patch for each list of requests."""
