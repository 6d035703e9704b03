"""What GRACE and MELO share as editors: the texts with their keys, the site that is read, one patch or many."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from errata.config import to_dict
from errata.core.bank import Stack, active_patches
from errata.core.lanes import Progress
from errata.core.model import LM
from errata.core.patch import Op, Patch, Site
from errata.core.read import read_activations
from errata.core.tail import Tail
from errata.core.tokens import Encoded
from errata.errors import ConfigError, PatchError
from errata.methods.base import ContrastEditor
from errata.methods.codebook.lookup import rounding_of
from errata.methods.codebook.store import KeyedText, KeyStore
from errata.request import EditRequest


def read_keyed_texts(
    lm: LM, problems: Sequence[Sequence[EditRequest]], end: str, site: Site, on: Stack, contrast: bool = False
) -> list[list[KeyedText]]:
    """Prompts and paraphrases of each patch's requests, in order, with their keys under ``on``; one pass over all, and one over the
    prompts of their contrast pairs where these are asked for."""
    texts = [[(i, text, r.continuation + end) for i, r in enumerate(rs) for text in (r.prompt, *r.paraphrases)] for rs in problems]
    flat = [text for own in texts for text in own]
    if not flat:
        return []
    read, gave, rows = _keys(lm, [(text, target) for _, text, target in flat], site, on)
    asked = iter([KeyedText(i, row, key, value) for (i, _, _), row, key, value in zip(flat, rows, read, gave, strict=True)])
    keyed = [[next(asked) for _ in own] for own in texts]
    pairs = [[r.contrast for r in rs] for rs in problems]
    every = [pair for own in pairs for some in own for pair in some]
    if not contrast or not every:
        return keyed
    beside = [t.split([len(some) for own in pairs for some in own]) for t in _keys(lm, every, site, on)[:2]]
    each = iter(zip(*beside, strict=True))
    found = [[next(each) for _ in own] for own in pairs]
    return [[replace(t, beside=of[t.request]) for t in own] for own, of in zip(keyed, found, strict=True)]


def _keys(lm: LM, texts: Sequence[tuple[str, str]], site: Site, on: Stack) -> tuple[Tensor, Tensor, list[Encoded]]:
    """(what the site reads [N, I] and gives [N, O] at the last prompt token, the tokens) of (prompt, target)."""
    rows = lm.encode([text for text, _ in texts], [target for _, target in texts])
    read, gave = read_activations(lm, rows, [site], at=[row.prompt_length - 1 for row in rows], on=on)[site]
    return read, gave, rows


def check_site(lm: LM, name: str, block: int, point: str) -> Site:
    """The site on this model; `ConfigError` where there is none."""
    if point == "block":
        raise ConfigError(
            f"{name}: a key is what a linear reads, so the point must be a linear (mlp_down, attn_out or a path), not 'block'"
        )
    try:
        lm.check_site(Site(block, point))
    except PatchError as error:
        raise ConfigError(f"{name}: {error}; set the block, or point to another linear") from None
    return Site(block, point)


@dataclass(frozen=True, kw_only=True)
class RadiusEditor(ContrastEditor):
    """Contrast pairs limit radii: that of a key whose request brings some never reaches their prompts' keys, whatever comes later.

    contrast_share  a radius is at most this share of the distance to the nearest of them.  What would widen or move a key past its limit
                    becomes one of its own, with the same label
    contrast_grow   a new key's radius is that bound, however wide, in place of the least of it and the published one

    The share was chosen on SmolLM2-135M, 8 facts of CounterFact: GRACE, its radii grown to half the distance, answered none of the
    rephrasings and kept all neighbours; grown to .9 of it, .19 of the rephrasings, and kept .93 of the neighbours.
    """

    contrast_share: float = 0.9
    contrast_grow: bool = False

    def require_contrast(self) -> None:
        super().require_contrast()
        self.require(0 < self.contrast_share < 1, f"contrast_share lies between 0 and 1, not {self.contrast_share:g}")


class CodebookEditor(RadiusEditor):
    """What GRACE and MELO share as editors: one patch or many, made by the method's ``_make``."""

    rounding: float | None

    def resume_from(self, on: Stack, sites: Sequence[Site], settings: Mapping[str, Any]) -> tuple[Patch | None, Stack]:
        """(the last patch of the stack, where the edit goes on from it, what runs underneath)."""
        on = active_patches(tuple(on))
        last = on[-1] if on and on[-1].method == self.name else None
        same = last is not None and tuple(op.site for op in last.ops) == tuple(sites) and dict(last.ops[0].settings) == settings
        if last is None or not same or any(op.kind != "routed" for op in last.ops[1:]) or not self.can_resume(last):
            return None, on
        count = len(last.ops[0].tensors["radii"])
        last.running("labels", count, None, whole=True)
        if "limits" in last.state:
            last.running("limits", count)
        return last, on[:-1]

    def can_resume(self, last: Patch) -> bool:
        """Whether more than sites and settings have to agree, and does."""
        return True

    def tolerance(self, lm: LM) -> float:
        """``rounding``, or what the model's dtype asks for."""
        return rounding_of(lm.dtype) if self.rounding is None else self.rounding

    def packed(
        self, lm: LM, before: Patch | None, requests: Sequence[EditRequest], ops: Sequence[Op], book: KeyStore,
        resolved: Mapping[str, Any], notes: Mapping[str, Any],
    ) -> Patch:  # fmt: skip
        """The patch; ``resolved``: settings as they were found out for this model."""
        settings = to_dict(self) | dict(resolved)
        return Patch.continued_from(before, self.name, settings, lm.fingerprint, requests, ops, book.state(), notes)

    def edit(
        self, lm: LM, requests: Sequence[EditRequest], *, on: Stack = (), runner: Any = Tail, progress: Progress | None = None
    ) -> Patch:
        """One patch with all requests, put in one after another; what they train, they train at once."""
        return self._make(lm, [self.contrasted(lm, requests, on)], on, runner, progress)[0]

    def edit_each(
        self, lm: LM, requests: Sequence[EditRequest], *, on: Stack = (), runner: Any = Tail, progress: Progress | None = None
    ) -> list[Patch]:
        """A patch a request, as if it were made alone on ``on``."""
        return self._make(lm, [[r] for r in self.contrasted_each(lm, requests, on)], on, runner, progress)

    @abstractmethod
    def _make(self, lm: LM, problems: Sequence[list[EditRequest]], on: Stack, runner: Any, progress: Progress | None) -> list[Patch]:
        """A patch for each list of requests."""
