"""Causal tracing of single facts (Meng et al., NeurIPS 2022, "Locating and editing factual associations in GPT", section 2).

The clean run gives the answer (its likeliest next token) and ``high``, its probability.  The corrupted runs add noise

    ν ε,  ε ~ N(0, 1),  ν = noise · σ,  σ = standard deviation of the embeddings of all facts' subject tokens

to the output of the embedding module at the subject's tokens; ``low`` is the answer's mean probability over them.  A *cell*
(kind, token, block) is a corrupted run in which one state is put back to its clean value at one token:

    hidden      the output of block b
    mlp, attn   the output of the linear that writes to the residual stream, in the blocks [b − ⌊w/2⌋, b + ⌈w/2⌉) of a window w

and its score is the answer's mean probability again.  Score − low is the indirect effect.

What is computed: tokens before the subject are as in the clean run, so their keys and values are made once and their cells are
``low``; blocks below the first one that a cell restores are as in the corrupted run, so they are not run again.  The rest, cells times
noise samples, goes through the model as rows of a few large batches.

σ is measured where the noise is added.  A model that scales embeddings after the embedding module scales both alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Final

import torch
from torch import Tensor

from errata.core.bank import Plan
from errata.core.decode import can_fork, fork
from errata.core.families import by_row, hidden_of, resolve
from errata.core.model import LM
from errata.core.patch import Site
from errata.core.roles import ranges
from errata.core.tail import empty_like, skip_blocks, splits
from errata.core.tokens import Encoded, encode, subject_span
from errata.errors import InputError, ModelError
from errata.trace.facts import Fact, FactTrace, Skipped, TraceConfig, TraceResult, around, default_window

_POINTS: Final = {"mlp": "mlp_down", "attn": "attn_out"}
_SPACES: Final = 2  # tokens of nothing but space that may stand before the answer
Progress = Callable[[str, int, int], None]  # (stage, done, total)


@torch.no_grad()
def trace(lm: LM, facts: Sequence[Fact], settings: TraceConfig | None = None, progress: Progress | None = None) -> TraceResult:
    """Trace facts in the base; patches that are attached stand aside.

    A fact with an expected answer is traced only if the clean run's likeliest token is the answer's first one; others are listed
    in ``skipped``.  `InputError` if none is left.
    """
    how, tell = settings or TraceConfig(), progress or (lambda stage, done, total: None)
    if not facts:
        raise InputError("there is no fact to trace; give a prompt and its subject")
    if lm.family.idle:
        raise ModelError(f"{lm.family.name}: blocks {ranges(lm.family.idle)} run beside an image only; a text can't be traced through it")
    encoded = encode(lm.tokenizer, [f.prompt for f in facts])  # one that does not fit is skipped
    spans = [subject_span(lm.tokenizer, f.prompt, f.subject, occurrence=f.occurrence) for f in facts]
    window = how.window or default_window(lm.depth)
    deviation = _deviation(lm, encoded, spans)
    found: list[FactTrace] = []
    skipped: list[Skipped] = []
    with lm.running(Plan()):
        for i, (fact, row, span) in enumerate(zip(facts, encoded, spans, strict=True)):
            tell("facts", i, len(facts))
            run = _clean(lm, fact, row, span, how, window)
            if isinstance(run, str):
                skipped.append(Skipped(fact, run))
                continue
            low, scores = run.restore(how.noise * deviation, tell)
            tokens = tuple(lm.tokenizer.decode([t]) for t in run.ids)
            found.append(FactTrace(fact, tokens, span, lm.tokenizer.decode([run.answer]), run.high, low, scores))
        tell("facts", len(facts), len(facts))
    if not found:
        first = skipped[0]
        raise InputError(f"none of {len(facts)} fact(s) can be traced; {first.fact.prompt!r}: {first.reason}")
    return TraceResult(how, window, lm.depth, deviation, tuple(found), tuple(skipped))


def _deviation(lm: LM, encoded: Sequence[Encoded], spans: Sequence[tuple[int, int]]) -> float:
    """σ over all numbers of the embedding outputs of all subject tokens, a token as often as it occurs."""
    ids = [t for row, (start, end) in zip(encoded, spans, strict=True) for t in row.ids[start:end]]
    out: Tensor = resolve(lm.hf, lm.family.embedding)(torch.tensor([ids], device=lm.device))
    return float(out.double().std())


def _clean(lm: LM, fact: Fact, row: Encoded, span: tuple[int, int], how: TraceConfig, window: int) -> _Run | str:
    """The clean run, or why the fact is skipped.

    A space that is a token of its own says nothing of the answer: where the model goes on with one, the prompt is read with it.
    """
    limit = lm.context_length
    if limit is not None and len(row.ids) + _SPACES > limit:
        return f"its {len(row.ids)} tokens are too many for the model's {limit} positions"
    run = _Run(lm, row.ids, span, how, window)
    for _ in range(_SPACES):
        if _blank(lm, run.answer):
            run = _Run(lm, (*run.ids, run.answer), span, how, window)
    if fact.answer is None:
        return run
    target = lm.encode([fact.prompt], [fact.answer])[0].target
    wanted = next((t for t in target if not _blank(lm, t)), target[0])
    if run.answer == wanted:
        return run
    texts = [lm.tokenizer.decode([t]) for t in (run.answer, wanted)]
    return f"the model goes on with {texts[0]!r}, expected was {texts[1]!r} (the answer {fact.answer!r})"


def _blank(lm: LM, token: int) -> bool:
    return token not in lm.tokenizer.all_special_ids and not lm.tokenizer.decode([token]).strip(" ")


class _Run:
    """The clean run of one fact, made at once, and the restored ones (`restore`).

    Only the A *active* tokens, from the subject's first on, ever run again.  ``clean[kind, block]`` is [1, A, D].
    """

    def __init__(self, lm: LM, ids: Sequence[int], span: tuple[int, int], how: TraceConfig, window: int) -> None:
        self.lm, self.how, self.span, self.window, self.ids = lm, how, span, window, tuple(ids)
        whole = torch.tensor([ids], device=lm.device)
        self.mask, self.active, self.cache = torch.ones_like(whole), whole[:, span[0] :], None
        if span[0]:
            out = lm.forward(whole[:, : span[0]], self.mask[:, : span[0]], use_cache=True, **lm.last_logits_kwargs)
            self.cache = out.past_key_values
        if not splits(lm, lm.depth // 2) or (self.cache is not None and not can_fork(self.cache)):
            raise ModelError(f"{lm.family.name}: tracing goes on from blocks and tokens that have run, and this model keeps more of them")
        with self._recording(how.kinds) as self.clean:
            last = self._forward(1)
        self.answer = int(last.argmax(-1))
        self.high = float(last.softmax(-1)[0, self.answer])
        if not math.isfinite(self.high):
            raise ModelError(f"the model gives NaN for a prompt of {len(ids)} tokens in {lm.dtype}; load it with --dtype float32")

    def _forward(self, count: int) -> Tensor:
        """[count, V] logits after the last token, float32 or better, under the hooks that are on."""
        self.count = count
        more: dict[str, Any] = {"use_cache": False}
        if self.cache is not None:
            cache = fork(self.cache)
            for layer in cache.layers:  # views: appending makes new tensors anyway
                layer.keys, layer.values = layer.keys.expand(count, -1, -1, -1), layer.values.expand(count, -1, -1, -1)
            more = {"past_key_values": cache, "use_cache": True}
        out = self.lm.forward(self.active.expand(count, -1), self.mask.expand(count, -1), **more, **self.lm.last_logits_kwargs)
        last: Tensor = out.logits[:, -1]
        return last.to(torch.promote_types(last.dtype, torch.float32))

    @contextmanager
    def _recording(self, kinds: Sequence[str]) -> Iterator[dict[tuple[str, int], Tensor]]:
        """States [B, A, D] of the kinds and of "hidden", filled by what runs inside."""
        seen: dict[tuple[str, int], Tensor] = {}

        def keep(kind: str, block: int) -> Any:
            def hook(_: Any, __: Any, output: Any) -> None:
                if kind == "hidden":
                    self.like = empty_like(output)
                seen[kind, block] = by_row(hidden_of(output), self.count, None, _site(kind, block))

            return hook

        with ExitStack() as exits:
            for block in range(self.lm.depth):
                for kind in {"hidden", *kinds}:
                    exits.callback(self.lm.module(_site(kind, block)).register_forward_hook(keep(kind, block)).remove)
            yield seen

    @contextmanager
    def _noisy(self, noise: Tensor) -> Iterator[None]:
        """``noise`` [B, n, D] on the embedding output at the n subject tokens, which are the first active ones."""

        def hook(_: Any, __: Any, output: Tensor) -> Tensor:
            return torch.cat([output[:, : noise.shape[1]] + noise.to(output), output[:, noise.shape[1] :]], 1)

        handle = resolve(self.lm.hf, self.lm.family.embedding).register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()

    def _corrupt(self, scale: float) -> tuple[Tensor, list[Tensor]]:
        """Noise [S, n, D], then runs without restoring: the answer's probability [S] and the blocks' outputs, L times [S, A, D]."""
        generator = torch.Generator().manual_seed(self.how.seed)
        shape = (self.how.samples, self.span[1] - self.span[0], self._width())
        self.noise = scale * torch.randn(shape, generator=generator).double()
        parts, states = [], []
        for noise in torch.split(self.noise, self.how.rows):
            with self._noisy(noise), self._recording(()) as seen:
                parts.append(self._forward(len(noise)).softmax(-1)[:, self.answer])
            states.append([seen["hidden", b] for b in range(self.lm.depth)])
        return torch.cat(parts), [torch.cat(same) for same in zip(*states, strict=True)]

    def _width(self) -> int:
        return int(resolve(self.lm.hf, self.lm.family.embedding).weight.shape[-1])

    def _cells(self) -> Tensor:
        """[C, 5] kind, active token, block, and the blocks [begin, end) it restores; begin = end = block + 1 for hidden, so that
        begin is always the first block that has to run."""
        depth = self.lm.depth
        spans = [
            (k, b, *((b + 1, b + 1) if kind == "hidden" else around(b, self.window, depth)))
            for k, kind in enumerate(self.how.kinds)
            for b in range(depth)
        ]
        return torch.tensor([(k, t, b, begin, end) for k, b, begin, end in spans for t in range(self.active.shape[1])])

    def restore(self, scale: float, tell: Progress) -> tuple[float, Tensor]:
        """(low, scores [K, T, L]) under noise of standard deviation ``scale``."""
        low, self.corrupt = self._corrupt(scale)
        cells, samples = self._cells(), self.how.samples
        scores = torch.empty((len(cells), samples), dtype=low.dtype, device=low.device)
        done = 0
        for begin in sorted(set(cells[:, 3].tolist())):
            mine = (cells[:, 3] == begin).nonzero().squeeze(1)
            pairs = torch.cartesian_prod(mine, torch.arange(samples))
            for part in torch.split(pairs, self.how.rows):
                cell, sample = part.unbind(1)
                scores[cell.to(low.device), sample.to(low.device)] = self._restored(begin, cells[cell], sample)
                done += len(part)
                tell("cells × noise samples", done, scores.numel())
        mean = float(low.double().mean())
        out = torch.full((len(self.how.kinds), len(self.ids), self.lm.depth), mean, dtype=torch.float64)
        out[cells[:, 0], self.span[0] + cells[:, 1], cells[:, 2]] = scores.double().mean(1).cpu()
        return mean, out

    def _restored(self, begin: int, cells: Tensor, sample: Tensor) -> Tensor:
        """[B] probability of the answer: row i restores ``cells[i]`` under noise ``sample[i]``; blocks below ``begin`` do not run."""
        kind, token = cells[:, 0], cells[:, 1]
        with ExitStack() as exits:
            if begin:
                hidden = self.corrupt[begin - 1][sample.to(self.corrupt[begin - 1].device)]
                if "hidden" in self.how.kinds:
                    rows = (kind == self.how.kinds.index("hidden")).nonzero().squeeze(1)
                    hidden[rows, token[rows]] = self.clean["hidden", begin - 1][0, token[rows]]
                exits.enter_context(skip_blocks(self.lm.blocks[:begin], hidden, self.like))
            else:
                exits.enter_context(self._noisy(self.noise[sample]))
            for name in (n for n in self.how.kinds if n != "hidden"):
                for block in range(begin, self.lm.depth):
                    on = (kind == self.how.kinds.index(name)) & (block < cells[:, 4])
                    if bool(on.any()):
                        site = _site(name, block)
                        hook = _put(self.clean[name, block], on.nonzero().squeeze(1), token[on], len(cells), site)
                        exits.callback(self.lm.module(site).register_forward_hook(hook).remove)
            return self._forward(len(cells)).softmax(-1)[:, self.answer]


def _site(kind: str, block: int) -> Site:
    return Site(block, _POINTS.get(kind, "block"))


def _put(clean: Tensor, rows: Tensor, token: Tensor, count: int, site: Site) -> Any:
    """A hook that sets the output at (rows, token) to the clean one [1, A, D]."""

    def hook(_: Any, __: Any, output: Tensor) -> Tensor:
        out: Tensor = by_row(output, count, None, site).clone()
        out[rows, token] = clean[0, token]
        return out.reshape(output.shape)

    return hook
