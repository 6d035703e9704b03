"""What every editor is: hyper-parameters with a preset by the model's name, and the words in which wrong ones are refused."""

from __future__ import annotations

import contextlib
from abc import ABC
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch

from errata.config import build, to_dict
from errata.contrast.contrast import fill
from errata.contrast.names import Names
from errata.core.bank import Stack
from errata.core.model import LM
from errata.core.sites import check_block
from errata.errors import ConfigError, PatchError, UnknownNameError, near
from errata.methods import tuned
from errata.methods.texts import MOST, neighbours
from errata.request import EditRequest

E = TypeVar("E", bound="Editor")
_SEEDS = 2**32
_RULE = "rule"  # the preset of nothing: the rule for a model that nobody tuned
PUBLISHED = "published"  # the preset of what the paper states; "published NAME": what it states for a model of that name


def preset(cls: type, name: str, asked: str | None = None) -> dict[str, Any]:
    """Settings for a model: the entry of ``cls.PRESETS`` whose key occurs in the model's name (longest key first); {} when none does.

    ``asked``: a preset by its own name instead, like "published" ("rule" has nothing).  Its entry for this model ("published llama-2-7b")
    goes on top.
    """
    table: dict[str, dict[str, Any]] = getattr(cls, "PRESETS", {})
    plain = name.lower().replace("_", "-")
    if asked is None:
        own = (k for k in sorted(table, key=len, reverse=True) if k in plain and not k.startswith(PUBLISHED))
        return next((dict(table[k]) for k in own), {})
    if asked == _RULE:
        return {}
    if asked not in table:
        there = near(asked, table, "there are") if table else "it has none"
        raise UnknownNameError(f"{getattr(cls, 'name', cls.__name__)} has no preset {asked!r}; {there}")
    own = (k for k in sorted(table, key=len, reverse=True) if k.startswith(f"{asked} ") and k.removeprefix(f"{asked} ") in plain)
    return dict(table[asked]) | next((dict(table[k]) for k in own), {})


def settings_for(cls: type, name: str, given: Mapping[str, Any], fingerprint: str | None = None) -> dict[str, Any]:
    """The preset for a model of that name, what `errata tune` found for its fingerprint, and ``given`` on top; the setting ``preset`` asks
    for one by its own name, without what was found."""
    asked = given.get("preset")
    if asked is not None and not isinstance(asked, str):
        raise ConfigError(f"preset is the name of one, not {asked!r}")
    found = {} if asked is not None or fingerprint is None else tuned.settings_of(fingerprint, getattr(cls, "name", cls.__name__))
    return {**preset(cls, name, asked), **found, **{k: v for k, v in given.items() if k != "preset"}}


# what `errata tune` tries of the output term
NEIGHBOURS: tuple[dict[str, Any], ...] = ({"contrast": 16, "contrast_weight": 1.0}, {"contrast": 16, "contrast_weight": 4.0})


def layers_for(depth: int, depths: Sequence[float]) -> tuple[int, ...]:
    """Blocks at relative depths, for a model whose layers nobody has named."""
    return tuple(sorted({min(depth - 1, int(depth * f + 0.5)) for f in depths}))


class Editor(ABC):
    """The base of all methods; each is a frozen dataclass whose fields are its hyper-parameters.

    name, paper  the registered name, and where the method was published
    needs        what a request must bring, or may ("subject", "stats", "paraphrases?", "unrelated?")
    PRESETS      {part of a model's name, or a name of its own: settings that differ from the defaults there}
    TUNES        {setting: values that `errata tune` tries on a model} (`errata.tune.space`), the most telling settings first
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    needs: ClassVar[frozenset[str]] = frozenset()
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {}
    TUNES: ClassVar[dict[str, Any]] = {}

    def __init_subclass__(cls, **how: Any) -> None:
        """Editing trains, also within a caller's ``torch.no_grad()`` or ``inference_mode()``."""
        super().__init_subclass__(**how)
        for name in ("edit", "edit_each"):
            if name in vars(cls):
                setattr(cls, name, torch.inference_mode(False)(vars(cls)[name]))

    @classmethod
    def for_model(cls: type[E], lm: LM, /, **settings: Any) -> E:
        """The settings for this model with ``settings`` on top; an unknown or ill-typed one raises `ConfigError`.

        They are the preset by the model's name (see ``PRESETS``), and on top what `errata tune` found for its fingerprint
        (`errata.methods.tuned`).  ``preset="published"`` asks for what the paper states, where a method has it; ``preset="rule"`` for the
        rule, as on a model that nobody tuned.
        """
        return build(cls, settings_for(cls, lm.name, settings, lm.fingerprint))

    @classmethod
    def untuned(cls: type[E], lm: LM, /, **settings: Any) -> E:
        """As `for_model`, without what `errata tune` found: the preset by the model's name, or the rule."""
        return build(cls, settings_for(cls, lm.name, settings))

    @classmethod
    def judge(cls, settings: Mapping[str, Any]) -> None:
        """`ConfigError` for settings that are wrong on any model: asked before one is loaded.

        A setting may be right only beside others, which `for_model` takes from a preset or from what was found for the model: it is wrong
        where it is so beside all there are.
        """
        asked = settings_for(cls, "", settings)
        others = [] if "preset" in settings else [*cls.PRESETS.values(), *tuned.every(cls.name)]
        try:
            build(cls, asked)
        except ConfigError:
            for other in others:
                with contextlib.suppress(ConfigError):
                    build(cls, {**other, **asked})
                    return
            raise

    def contrasted(
        self, lm: LM, requests: Sequence[EditRequest], on: Stack = (), exclude: Sequence[str] = (), names: Names | None = None
    ) -> list[EditRequest]:
        """Requests with as many contrast pairs each as the setting ``contrast`` says (`errata.contrast.contrast.fill`)."""
        return fill(lm, requests, int(getattr(self, "contrast", 0)), on=on, exclude=exclude, names=names)

    def contrasted_each(
        self, lm: LM, requests: Sequence[EditRequest], on: Stack = (), names: Names | None = None, told: Callable[[int], None] | None = None
    ) -> list[EditRequest]:
        """`contrasted`, each request as if it were made alone.  ``told``: how many are done, after each."""
        out: list[EditRequest] = []
        for request in requests:
            out += self.contrasted(lm, [request], on, names=names)
            if told is not None:
                told(len(out))
        return out

    def made_with(self, settings: Mapping[str, Any], own: Mapping[str, Any]) -> bool:
        """Whether a patch's ``settings`` are ``own``; a field that is younger than the patch, and so not among them, is at its default."""
        return to_dict(type(self)()) | dict(settings) == own

    def require(self, true: bool, what: str) -> None:
        """`ConfigError` that says ``what`` must be, unless it is."""
        if not true:
            raise ConfigError(f"{self.name}: {what}")

    def layers_at(self, lm: LM, depths: Sequence[float]) -> tuple[int, ...]:
        """Blocks of this model at relative depths, or the nearest that a text runs."""
        return tuple(sorted({lm.nearest_block(block) for block in layers_for(lm.depth, depths)}))

    def require_blocks(self, lm: LM, blocks: Sequence[int]) -> None:
        """`ConfigError` for a block that this model does not have, or that no text runs."""
        try:
            for block in blocks:
                check_block(lm, block)
        except PatchError as error:
            raise ConfigError(f"{self.name}: {error}; set layers for this model") from None

    def require_depths(self, depths: Sequence[float] | None) -> None:
        """`ConfigError` for relative depths that no block has."""
        if depths is not None:
            fits = len(depths) > 0 and all(0 <= f <= 1 for f in depths)
            self.require(fits, f"depths are parts of the model's depth, from 0 to 1; got {list(depths)}")

    def require_seed(self, seed: int) -> None:
        """`ConfigError` for a seed that a generator does not take."""
        self.require(0 <= seed < _SEEDS, f"seed must be from 0 to {_SEEDS - 1}, not {seed}")

    def require_requests(self, problems: Sequence[Any]) -> None:
        """`ConfigError` where one of ``problems``, the requests of a patch each, holds none."""
        self.require(all(problems), "nothing to edit; give at least one request")


@dataclass(frozen=True, kw_only=True)
class ContrastEditor(Editor):
    """Contrast pairs, which requests bring (`EditRequest.contrast`), can say what an edit should leave alone.

    contrast  how many such pairs, about other subjects of the same relation, a request is filled with before it is edited
              (`errata.contrast`); 0: the pairs that a request brings are not looked at.  Requests without pairs are edited as with 0
    """

    contrast: int = 0

    def require_contrast(self) -> None:
        """`ConfigError` for a number of pairs that cannot be."""
        self.require(self.contrast >= 0, f"contrast must not be negative, not {self.contrast}; 0 turns it off")


@dataclass(frozen=True, kw_only=True)
class OutputTermEditor(ContrastEditor):
    """Contrast pairs are trained on by the output term (`errata.core.keep`): loss + ``contrast_weight`` · KL.

    contrast_weight  of KL(before ‖ edited) of the token after a pair's prompt, the mean over pairs.  What is compared with ``stop``
                     holds it, too
    contrast_batch   pairs of a step: they take turns, for a step with all of them costs many times one without; 0: all at each step
    prefixes         short texts behind which the prompt and its neighbours are trained, too (`errata.methods.texts`)
    """

    contrast_weight: float = 1.0
    contrast_batch: int = 4
    prefixes: int = 0

    def require_contrast(self) -> None:
        super().require_contrast()
        self.require(self.contrast_weight >= 0, f"contrast_weight must not be negative, not {self.contrast_weight:g}")
        self.require(self.contrast_batch >= 0, f"contrast_batch must not be negative, not {self.contrast_batch}; 0 takes all pairs")
        self.require(0 <= self.prefixes <= MOST, f"prefixes must be from 0 to {MOST}, not {self.prefixes}")

    def rows_kept(self, request: EditRequest) -> int:
        """How many rows a step has at most for a request's contrast pairs, for planning batches."""
        pairs = len(request.contrast) * (1 + bool(self.prefixes)) if self.contrast else 0
        return min(pairs, 2 * self.contrast_batch) if self.contrast_batch else pairs

    def pairs_kept(self, lm: LM, problems: Sequence[Sequence[EditRequest]]) -> list[list[tuple[str, str]]]:
        """The contrast pairs of every request, behind short texts too where its prompt is."""
        return [neighbours(lm, r.contrast, self.prefixes) for own in problems for r in own]
