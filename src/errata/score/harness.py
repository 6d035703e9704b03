"""Tasks of EleutherAI's lm-evaluation-harness under a stack of patches: what edits cost in abilities that no edit is about.

    lm_eval.simple_evaluate(model=HarnessLM(lm, (patch,)), tasks=["piqa", …])

Needs the package lm-eval (0.4.3 or later).  The harness's own wrapper of transformers models does not do: it feeds context and
continuation as one text, and an op that acts on the prompt's last tokens, or decides on the prompt, has to know where that ends.

    loglikelihood          context and continuation are tokenised as one text and cut behind the context's tokens, blanks at the
                           context's end going to the continuation (the harness's rule); Σ ln p of the continuation, and whether each
                           of its tokens is the argmax
    loglikelihood_rolling  the whole text as output behind BOS, in windows of the model's length, every token counted once
    generate_until         greedy, up to one of ``until`` or EOS
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from errata.core.bank import Stack
from errata.core.greedy import argmax
from errata.core.model import LM
from errata.core.tokens import Encoded
from errata.errors import ConfigError

try:
    from lm_eval.api.model import TemplateLM  # type: ignore[import-not-found, unused-ignore]
except ImportError:
    raise ConfigError("errata.score.harness needs the package lm-eval; pip install 'errata[harness]'") from None

_NEW_TOKENS = 256  # of an answer, where a task does not say
LENGTH = 2048  # of a window, where the model does not say


class HarnessLM(TemplateLM):  # type: ignore[misc, unused-ignore]
    """A model for `lm_eval`: ``lm`` under ``stack`` (None: what is attached now); ``rows`` texts a batch."""

    def __init__(self, lm: LM, stack: Stack | None = None, rows: int = 16) -> None:
        super().__init__()
        self.lm, self.stack, self.rows = lm, lm.stack if stack is None else stack, rows
        self.tokenizer = lm.tokenizer
        self.length = lm.context_length or LENGTH

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def tokenizer_name(self) -> str:
        return self.lm.name.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **how: Any) -> list[int]:
        ids: list[int] = self.tokenizer(string, add_special_tokens=add_special_tokens is not False)["input_ids"]
        return ids

    def _loglikelihood_tokens(self, requests: Sequence[tuple[Any, list[int], list[int]]], **how: Any) -> list[tuple[float, bool]]:
        """(Σ ln p(continuation), greedy) of (texts, context ids, continuation ids); what does not fit is cut off in front."""
        rows = []
        for _, context, continuation in requests:
            kept = (*context, *continuation)[-self.length :]
            rows.append(Encoded(kept, max(1, len(kept) - len(continuation))))
        return self._read(rows, [len(row.target) for row in rows])

    @torch.no_grad()
    def _read(self, rows: Sequence[Encoded], counts: Sequence[int]) -> list[tuple[float, bool]]:
        """(Σ ln p, greedy) of the last ``counts[i]`` tokens of each row."""
        out: list[tuple[float, bool]] = [(0.0, True)] * len(rows)
        order = sorted((i for i in range(len(rows)) if counts[i]), key=lambda i: -len(rows[i].ids))
        for start in range(0, len(order), self.rows):
            part = order[start : start + self.rows]
            logits = self.lm.logits(self.lm.batch([rows[i] for i in part]), [self.stack])  # left-padded: rows end together
            for row, i in zip(logits, part, strict=True):
                target = torch.tensor(rows[i].ids[-counts[i] :], device=row.device)
                log_p = row[-counts[i] - 1 : -1].float().log_softmax(-1)
                said = float(log_p.gather(1, target[:, None]).double().sum())
                out[i] = said, bool((argmax(log_p) == target).all())
        return out

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Σ ln p of each text."""
        out, step = [], self.length - 1
        for (text,) in (request.args for request in requests):
            ids = (self.prefix_token_id, *self.tok_encode(text, add_special_tokens=False))
            ends = [min(start + step, len(ids)) for start in range(1, len(ids), step)]
            rows = [Encoded(ids[max(0, end - self.length) : end], 1) for end in ends]  # the last window with all the context it can have
            counts = [end - start for start, end in zip((1, *ends), ends, strict=False)]
            out.append(sum(said for said, _ in self._read(rows, counts)))
        return out

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy texts; a request's ``until``, ``max_gen_toks`` hold, and sampling is refused rather than ignored."""
        out = [""] * len(requests)
        groups: dict[tuple[tuple[str, ...], int], list[int]] = {}
        for i, request in enumerate(requests):
            how = dict(request.args[1])
            if how.get("do_sample") and how.get("temperature", 1.0) > 0:
                raise ConfigError(f"{self.lm.name}: a task asks for sampled text; only greedy decoding is offered here")
            until = how.get("until") or ()
            stop = (until,) if isinstance(until, str) else tuple(until)
            groups.setdefault((stop, int(how.get("max_gen_toks", _NEW_TOKENS))), []).append(i)
        for (stop, tokens), members in groups.items():
            for start in range(0, len(members), self.rows):
                part = members[start : start + self.rows]
                prompts = [requests[i].args[0] for i in part]
                said = self.lm.generate_ids(prompts, stacks=[self.stack], stop=stop, max_new_tokens=tokens)
                for i, ids in zip(part, said, strict=True):
                    text = str(self.tokenizer.decode(ids, skip_special_tokens=True))
                    out[i] = text[: min((text.find(s) for s in stop if s and s in text), default=len(text))]
        return out
