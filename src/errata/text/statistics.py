"""Second moments of a linear's inputs over text: C = E[k kᵀ], uncentred, over every token that is not padding.

Source: ROME §3.1 (C is estimated over Wikipedia, 100,000 samples).  Kept in a cache by content: another model, text, token count or site is
another file, and a file is refused for any model but its own.  A computation that was stopped goes on where it was.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from errata import storage
from errata.config import digest
from errata.core import experts
from errata.core.experts import ExpertInputs
from errata.core.families import linear_sizes
from errata.core.model import LM
from errata.core.patch import Site
from errata.core.read import activation_hooks
from errata.core.tokens import Encoded
from errata.core.window import beginnings
from errata.errors import DiskError, InputError, ModelError, PatchError, StorageError
from errata.text.corpora import Corpus, open_corpus

TOKENS = 100_000
LENGTH = 512  # tokens of a text at most
_BATCH_TOKENS = 4_096  # of one pass: what bounds the memory beside the sums themselves
WINDOW = 256  # texts tokenised at once, packed into batches by length, and counted as done together
SAVE_SECONDS = 30.0
Progress = Callable[[int, int], None]  # (tokens read, tokens wanted)


@dataclass
class Moments:
    """C [I, I] of one site, mean over ``tokens`` keys, and what it was made of.

    Of experts (`errata.core.experts`) C [E, I, I]: the E[g_j² k_j k_jᵀ] of each, the diagonal blocks of E[κ κᵀ]; what two experts have in
    common is left out.  Factors are made once, in float64: `solve` and `eigen` keep theirs.
    """

    site: Site
    second_moment: Tensor
    tokens: int
    base: str
    corpus: str
    _factor: dict[tuple[float, int], Tensor] = field(default_factory=dict, repr=False)
    _eigen: tuple[Tensor, Tensor] | None = field(default=None, repr=False)

    def solve(self, x: Tensor, ridge: float = 0.0) -> Tensor:
        """(C + ridge·I)⁻¹ x, x [I, n], in float64 by Cholesky.

        Where C is singular (fewer tokens than inputs, dead neurons) the smallest ridge of 1e-9, 1e-8 … times its mean diagonal
        that makes it positive definite is added.
        """
        count = len(self._blocks)
        parts = x.double().reshape(count, -1, x.shape[1])
        return torch.cat([part if count > 1 and not part.any() else self._solve(j, part, ridge) for j, part in enumerate(parts)])

    def _solve(self, block: int, x: Tensor, ridge: float) -> Tensor:
        if (ridge, block) not in self._factor:
            self._factor[ridge, block] = _cholesky(self._blocks[block].double(), ridge, float(self._diagonal.mean()))
        return torch.cholesky_solve(x, self._factor[ridge, block].to(x.device))

    @property
    def _blocks(self) -> Tensor:
        return self.second_moment if self.second_moment.ndim == 3 else self.second_moment[None]

    @property
    def _diagonal(self) -> Tensor:
        return self._blocks.double().diagonal(dim1=-2, dim2=-1)

    def eigen(self) -> tuple[Tensor, Tensor]:
        """(eigenvalues ascending [I], eigenvectors [I, I] in columns) of C, float64; [E, I] and [E, I, I] of experts."""
        if self._eigen is None:
            values, vectors = torch.linalg.eigh(self.second_moment.double())
            self._eigen = values.clamp_min(0), vectors
        return self._eigen

    def null_space(self, threshold: float = 2e-2, share: float | None = None) -> Tensor:
        """U₀ [I, m]: eigenvectors with an eigenvalue below ``threshold`` (AlphaEdit), or the ``share`` of directions with the smallest.

        P = U₀ U₀ᵀ.  The threshold is on the scale of the keys themselves, so look at m / I before you trust it.
        """
        (only,) = self.null_spaces(threshold, share)
        return only

    def null_spaces(self, threshold: float = 2e-2, share: float | None = None) -> list[Tensor]:
        """`null_space` of each expert; of a linear the one."""
        values, vectors = (t.view(len(self._blocks), *t.shape[-n:]) for n, t in enumerate(self.eigen(), 1))
        kept = [int((own < threshold).sum()) if share is None else round(share * len(own)) for own in values]
        return [own[:, :n] for own, n in zip(vectors, kept, strict=True)]


def _cholesky(c: Tensor, ridge: float, scale: float) -> Tensor:
    eye = torch.eye(len(c), dtype=c.dtype, device=c.device)
    for jitter in (0.0, *(10.0**e for e in range(-9, -2))):
        factor, info = torch.linalg.cholesky_ex(c + (ridge + jitter * scale) * eye)
        if int(info) == 0 and bool(torch.isfinite(factor).all()):
            out: Tensor = factor
            return out
    raise ModelError("the second moments are not positive definite; make them again from more text (`errata stats`)")


def moments(
    lm: LM,
    sites: Sequence[Site],
    source: str | Corpus = "bundled",
    *,
    tokens: int = TOKENS,
    batch_tokens: int = _BATCH_TOKENS,
    seed: int = 0,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> dict[Site, Moments]:
    """{site: moments} of the unedited model over ``tokens`` tokens of a text (see `errata.text.corpora.open_corpus`).

    What the cache holds is read; all other sites are made together in one pass over the text and put there.
    """
    if tokens < 1:
        raise InputError(f"tokens must be at least 1, not {tokens}")
    corpus = open_corpus(source) if isinstance(source, str) else source
    known = {site: ("moments", site, corpus.digest, tokens, seed) for site in sites}
    if all(key in lm.base_cache for key in known.values()):
        return {site: lm.base_cache[key] for site, key in known.items()}
    folder = (cache or storage.cache_folder()) / "stats"
    precision = torch.promote_types(torch.float32, lm.dtype)
    job = {"base": lm.fingerprint, "corpus": corpus.digest, "tokens": tokens, "length": LENGTH, "seed": seed, "dtype": str(precision)}
    name = digest(job)
    paths = {site: folder / f"{lm.fingerprint}-{site.block}.{site.point}-{name}.safetensors" for site in sites}
    found = {site: load(path, lm, site) for site, path in paths.items() if path.exists()}
    missing = [site for site in dict.fromkeys(sites) if site not in found]
    if missing:
        pass_ = _Pass(lm, missing, corpus, tokens, batch_tokens, seed, precision)
        partial = folder / f"partial-{digest({**job, 'sites': [(s.block, s.point) for s in missing]})}.safetensors"
        for site, second in pass_.run(partial, progress).items():
            found[site] = Moments(site, second.cpu(), pass_.read, lm.fingerprint, corpus.digest)
            save(found[site], paths[site])
        partial.unlink(missing_ok=True)
    lm.base_cache |= {known[site]: each for site, each in found.items()}
    return found


class _Pass:
    """One pass over a text; sums of k kᵀ at several sites."""

    def __init__(
        self, lm: LM, sites: Sequence[Site], corpus: Corpus, tokens: int, batch_tokens: int, seed: int, precision: torch.dtype
    ) -> None:
        self.lm, self.sites, self.corpus, self.wanted, self.batch_tokens = lm, list(sites), corpus, tokens, batch_tokens
        for site in sites:
            lm.check_site(site)
        self.order = list(range(len(corpus.texts)))
        random.Random(seed).shuffle(self.order)
        self.sums = {site: torch.zeros(_shape(lm, site), dtype=precision, device=lm.device) for site in sites}
        self.read, self.windows = 0, 0  # tokens counted, windows of texts finished

    def run(self, partial: Path, progress: Progress | None) -> dict[Site, Tensor]:
        """{site: C}.  Sums are put into ``partial`` now and then, and taken from there after a stop."""
        self._resume(partial)
        saved = time.monotonic()
        while self.read < self.wanted and self.windows * WINDOW < len(self.order):
            window = self.order[self.windows * WINDOW : (self.windows + 1) * WINDOW]
            for rows in self._batches([self.corpus.texts[i] for i in window]):
                self._add(rows)
                if progress is not None:
                    progress(min(self.read, self.wanted), self.wanted)
                if self.read >= self.wanted:
                    break
            self.windows += 1
            if time.monotonic() - saved > SAVE_SECONDS and self.read < self.wanted:
                self._keep(partial)
                saved = time.monotonic()
        if not self.read:
            raise InputError(f"{self.corpus.name}: holds no text; give a file with words in it")
        return {site: total / self.read for site, total in self.sums.items()}

    def _batches(self, texts: Sequence[str]) -> Iterator[list[tuple[int, ...]]]:
        """Rows of at most `LENGTH` tokens (what the model can take, if less), packed by length up to ``batch_tokens``, padding counted."""
        rows = sorted((e.ids for e in beginnings(self.lm, [t for t in texts if t.strip()], LENGTH)), key=len)
        batch: list[tuple[int, ...]] = []
        for row in rows:
            if batch and (len(batch) + 1) * len(row) > self.batch_tokens:
                yield batch
                batch = []
            batch.append(row)
        if batch:
            yield batch

    def _add(self, rows: list[tuple[int, ...]]) -> None:
        batch = self.lm.batch([Encoded(r, len(r)) for r in rows], side="right").to(self.lm.device)
        real = batch.mask.bool()

        def add(site: Site, x: Any, _: Tensor) -> None:
            total = self.sums[site]
            served = x.served() if isinstance(x, ExpertInputs) else ((None, None, x[real]),)
            for expert, tokens, keys in served:
                keys = (keys if tokens is None else keys[real.flatten()[tokens]]).to(total.dtype)
                (total if expert is None else total[expert]).addmm_(keys.T, keys)

        with torch.no_grad(), self.lm.running(self.lm.plan([()], None, len(rows))), activation_hooks(self.lm, self.sites, len(rows), add):
            self.lm.forward(batch.ids, batch.mask, use_cache=False, **self.lm.last_logits_kwargs)
        self.read += int(real.sum())

    def _keep(self, partial: Path) -> None:
        tensors = {f"{s.block}.{s.point}": t for s, t in self.sums.items()}
        _write(partial, tensors, {"read": str(self.read), "windows": str(self.windows)})

    def _resume(self, partial: Path) -> None:
        if not partial.exists():
            return
        try:
            tensors, meta = _read(partial)
            sums = {s: tensors[f"{s.block}.{s.point}"].to(self.lm.device) for s in self.sites}
            self.read, self.windows, self.sums = int(meta["read"]), int(meta["windows"]), sums
        except (StorageError, KeyError, ValueError):
            partial.unlink(missing_ok=True)  # a damaged beginning is only work lost: start anew


def _shape(lm: LM, site: Site) -> tuple[int, ...]:
    """Of a site's C."""
    if site.point == experts.POINT:
        count, size, _ = experts.sizes(lm.module(site))
        return count, size, size
    size = linear_sizes(lm.module(site))[0]
    return size, size


def _write(path: Path, tensors: dict[str, Tensor], meta: dict[str, str]) -> None:
    from safetensors.torch import save as pack

    blob = pack({k: t.detach().cpu().contiguous() for k, t in tensors.items()}, {**meta, "errata": "moments"})
    try:
        storage.put(path, blob)
    except OSError as error:
        advice = f"{storage.advice(error)}, or set ERRATA_CACHE to another place"
        raise DiskError(f"{path}: nothing was written ({error.strerror}); {advice}") from None


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return {k: file.get_tensor(k) for k in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise StorageError(f"{path}: damaged or truncated ({error}); delete it and run `errata stats` again") from None


def save(found: Moments, path: Path) -> None:
    """One site's moments as safetensors; written beside and renamed."""
    where = {"block": str(found.site.block), "point": found.site.point}
    _write(path, {"second": found.second_moment}, {"base": found.base, "corpus": found.corpus, "tokens": str(found.tokens), **where})


def load(path: Path, lm: LM, site: Site) -> Moments:
    """Moments from a file; `PatchError` when they are another model's or another site's, `StorageError` when damaged."""
    tensors, meta = _read(path)
    if meta.get("base") != lm.fingerprint or (meta.get("block"), meta.get("point")) != (str(site.block), site.point):
        raise PatchError(
            f"{path}: moments of model {meta.get('base')} at block {meta.get('block')} ({meta.get('point')}), "
            f"not of {lm.fingerprint} at block {site.block} ({site.point}); make them for this model with `errata stats`"
        )
    second = tensors.get("second")
    if second is None or second.shape != _shape(lm, site) or not bool(torch.isfinite(second).all()):
        raise StorageError(f"{path}: damaged; delete it and run `errata stats` again")
    return Moments(site, second, int(meta["tokens"]), meta["base"], meta["corpus"])
