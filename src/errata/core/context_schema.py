"""What a ``context`` op may be (see `errata.core.context`): its tensors, its settings, and what of them a model must have."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from errata.core.op_schema import OpSchema, Tensors, within
from errata.core.sites import check_block
from errata.errors import ConfigError, PatchError, shortened

_UNPACKED = WeakIdKeyDictionary()  # {names: as text} of stores that live: a store is asked at every prompt


def names_of(names: Tensor, named: Tensor) -> list[str]:
    """Names without case from what `name_bytes` made."""
    found: list[str] | None = _UNPACKED.get(names)
    if found is None:
        rows = zip(names.tolist(), named.tolist(), strict=True)
        found = _UNPACKED[names] = [bytes(row[:n]).decode().casefold() for row, n in rows]
    return found


@dataclass(frozen=True)
class _Retrieval:
    k: int
    threshold: float
    encoder: str | None
    block: int
    pool: Literal["last", "mean"]

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ConfigError(f"setting.retrieval.k must be at least 1, not {self.k}")


@dataclass(frozen=True)
class _Settings:
    cue: tuple[int, ...]
    bos: int | None
    budget: int
    demonstrations: int
    retrieval: _Retrieval | None


def _tensors(settings: _Settings, given: Tensors) -> dict[str, str]:
    said = {"texts": "M L*:int64", "lengths": "M:int64"}
    if settings.retrieval is not None:
        said |= {"keys": "K D", "owner": "K:int64"}
        said |= {"names": "M N*:uint8", "named": "M:int64"} if "names" in given or "named" in given else {}
    return said


def _numbers(settings: _Settings, tensors: Tensors) -> str | None:
    count, longest = tensors["texts"].shape
    if not within(tensors["lengths"], 0, longest + 1):
        return f"tensor 'lengths' must be from 0 to {longest}"
    if not 0 <= settings.demonstrations <= count:
        return f"setting.demonstrations must be from 0 to {count}, not {settings.demonstrations}"
    if "owner" in tensors and not within(tensors["owner"], 0, count):
        return f"tensor 'owner' must name one of {count} texts"
    if "names" in tensors:
        if not within(tensors["named"], 0, tensors["names"].shape[1] + 1):
            return "tensor 'named' must not be longer than the names"
        try:
            names_of(tensors["names"], tensors["named"])
        except UnicodeDecodeError:
            return "tensor 'names' must be UTF-8"
    return None


def _encoders() -> bool:
    """Whether sentence encoders can be loaded; the package is not, which takes seconds."""
    name = "sentence_transformers"
    return sys.modules[name] is not None if name in sys.modules else importlib.util.find_spec(name) is not None


def _fits(settings: _Settings, tensors: Tensors, site: tuple[int, int], model: Any) -> str | None:
    vocabulary = int(model.hf.get_input_embeddings().weight.shape[0])
    ids = [*settings.cue, *([] if settings.bos is None else [settings.bos])]
    if not within(tensors["texts"], 0, vocabulary) or not all(0 <= i < vocabulary for i in ids):
        return f"it puts tokens in front that this model does not have; it has {vocabulary}"
    how = settings.retrieval
    try:
        if how is not None:
            check_block(model, how.block)
    except PatchError as error:
        return f"setting.retrieval: {error}"
    if how is not None and how.encoder is not None and not _encoders():
        return f"encoder {shortened(how.encoder)} needs the package sentence-transformers; pip install 'errata[encoder]'"
    if how is not None and how.encoder is None and tensors["keys"].shape[1] != site[0]:
        return f"its keys have {tensors['keys'].shape[1]} numbers, the model's states {site[0]}"
    return None


SCHEMA = OpSchema(_tensors, _Settings, linear=False, numbers=_numbers, on_model=_fits)
