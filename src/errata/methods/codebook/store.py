"""What GRACE's codebook and MELO's vector store hold, and the rules by which texts are put in one after another; no training.

Source: GRACE (Hartvigsen et al., NeurIPS 2023) §3, MELO (Yu et al., AAAI 2024), and their released code.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from errata.core.patch import Patch
from errata.core.tokens import Encoded
from errata.methods.codebook.lookup import nearest, nearest_within_radius

_SEAM = 1e-5  # by which the older of two keys that part at a split keeps less than half their distance


@dataclass(frozen=True)
class KeyedText:
    """One text to write: its request's number in the patch, its tokens, what the key site read and gave at the last prompt token."""

    request: int
    row: Encoded
    read: Tensor
    gave: Tensor


class Insertion(NamedTuple):
    """What `KeyStore.place` did: the number of the key that is now the text's, of the one that was nearest, and its distance."""

    how: str
    number: int
    near: int
    rho: float


class KeyStore:
    """Keys [N, I], radii and labels while edits are put in one after another.  Numbers of keys never change."""

    def __init__(self, keys: Tensor, radii: Sequence[float], labels: Sequence[tuple[int, ...]], more: int) -> None:
        self._keys = torch.cat([keys, keys.new_empty((more, keys.shape[1]))])
        self.radii, self.labels = list(radii), list(labels)

    @property
    def keys(self) -> Tensor:
        return self._keys[: len(self.radii)]

    def add(self, query: Tensor, radius: float, label: tuple[int, ...]) -> int:
        self._keys[len(self.radii)] = query
        self.radii.append(radius)
        self.labels.append(label)
        return len(self.radii) - 1

    def place(self, query: Tensor, label: tuple[int, ...], radius: float, rounding: float, above: float) -> Insertion:
        """Put ``query`` in; what can be done, with ρ its distance from the nearest key j:

        added   nothing near: ρ > radius + ε_j
        split   near, another label: a new key; the two share the distance, ε_j ← ρ/2 − 1e-5, ε_new ← ρ/2 + ``above``
        taken   the same key (ρ within rounding) with another label: the entry is the new edit's, its radius stays.  Ours: as published
                the old radius would be −1e-5 and the new one 0, and neither would be hit again
        near    the same label: what happens is the method's
        """
        distance, number = nearest(self.keys, query[None])
        rho, j = float(distance), int(number)
        if j < 0 or rho > radius + self.radii[j]:
            return Insertion("added", self.add(query, radius, label), j, rho)
        if self.labels[j] == label:
            return Insertion("near", j, j, rho)
        if rounding and rho <= rounding * float(torch.linalg.vector_norm(query)):
            self.labels[j] = label
            return Insertion("taken", j, j, rho)
        self.radii[j] = rho / 2 - _SEAM
        return Insertion("split", self.add(query, rho / 2 + above, label), j, rho)


def pack(labels: Iterable[tuple[int, ...]]) -> Tensor:
    """Lists of token ids as [N, longest], filled up with -1."""
    rows = list(labels)
    out = torch.full((len(rows), max(map(len, rows), default=0)), -1)
    for i, row in enumerate(rows):
        out[i, : len(row)] = torch.tensor(row)
    return out


def unpack(labels: Tensor) -> list[tuple[int, ...]]:
    return [tuple(i for i in row if i >= 0) for row in labels.tolist()]


class FilledCodebook:
    """The codebook of one patch: ``before`` (or nothing) and then ``texts``, one after another.

    ``values`` a tensor an entry, new ones at their start; ``trains`` {entry: the texts that hit it and have its label}.
    """

    def __init__(self, editor: Any, before: Patch | None, texts: Sequence[KeyedText], rounding: float) -> None:
        self.editor, self.rounding, self.done = editor, rounding, []  # type: ignore[var-annotated]
        old = before.ops[0].tensors if before else None
        like = texts[0].read
        keys = old["keys"].to(like) if old else like.new_empty((0, len(like)))
        labels = unpack(before.state["labels"]) if before else []
        self.book = KeyStore(keys, old["radii"].tolist() if old else [], labels, len(texts))
        self.values = list(old["values"].to(like)) if old else []
        self.counts = dict.fromkeys(("added", "split", "taken", "joined", "expanded"), 0)
        for text in texts:
            self._put(text)
        self.radii = torch.tensor(self.book.radii, dtype=like.dtype, device=like.device)
        found = nearest_within_radius(self.book.keys, self.radii, torch.stack([t.read for t in texts]), rounding).tolist()
        self.trains: dict[int, list[KeyedText]] = {}
        for text, entry in zip(texts, found, strict=True):
            if entry >= 0 and self.book.labels[entry] == text.row.target:
                self.trains.setdefault(entry, []).append(text)
        self.lost = len(texts) - sum(map(len, self.trains.values()))

    def _put(self, text: KeyedText) -> None:
        e, query = self.editor, text.read
        radius = e.eps * (float(torch.linalg.vector_norm(query)) if e.unit == "norm" else 1.0)
        how, entry, _, rho = self.book.place(query, text.row.target, radius, self.rounding, 0.0)
        if how == "near":
            reach = self.book.radii[entry] + self.rounding * float(torch.linalg.vector_norm(query))
            how = "expanded" if rho > reach else "joined"
            if how == "expanded":
                self.book.radii[entry] = rho
                if e.expand == "moving_average":
                    self.book.keys[entry] = (self.book.keys[entry] + query) / 2
        else:
            start = text.gave.clone() if e.value == "warm" else _cold(e.seed, entry, text.gave)
            self.values[entry:] = [start] if how != "taken" else [start, *self.values[entry + 1 :]]
        self.counts[how] += 1

    def notes(self) -> dict[str, Any]:
        """How entries came about, and the last loss and steps, averaged over those that trained."""
        count = max(1, len(self.done))
        loss, steps = (sum(d[i] for d in self.done) / count for i in (0, 1))
        return {"steps": steps, "loss": round(loss, 6), "entries": len(self.values), **self.counts, "lost": self.lost}


def _cold(seed: int, entry: int, like: Tensor) -> Tensor:
    """U[0, 1), drawn for this entry alone, so that it does not matter what else is edited."""
    return torch.rand(like.shape, generator=torch.Generator().manual_seed((seed << 24) + entry)).to(like)


class Clusters:
    """The vector store of one patch: that of ``before`` (or nothing) and then ``texts``, one after another.

    Text t of request i belongs to block ``first + i // per_block``.
    """

    def __init__(self, editor: Any, before: Patch | None, texts: Sequence[KeyedText], rounding: float) -> None:
        self.editor, self.rounding, self.texts = editor, rounding, texts
        old = before.ops[0].tensors if before else None
        keys = [t.read if editor.reads == "input" else t.gave for t in texts]
        like = keys[0]
        self.first = len(before.ops[1].tensors["up"]) if before else 0  # blocks there are already
        self.book = KeyStore(
            old["centres"].to(like) if old else like.new_empty((0, len(like))),
            old["radii"].tolist() if old else [], unpack(before.state["labels"]) if before else [], len(texts),
        )  # fmt: skip
        self.members: list[list[tuple[Tensor, int]]] = [[] for _ in self.book.radii]  # (key, block) of each cluster's points
        if old:
            for key, cluster, block in zip(old["points"].to(like), old["cluster"].tolist(), old["block"].tolist(), strict=True):
                self.members[cluster].append((key, block))
        self.counts = dict.fromkeys(("added", "split", "taken", "joined", "forgotten"), 0)
        for text, key in zip(texts, keys, strict=True):
            self._put(key, text.row.target, self.first + text.request // editor.edits_per_block)

    def _put(self, key: Tensor, label: tuple[int, ...], block: int) -> None:
        e = self.editor
        radius = e.radius * (float(torch.linalg.vector_norm(key)) if e.unit == "norm" else 1.0)
        how, cluster, near, _ = self.book.place(key, label, radius, self.rounding, _SEAM)
        if how in ("added", "split"):
            self.members.append([])
        if how in ("split", "taken"):
            self._forget(near, everything=how == "taken")
        self.members[cluster].append((key, block))
        if how == "near":
            self._centre(cluster, radius)
        self.counts["joined" if how == "near" else how] += 1

    def _centre(self, cluster: int, least: float) -> None:
        """The centre is the mean of the points, the radius reaches the farthest of them and is ``least`` at least."""
        keys = torch.stack([key for key, _ in self.members[cluster]])
        self.book.keys[cluster] = keys.mean(0)
        away = torch.linalg.vector_norm(keys - self.book.keys[cluster], dim=1)
        self.book.radii[cluster] = max(float(away.max()), least)

    def _forget(self, cluster: int, everything: bool) -> None:
        """Points outside what is left of the cluster are dropped."""
        centre, radius, own = self.book.keys[cluster], self.book.radii[cluster], self.members[cluster]
        kept = [] if everything else [(k, b) for k, b in own if float(torch.linalg.vector_norm(k - centre)) <= radius]
        self.counts["forgotten"] += len(own) - len(kept)
        self.members[cluster] = kept

    def tensors(self) -> dict[str, Tensor]:
        """The router's."""
        keys = self.book.keys
        points = [(key, c, block) for c, own in enumerate(self.members) for key, block in own]
        cluster, block = (torch.tensor([p[i] for p in points], dtype=torch.long, device=keys.device) for i in (1, 2))
        return {
            "centres": keys.clone(), "radii": torch.tensor(self.book.radii, dtype=keys.dtype, device=keys.device),
            "points": torch.stack([p[0] for p in points]), "cluster": cluster, "block": block,
        }  # fmt: skip
