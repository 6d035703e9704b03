"""`Patch`: the side computations that make up an edit, where they attach, and what they came from.

A patch is a value.  It never holds or changes weights of the base; it is saved as a folder (``patch.json``,
``patch.safetensors``, ``README.md``), nothing is pickled, and its id is a hash of its content.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from errata import registry, storage
from errata.core import hub, patch_card, patch_file
from errata.core.op_schema import OpSchema, check_finite
from errata.errors import ErrataError, PatchError, StorageError
from errata.request import EditRequest

WEIGHT_LIKE = ("low_rank", "dense")


@dataclass(frozen=True, slots=True, order=True)
class Site:
    """A named place: block number and point.

    ``block`` is the block's output; ``mlp_down`` and ``attn_out`` are linears; any other point is a linear's path in the block.
    """

    block: int
    point: str = "block"


POINTS = ("mlp_down", "attn_out")  # points that name a linear by what it does in its block
PROMPT = Site(0, "prompt")  # in front of the prompt: no module, where text is put (`errata.core.context`)


class OpContext(Protocol):
    """What an op may know of the call: see `errata.core.bank.ForwardContext`."""

    position: Tensor
    prompt_lengths: Tensor
    is_prefill: bool

    def active(self, last: int | None) -> Tensor: ...
    def record(self, site: Site, name: str, value: Tensor) -> None: ...
    def save_decision(self, name: str, value: Tensor) -> None: ...
    def load_decision(self, name: str) -> Tensor: ...
    def select(self, rows: Tensor) -> OpContext: ...


class Kind(Protocol):
    """How one kind of op computes.  ``p`` holds its parameters with a leading axis of 1 or B.

    A kind that patches hold says in ``schema`` what its ops are (`errata.core.op_schema`); one without runs only while an edit is made.

    A kind may also have ``apply_grouped(p, groups, settings, x, y, site, context)``: ``p`` with the bank's own leading axis, ``groups``
    (`errata.core.weights.RowGroups`) names the rows of each entry.  It is used where a copy of an entry for each row would be large.

    A kind that decides on the prompt and acts on it, or later, by that decision sets ``stateful = True``, uses ``context.save_decision``
    and ``load_decision``, and says with ``non_causal(settings)`` whether what it does to a token can depend on tokens after it.

    A kind that acts or decides by where the prompt ends says so with ``reads_prompt_end(settings)``: a call of the bare model that does not
    tell is then refused.

    A kind that reads x alone and adds to y may say ``additive = True``; ops of it that follow each other and have equal ``fuse_key(op)``
    are then put together by ``fuse(ops, device)``, as weight-like ones are.

    A kind whose ops often do nothing may say with ``chain_key(op)`` which of them can run as one where they follow each other (None: it
    cannot), and with ``chain(columns, rows, device)`` give what stands for the bank then: the same outputs, sooner.

    A kind whose tensors are not what it computes with, or need not have equal shapes in one bank, has ``bank_key(op)``, what ops of one
    bank have in common, and ``stack_params(ops, device)``, the bank's parameters [P, …].
    """

    @staticmethod
    def apply(p: Mapping[str, Tensor], settings: Mapping[str, Any], x: Tensor, y: Tensor, site: Site, context: OpContext) -> Tensor: ...


@dataclass(frozen=True)
class Op:
    """One side computation: a registered kind at a site, with its tensors and settings."""

    kind: str
    site: Site
    tensors: Mapping[str, Tensor]
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.kind == "context") != (self.site == PROMPT):
            raise PatchError(f"a {self.kind!r} op cannot stand at {self.site}; make the edit again")

    def sizes(self) -> dict[str, int]:
        """Lengths of its tensors' axes (`errata.core.op_schema`); `PatchError` where it is not what its kind declares."""
        schema: OpSchema | None = getattr(registry.get("op", self.kind), "schema", None)
        if schema is None:
            raise PatchError(f"a {self.kind!r} op runs only while an edit is made; a patch holds none")
        try:
            return schema.sizes(self.settings, self.tensors)
        except PatchError as error:
            raise PatchError(f"the {self.kind!r} op {self.place}: {error}; make the edit again") from None

    @property
    def place(self) -> str:
        """Where it acts, in words."""
        return "in front of the prompt" if self.site == PROMPT else f"at block {self.site.block} ({self.site.point})"

    def signature(self) -> tuple[Any, ...]:
        """Ops with equal signatures can share a bank."""
        shapes = tuple(sorted((k, tuple(t.shape), str(t.dtype)) for k, t in self.tensors.items()))
        return self.kind, json.dumps(self.settings, sort_keys=True), shapes


@dataclass(frozen=True)
class Patch:
    """Ops plus where they came from.

    base      fingerprint of the model it belongs to (`errata.core.fingerprints.fingerprint`)
    state     running values a later edit goes on from (for example BaFT's load-balancing sums)
    replaces  ids of the patches this one went on from (`replaced_ids`): on a stack it stands in their place
    notes     facts about the making (loss, steps, seconds); not part of the id
    """

    method: str
    settings: Mapping[str, Any]
    base: str
    requests: tuple[EditRequest, ...]
    ops: tuple[Op, ...]
    state: Mapping[str, Tensor] = field(default_factory=dict)
    replaces: tuple[str, ...] = ()
    notes: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def continued_from(
        cls,
        before: Patch | None,
        method: str,
        settings: Mapping[str, Any],
        base: str,
        requests: Iterable[EditRequest],
        ops: Iterable[Op],
        state: Mapping[str, Tensor] | None = None,
        notes: Mapping[str, Any] | None = None,
    ) -> Patch:
        """A patch that goes on from ``before`` (None: from nothing).

        Its requests come behind those of ``before``, which it replaces (`replaced_ids`).
        """
        every = (*(before.requests if before else ()), *requests)
        return cls(method, settings, base, every, tuple(ops), state or {}, replaced_ids(before), notes or {})

    @property
    def id(self) -> str:
        """Content hash: same inputs, same seed, same id."""
        cached = self.__dict__.get("_id")
        if cached is None:
            cached = patch_file.content_id(self._head(), self._tensors())
            object.__setattr__(self, "_id", cached)
        return str(cached)

    @property
    def parameters(self) -> int:
        """Numbers stored in the ops."""
        return sum(t.numel() for op in self.ops for t in op.tensors.values())

    def _head(self) -> dict[str, Any]:
        return {
            "format": patch_file.FORMAT,
            "method": self.method,
            "settings": dict(self.settings),
            "base": self.base,
            "requests": [r.to_dict() for r in self.requests],
            "ops": [
                {
                    "kind": op.kind,
                    "block": op.site.block,
                    "point": op.site.point,
                    "settings": dict(op.settings),
                    "tensors": sorted(op.tensors),
                }
                for op in self.ops
            ],
            "replaces": list(self.replaces),
        }

    def _tensors(self) -> dict[str, Tensor]:
        out = {f"{i}.{name}": t for i, op in enumerate(self.ops) for name, t in op.tensors.items()}
        return out | {f"state.{name}": t for name, t in self.state.items()}

    def check(self) -> tuple[dict[str, int], ...]:
        """The sizes of every op (`Op.sizes`), found once; `PatchError` where the patch is not what its kinds of op declare."""
        found: tuple[dict[str, int], ...] | None = self.__dict__.get("_sizes")
        if found is None:
            for name, tensor in self._tensors().items():
                check_finite(name, tensor, unlimited=name.startswith("state."))
            found = tuple(op.sizes() for op in self.ops)
            for op in self.ops:
                beside = registry.get("op", op.kind).schema.beside
                if beside is not None and (wrong := beside(op, self.ops)):
                    raise PatchError(f"the {op.kind!r} op {op.place}: {wrong}; make the edit again")
            object.__setattr__(self, "_sizes", found)
        return found

    def running(self, name: str, *shape: int | None, whole: bool = False) -> Tensor:
        """A tensor of ``state``; `PatchError` where it is not there or not [*shape] (None: any length) of real or ``whole`` numbers."""
        found = self.state.get(name)
        if found is not None:
            fits = len(shape) == found.ndim and all(n in (None, m) for n, m in zip(shape, found.shape, strict=True))
            if fits and (found.dtype == torch.int64 if whole else found.is_floating_point()):
                return found
        what = "missing" if found is None else f"{found.dtype} of shape {list(found.shape)}"
        raise PatchError(f"patch {self.id} cannot be gone on from: its state {name!r} is {what}; take it off, or make the edit again")

    def describe(self) -> str:
        """A few plain lines."""
        lines = [f"patch {self.id}  method {self.method}  {len(self.requests)} edit(s)  {self.parameters:,} numbers  base {self.base}"]
        lines += [f"  {op.kind} {op.place}" for op in self.ops] or ["  changes nothing"]
        lines += [f"  {r.prompt!r} -> {r.target!r}" for r in self.requests[:10]]
        return "\n".join(lines + ([f"  … {len(self.requests) - 10} more"] if len(self.requests) > 10 else []))

    def save(self, folder: str | Path, *, overwrite: bool = False, sync: bool = True) -> Path:
        """Write beside, then rename: a full disk or a stop leaves what was there before.

        ``sync=False`` leaves it to the caller to make many patches durable at once (`errata.storage.flush`).
        """
        folder = Path(folder)
        if folder.exists() and not overwrite:
            raise StorageError(f"{folder} exists already; give another name, or overwrite=True (--force)")
        if folder.exists() and not (folder / "patch.json").exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise StorageError(f"{folder} exists and is not a patch; it is left alone, give another name")
        files = self._files(patch_card.readme(self))
        with storage.atomic_folder(folder) as temporary:
            for name, content in files.items():
                storage.write(temporary / name, content, sync)
        return folder

    def saved_notes(self) -> dict[str, Any]:
        """``notes`` as a folder holds them: with the name of the model, where it is known."""
        base = patch_card.base_name(self)
        return {**self.notes, **({"model": base} if base else {})}

    def _files(self, readme: str) -> dict[str, bytes]:
        """{name: content}: what is saved can be opened."""
        from safetensors.torch import save

        self.check()
        blob = save({k: t.detach().cpu().contiguous() for k, t in self._tensors().items()})
        head = {**self._head(), "id": self.id, "sha256": hashlib.sha256(blob).hexdigest(), "notes": self.saved_notes()}
        return {
            "patch.safetensors": blob,
            "patch.json": json.dumps(head, ensure_ascii=False, indent=1).encode(),
            "README.md": readme.encode(),
        }

    def push_to_hub(
        self, repo: str, *, private: bool | None = None, licence: str | None = None, scores: Mapping[str, float] | None = None,
        revision: str | None = None, message: str = "", token: str | None = None,
    ) -> str:  # fmt: skip
        """One commit to the model repository OWNER/NAME of the hub, made where it is not there; the commit's address.

        ``licence`` (as the hub names it) and ``scores`` ({"reliability": 1.0}, measured by you) stand in its model card.
        """
        files = self._files(patch_card.model_card(self, repo, licence, scores or {}))
        message = message or f"errata patch {self.id}"
        return hub.push(repo, files, private=private, token=token, revision=revision, message=message)

    @classmethod
    def from_hub(cls, repo: str, *, revision: str | None = None, token: str | None = None) -> Patch:
        """The patch of a repository; ``revision``: a branch, a tag, or the commit that pins it."""
        folder = hub.fetch(repo, revision=revision, token=token)
        try:
            return cls.load(folder)
        except PatchError as error:
            raise PatchError(f"{repo} on the hub, at {error}") from None

    @classmethod
    def load(cls, folder: str | Path) -> Patch:
        """Read a patch folder, or one of `errata edit --out` that holds one; `PatchError` says what is broken, or is not what its kinds of
        op declare, and of several patches their names."""
        found = patch_file.members(Path(folder))
        if len(found) != 1:
            raise PatchError(f"{folder} holds {len(found)} patches; name one of them ({', '.join(p.name for p in found)})")
        head, tensors = patch_file.read(found[0])
        try:
            return cls._from(head, tensors)
        except ErrataError as error:
            raise PatchError(f"{found[0] / 'patch.json'}: {error}") from None

    @classmethod
    def _from(cls, head: patch_file.Head, tensors: Mapping[str, Tensor]) -> Patch:
        ops = []
        for i, raw in enumerate(head.ops):
            ops.append(Op(raw.kind, Site(raw.block, raw.point), {n: tensors[f"{i}.{n}"] for n in raw.tensors}, dict(raw.settings)))
        state = {k.removeprefix("state."): t for k, t in tensors.items() if k.startswith("state.")}
        requests = tuple(map(EditRequest.restore, head.requests))
        patch = cls(head.method, dict(head.settings), head.base, requests, tuple(ops), state, head.replaces, dict(head.notes))
        patch.check()
        if patch.id != head.id:
            raise PatchError(f"content does not match its id {head.id!r}; the files of two patches were mixed, or edited by hand")
        return patch

    def scale(self, factor: float) -> Patch:
        """A weight-like patch times a number; -1 negates it.  Its settings say so (``scaled``): its state is of the patch as it was."""
        settings = {**self.settings, "scaled": self.settings.get("scaled", 1.0) * factor}
        return dataclasses.replace(self, settings=settings, ops=tuple(_scaled(op, factor) for op in weight_like(self)), notes={})


def replaced_ids(before: Patch | None) -> tuple[str, ...]:
    """What a patch that goes on from ``before`` replaces: all that it holds, so that taking off one between brings no older one back."""
    return () if before is None else (*before.replaces, before.id)


def weight_like(patch: Patch) -> tuple[Op, ...]:
    """Its ops, all of them changes of weights; `PatchError` otherwise."""
    for op in patch.ops:
        if op.kind not in WEIGHT_LIKE:
            raise PatchError(
                f"patch {patch.id} ({patch.method}) holds a {op.kind!r} op, not a change of weights; only {WEIGHT_LIKE} add and scale"
            )
    return patch.ops


def _scaled(op: Op, factor: float) -> Op:
    name = "weight" if op.kind == "dense" else "up"
    return dataclasses.replace(op, tensors={**op.tensors, name: op.tensors[name] * factor})
