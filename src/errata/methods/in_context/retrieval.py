"""Retrieval: a store of facts, of which those near to the prompt are put in front of it, and none where none is near.

The plain baseline for editors with a memory: no training, no weight, and a prompt that is near to no fact is answered by the base,
bit for bit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from errata.config import to_dict
from errata.core.bank import Stack
from errata.core.context import name_bytes
from errata.core.model import LM
from errata.core.patch import Op, Patch, replaced_ids
from errata.errors import ConfigError
from errata.methods.in_context.editor import InContextEditor
from errata.methods.in_context.text import block_for, context_op, padded, vectors
from errata.request import EditRequest


@dataclass(frozen=True)
class Retrieval(InContextEditor):
    """Fields beside those of `InContextEditor`:

    k, threshold  the k nearest facts whose cosine with the prompt reaches the threshold
    only_named    of a fact that has a subject, only to a prompt in which the subject's name stands, whatever the case.  Without it a fact
                  is shown to its neighbours, too: on SmolLM2 two in three of them then answered otherwise
    encoder       a sentence encoder (the package sentence-transformers); None: the base's own states
    block, pool   after which block (None: 7/8 of the depth), and whether of the prompt's last token or the mean over tokens

    A fact is found by its prompt and by the paraphrases its request brings.  No paper is followed: the nearest are IKE's retriever,
    which always shows k, and SERAC's scope, which is trained.  The default threshold was chosen on the almanac's dev split (of 200
    facts in a store all edited prompts and 97 % of their rephrases find theirs, 6 % of other prompts find one); for another model
    look at the cosines of prompts that are and are not meant.  A late state says what will be answered: what is found without being
    meant are prompts of the same kind that the base answers alike.

    Continual: a new patch goes on from the last of the stack, if that is a store made with the same settings, and replaces it: one
    patch holds all facts.  A new fact with an old one's prompt takes its place.
    """

    name: ClassVar[str] = "retrieval"
    paper: ClassVar[str] = (
        "no paper: a baseline of errata, after IKE's retriever (Zheng et al. 2023) and SERAC's scope (Mitchell et al. 2022)"
    )
    needs: ClassVar[frozenset[str]] = frozenset({"paraphrases?"})
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {"almanac": {"fact": "{prompt} {target}.", "cue": ""}}

    TUNES: ClassVar[dict[str, Any]] = {
        **InContextEditor.TUNES, "threshold": (0.75, 0.85, 0.9, 0.95), "pool": ("mean",), "block": (6 / 30, 15 / 30)
    }  # fmt: skip

    k: int = 1
    threshold: float = 0.66
    only_named: bool = True
    encoder: str | None = None
    block: int | None = None
    pool: Literal["last", "mean"] = "last"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.k < 1:
            raise ConfigError(f"retrieval: k must be at least 1, not {self.k}")
        if not -1 <= self.threshold <= 1:
            raise ConfigError(f"retrieval: threshold is a cosine, from -1 to 1, not {self.threshold}")

    def _patches(self, lm: LM, problems: Sequence[Sequence[EditRequest]], on: Stack) -> list[Patch]:
        how = {"k": self.k, "threshold": self.threshold, "encoder": self.encoder, "block": block_for(lm, self), "pool": self.pool}
        # of two requests with one prompt the later counts
        problems = [list({r.prompt: r for r in requests}.values()) for requests in problems]
        asked = [[(m, text) for m, r in enumerate(rs) for text in dict.fromkeys((r.prompt, *r.paraphrases))] for rs in problems]
        flat = [text for pairs in asked for _, text in pairs]
        found = iter(vectors(lm, flat, how).split([len(pairs) for pairs in asked])) if flat else iter(())
        out = []
        for requests, pairs, keys in zip(problems, asked, found, strict=True):
            op = context_op(lm, self, (), self.facts(lm, requests), how)
            tensors = {**op.tensors, "keys": keys.clone(), "owner": torch.tensor([m for m, _ in pairs])}
            if self.only_named:
                tensors |= name_bytes([r.subject for r in requests])
            op = dataclasses.replace(op, tensors=tensors)
            every, before = tuple(requests), self._before(on, op)
            if before is not None:
                op, every = _grown(before, op, every)
            settings = {**to_dict(self), "block": how["block"]}
            out.append(Patch(self.name, settings, lm.fingerprint, every, (op,), replaces=replaced_ids(before)))
        return out

    def _before(self, on: Stack, op: Op) -> Patch | None:
        """The store to go on from."""
        last = on[-1] if on else None
        if last is None or last.method != self.name or last.ops[0].settings != op.settings:
            return None
        return last if last.ops[0].tensors.keys() == op.tensors.keys() else None  # names are looked at in both stores, or in neither


def _grown(before: Patch, op: Op, requests: tuple[EditRequest, ...]) -> tuple[Op, tuple[EditRequest, ...]]:
    """(op of both stores, their requests), without old facts whose prompts are asked anew."""
    new, old = {r.prompt for r in requests}, before.ops[0].tensors
    kept = [m for m, r in enumerate(before.requests) if r.prompt not in new]
    place = torch.full((len(before.requests),), -1)
    place[kept] = torch.arange(len(kept))
    held = place[old["owner"]] >= 0

    def joined(name: str, some: Tensor | list[int], shift: int = 0) -> Tensor:
        return torch.cat([old[name][some], op.tensors[name] + shift])

    def ragged(name: str, lengths: str) -> Tensor:
        rows = [old[name][m, : int(old[lengths][m])].tolist() for m in kept]
        rows += [row[:n] for row, n in zip(op.tensors[name].tolist(), op.tensors[lengths].tolist(), strict=True)]
        return padded(rows).to(op.tensors[name].dtype)

    owner = torch.cat([place[old["owner"]][held], op.tensors["owner"] + len(kept)])
    tensors = {
        **op.tensors, "texts": ragged("texts", "lengths"), "lengths": joined("lengths", kept), "keys": joined("keys", held), "owner": owner
    }  # fmt: skip
    if "names" in old:
        tensors |= {"names": ragged("names", "named"), "named": joined("named", kept)}
    return dataclasses.replace(op, tensors=tensors), (*(before.requests[m] for m in kept), *requests)
