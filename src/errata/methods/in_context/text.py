"""What in-context editors share: templates, the op, and vectors of texts."""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from errata.core.chat import bos_opens_turns
from errata.core.embed import embed
from errata.core.model import LM
from errata.core.patch import PROMPT, Op
from errata.core.sites import check_block
from errata.core.tokens import Encoded, join, pieces
from errata.errors import ConfigError, ModelError, PatchError

AT_ONCE = 64  # texts of one pass
LONGEST = 256  # tokens of a text that are read for its vector
DEPTH = 7 / 8  # the almanac's dev split: prompts are told apart best late, but the last block is free to say only what comes next


def blank(name: str, field: str, template: str, names: Sequence[str]) -> None:
    """`ConfigError` unless the template has these blanks and no others."""
    try:
        found = {part for _, part, _, _ in string.Formatter().parse(template) if part is not None}
    except ValueError as error:
        raise ConfigError(f"{name}: {field} {template!r} is no template ({error}); write a brace as two") from None
    if found != set(names):
        raise ConfigError(f"{name}: {field} must have the blanks {', '.join('{' + n + '}' for n in names)}; got {template!r}")


def beside(template: str, blanks: tuple[str, str], prompt: str, target: str) -> str:
    """The template with its two blanks, where a space alone parts them, as one writes this prompt and target (`tokens.join`)."""
    spaced, tight = (between.join(f"{{{name}}}" for name in blanks) for between in (" ", ""))
    text, end = join(prompt, target)
    return template if text[end : end + 1].isspace() else template.replace(spaced, tight)


def block_for(lm: LM, editor: Any) -> int:
    """The block whose states are read: ``editor.block``, or the one at 7/8 of the depth; `ConfigError` where there is none."""
    block: int = lm.nearest_block(int(DEPTH * lm.depth)) if editor.block is None else editor.block
    try:
        check_block(lm, block)
    except PatchError as error:
        raise ConfigError(f"{editor.name}: {error}; set block for this model") from None
    return block


def context_op(lm: LM, editor: Any, shown: Sequence[str], facts: Sequence[str], retrieval: Any = None) -> Op:
    """The op that puts texts in front, demonstrations first; a `ConfigError` where a fact alone is over budget."""
    rows, cue = pieces(lm.tokenizer, [*shown, *facts]), pieces(lm.tokenizer, [editor.cue])[0]
    room = editor.context_budget(lm)
    longest = max(len(row) for row in rows[len(shown) :]) + len(cue)
    if longest > room:
        raise ConfigError(
            f"{editor.name}: a fact of {longest} tokens (with its cue) is over the budget of {room} tokens of context; raise budget or "
            "shorten the fact"
        )
    bos = None if bos_opens_turns(lm.tokenizer) else lm.tokenizer.bos_token_id
    settings = {
        "cue": list(cue), "bos": bos, "budget": room, "demonstrations": len(shown), "retrieval": retrieval
    }  # fmt: skip
    return Op("context", PROMPT, {"texts": padded(rows), "lengths": torch.tensor([len(r) for r in rows])}, settings)


def padded(rows: Sequence[Sequence[int]]) -> Tensor:
    """[M, L] of ragged rows, zeros on the right."""
    wide = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (wide - len(row))] for row in rows])


def _passes(lm: LM, rows: Sequence[Encoded]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(ids, position, lengths) of batches of texts, each cut to its last `LONGEST` tokens or what the model has room for."""
    most = min(LONGEST, lm.context_length or LONGEST)
    rows = [Encoded(r.ids[-most:], min(len(r.ids), most)) for r in rows]
    out = []
    for start in range(0, len(rows), AT_ONCE):
        batch = lm.batch(rows[start : start + AT_ONCE]).to(lm.device)
        out.append((batch.ids, (batch.mask.cumsum(1) - 1).masked_fill(batch.mask == 0, -1), batch.prompt_lengths))
    return out


def vectors(lm: LM, texts: Sequence[str], how: dict[str, Any]) -> Tensor:
    """Unit vectors [N, D] of texts, on the CPU (`errata.core.embed`); `ModelError` where the model says NaN."""
    found = [embed(lm.hf, lm.family, lm.tokenizer, *one, how) for one in _passes(lm, lm.encode(texts))]
    out = torch.cat(found).cpu()
    if not bool(torch.isfinite(out).all()):
        broken = int((~torch.isfinite(out)).any(1).nonzero()[0])
        raise ModelError(f"the model gives NaN for {texts[broken]!r} in {lm.dtype}; load it with --dtype float32")
    return out
