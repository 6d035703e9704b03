"""What GRACE's codebook and MELO's vector store hold, and the rules by which texts are put in one after another; no training.

Source: GRACE (Hartvigsen et al., NeurIPS 2023) §3, MELO (Yu et al., AAAI 2024), and their released code.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
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
    """One text to write: its request's number in the patch, its tokens, what the key site read and gave at the last prompt token.

    ``beside``: what it read [C, I] and gave [C, O] there at the prompts of the request's contrast pairs.
    """

    request: int
    row: Encoded
    read: Tensor
    gave: Tensor
    beside: tuple[Tensor, Tensor] | None = None


class Insertion(NamedTuple):
    """What `KeyStore.place` did: the number of the key that is now the text's, of the one that was nearest, and its distance."""

    how: str
    number: int
    near: int
    rho: float


def _limit(key: Tensor, away: Tensor | None, share: float) -> float:
    """The largest radius of ``key`` that stays clear of the keys ``away`` [C, I]: ``share`` of the distance to the nearest of them."""
    if away is None or not len(away):
        return math.inf
    return share * float(torch.linalg.vector_norm(away - key, dim=1).min())


class KeyStore:
    """Keys [N, I], radii and labels while edits are put in one after another.  Numbers of keys never change.

    limits   how wide each radius may ever be; infinity where no contrast pair says so
    """

    def __init__(self, keys: Tensor, radii: Sequence[float], more: int, state: Mapping[str, Tensor]) -> None:
        self._keys = torch.cat([keys, keys.new_empty((more, keys.shape[1]))])
        self.radii, self.labels = list(radii), unpack(state["labels"]) if state else []
        self.limits = state["limits"].tolist() if "limits" in state else [math.inf] * len(self.radii)

    @property
    def keys(self) -> Tensor:
        return self._keys[: len(self.radii)]

    def state(self) -> dict[str, Tensor]:
        """What is needed to go on and not to be had from the ops."""
        limited = any(math.isfinite(most) for most in self.limits)
        return {"labels": pack(self.labels)} | ({"limits": torch.tensor(self.limits, dtype=torch.float64)} if limited else {})

    def add(self, query: Tensor, radius: float, label: tuple[int, ...], most: float = math.inf) -> int:
        self._keys[len(self.radii)] = query
        self.radii.append(min(radius, most))
        self.labels.append(label)
        self.limits.append(most)
        return len(self.radii) - 1

    def bound(self, number: int, radius: float, most: float) -> None:
        """The key's radius, and the limit that holds for it from now on."""
        self.radii[number], self.limits[number] = min(radius, most), most

    def place(
        self, query: Tensor, label: tuple[int, ...], radius: float, rounding: float, above: float, most: float = math.inf
    ) -> Insertion:
        """Put ``query`` in, whose radius may be ``most`` at most; what can be done, with ρ its distance from the nearest key j:

        added   nothing near: ρ > radius + ε_j
        split   near, another label: a new key; the two share the distance, ε_j ← ρ/2 − 1e-5, ε_new ← ρ/2 + ``above``
        taken   the same key (ρ within rounding) with another label: the entry is the new edit's, its radius stays.  Ours: as published
                the old radius would be −1e-5 and the new one 0, and neither would be hit again
        near    the same label: what happens is the method's
        """
        distance, number = nearest(self.keys, query[None])
        rho, j = float(distance), int(number)
        if j < 0 or rho > radius + self.radii[j]:
            return Insertion("added", self.add(query, radius, label, most), j, rho)
        if self.labels[j] == label:
            return Insertion("near", j, j, rho)
        if rounding and rho <= rounding * float(torch.linalg.vector_norm(query)):
            self.labels[j] = label
            self.bound(j, self.radii[j], most)
            return Insertion("taken", j, j, rho)
        self.radii[j] = min(rho / 2 - _SEAM, self.limits[j])
        return Insertion("split", self.add(query, rho / 2 + above, label, most), j, rho)


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
        self.book = KeyStore(keys, old["radii"].tolist() if old else [], len(texts), before.state if before else {})
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
        e, query, book = self.editor, text.read, self.book
        away = text.beside[0] if text.beside else None
        size, most = float(torch.linalg.vector_norm(query)), _limit(query, away, e.contrast_share)
        radius = _starting_radius(e.eps, size, most, e)
        how, entry, _, rho = book.place(query, text.row.target, radius, self.rounding, 0.0, most)
        if how == "near":
            held = min(book.limits[entry], _limit(book.keys[entry], away, e.contrast_share))
            if rho > held + self.rounding * size:
                how, entry = "added", book.add(query, radius, text.row.target, most)
            else:
                how = self._join(entry, query, rho, held)
        if how in ("added", "split", "taken"):
            start = text.gave.clone() if e.value == "warm" else _cold(e.seed, entry, text.gave)
            self.values[entry:] = [start] if how != "taken" else [start, *self.values[entry + 1 :]]
        self.counts[how] += 1

    def _join(self, entry: int, query: Tensor, rho: float, most: float) -> str:
        """A text of the entry's own label, within what its limit allows."""
        book = self.book
        expands = rho > book.radii[entry] + self.rounding * float(torch.linalg.vector_norm(query))
        radius = rho if expands else book.radii[entry]
        if expands and self.editor.expand == "moving_average":
            book.keys[entry] = (book.keys[entry] + query) / 2
            most -= self.editor.contrast_share * rho / 2  # no contrast key has come nearer than by the way moved
        book.bound(entry, radius, most)
        return "expanded" if expands else "joined"

    def notes(self) -> dict[str, Any]:
        """How entries came about, and the last loss and steps, averaged over those that trained."""
        count = max(1, len(self.done))
        loss, steps = (sum(d[i] for d in self.done) / count for i in (0, 1))
        return {"steps": steps, "loss": round(loss, 6), "entries": len(self.values), **self.counts, "lost": self.lost}


def _starting_radius(radius: float, size: float, most: float, editor: Any) -> float:
    """Of a new key of norm ``size``: ``radius`` in the editor's unit within its limit, or the limit itself."""
    published = radius * (size if editor.unit == "norm" else 1.0)
    return most if editor.contrast_grow and math.isfinite(most) else min(published, most)


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
        centres = old["centres"].to(like) if old else like.new_empty((0, len(like)))
        self.book = KeyStore(centres, old["radii"].tolist() if old else [], len(texts), before.state if before else {})
        self.members: list[list[tuple[Tensor, int]]] = [[] for _ in self.book.radii]  # (key, block) of each cluster's points
        if old:
            for key, cluster, block in zip(old["points"].to(like), old["cluster"].tolist(), old["block"].tolist(), strict=True):
                self.members[cluster].append((key, block))
        self.counts = dict.fromkeys(("added", "split", "taken", "joined", "forgotten"), 0)
        for text, key in zip(texts, keys, strict=True):
            self._put(key, text, self.first + text.request // editor.edits_per_block)

    def _put(self, key: Tensor, text: KeyedText, block: int) -> None:
        e, label = self.editor, text.row.target
        away = None if text.beside is None else text.beside[0 if e.reads == "input" else 1]
        most = _limit(key, away, e.contrast_share)
        radius = _starting_radius(e.radius, float(torch.linalg.vector_norm(key)), most, e)
        how, cluster, near, _ = self.book.place(key, label, radius, self.rounding, _SEAM, most)
        if how == "near" and not self._centre(cluster, key, radius, away):
            how, cluster = "added", self.book.add(key, radius, label, most)
        if how in ("added", "split"):
            self.members.append([])
        if how in ("split", "taken"):
            self._forget(near, everything=how == "taken")
        self.members[cluster].append((key, block))
        self.counts["joined" if how == "near" else how] += 1

    def _centre(self, cluster: int, key: Tensor, least: float, away: Tensor | None) -> bool:
        """The centre is the mean of the points, ``key`` among them, the radius reaches the farthest of them and is ``least`` at least,
        and the cluster's limit at most; False, and nothing done, where the limit leaves a point outside."""
        keys, book, share = torch.stack([*(k for k, _ in self.members[cluster]), key]), self.book, self.editor.contrast_share
        centre = keys.mean(0)
        farthest = float(torch.linalg.vector_norm(keys - centre, dim=1).max())
        moved = float(torch.linalg.vector_norm(centre - book.keys[cluster]))
        most = min(book.limits[cluster] - share * moved, _limit(centre, away, share))
        if farthest > most:
            return False
        book.keys[cluster] = centre
        book.bound(cluster, max(farthest, least), most)
        return True

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
