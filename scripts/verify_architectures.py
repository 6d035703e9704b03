"""Try errata on many architectures of the installed transformers, and write what held into ``docs/architectures.json``; ``make docs`` makes the table.

    python scripts/verify_architectures.py                  # all of tests/architectures.py: about eight minutes on one core
    python scripts/verify_architectures.py --only opt mamba # some; the others stay as they are in the file

The models are tiny and untrained.  A cell is right (""), a refusal (what errata says, which must be one of its own errors), or a fault.

inspect   every block's parts are named, or said to be missing
padding   a padded batch gives, row by row, the logits that plain transformers gives for the row alone
cache     generated tokens are those of whole texts, computed anew for each token by plain transformers
METHOD    it makes a patch that changes the logits; under it padded rows are as alone and cached answers as uncached; taken off, logits
          and all weights are bit for bit as before
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import torch
import transformers
from verify_families import PROMPTS, forward_fault, method_fault

from errata.core.bank import Stack
from errata.core.describe import describe, linears, points
from errata.core.model import LM
from errata.errors import ErrataError
from errata.request import EditRequest

FILE = Path(__file__).resolve().parents[1] / "docs" / "architectures.json"
METHODS = ("baft", "rome", "memit", "lora", "grace", "wise")
CELLS = ("inspect", "padding", "cache", *METHODS)
REQUEST = EditRequest("The capital of France is", "Rome", "France", unrelated=(("The capital of Japan is", "Tokyo"),))
_TOKENS = 3
_NEAR = 1e-3  # of the largest logit, in float32: a change of these small keys is 10^4 times as large as what it reads, and rounds so


def cell(check: Callable[[], str | None]) -> dict[str, str]:
    """What a check found, as it is written."""
    try:
        fault = check()
    except ErrataError as error:
        return {"refused": str(error)}
    except Exception as error:  # whatever it stumbles over is a fault, with its name
        return {"fault": f"{type(error).__name__}: {error}".splitlines()[0]}
    return {"fault": fault} if fault else {}


def inspected(lm: LM) -> str | None:
    told = describe(lm)
    missing = [b for b, own in enumerate(points(lm)) if not any(own.values()) and b not in lm.family.idle]
    if missing or not linears(lm):
        return f"block {missing} has no part with a name"
    return None if lm.family.blocks in told else "the blocks are not told"


def cached(lm: LM, stack: Stack = ()) -> str | None:
    """Greedy tokens against whole texts: of plain transformers without a stack, of errata's uncached logits under one."""
    eos = lm.tokenizer.eos_token_id
    found = lm.generate_ids(PROMPTS, stacks=[stack], rows=[0] * len(PROMPTS), max_new_tokens=_TOKENS, stop=())
    for prompt, ids in zip(PROMPTS, found, strict=True):
        text = lm.encode([prompt])[0]
        wanted: list[int] = []
        while len(wanted) < _TOKENS:
            row = torch.tensor([[*text.ids, *wanted]])
            if stack:
                plan = lm.plan([stack], None, 1)
                plan.prompt_lengths = torch.tensor([text.prompt_length])
                with torch.no_grad(), lm.running(plan):
                    logits = lm.forward(row, torch.ones_like(row), use_cache=False).logits
            else:
                logits = lm.hf(input_ids=row).logits
            token = int(logits[0, -1].argmax())
            if token == eos:
                break
            wanted.append(token)
        if ids != wanted:
            return f"{prompt!r}: cached {ids}, whole texts {wanted}"
    return None


def padded(lm: LM, stack: Stack) -> str | None:
    """Rows of a padded batch under a stack against each row alone."""
    rows = lm.encode(PROMPTS)
    batch = lm.batch(rows)
    found = lm.logits(batch, [stack], [0] * len(rows))
    for row, logits, mask in zip(rows, found, batch.mask.bool(), strict=True):
        alone = lm.logits(lm.batch([row]), [stack])[0]
        if not float((logits[mask] - alone).abs().max()) <= _NEAR * float(alone.abs().max()):
            return "under the patch a padded row is not as alone"
    return None


def settings(lm: LM, method: str) -> dict[str, Any]:
    """Those of the laws, in a block that has what the method needs, where any has."""
    there = [b for b, own in enumerate(points(lm)) if own["mlp_down"]][:-1] or [0]
    return {
        "baft": {},
        "rome": {"layers": there[:1]},
        "memit": {"layers": there[:1]},
        "lora": {"targets": ["mlp_down|attn_out"], "layers": [lm.nearest_block(1)]},
        "grace": {"layer": there[0]},
        "wise": {"layer": there[0], "activation": "input"},
    }[method]


def edited(lm: LM, method: str) -> str | None:
    import laws

    weights = {name: t.clone() for name, t in lm.hf.state_dict().items()}
    stack = tuple(laws.editor(method, **settings(lm, method)).edit_each(lm, [REQUEST]))
    made = SimpleNamespace(name=method, edit_each=lambda lm, requests: stack)
    return method_fault(lm, made, [REQUEST], weights) or padded(lm, stack) or cached(lm, stack)


def verify(name: str, methods: Sequence[str] = METHODS) -> dict[str, dict[str, str]]:
    """{cell: what was found} of one architecture."""
    import architectures
    from families import tokenizer

    def fresh() -> LM:
        return LM(architectures.build(name), tokenizer(), name)

    checks: dict[str, Callable[[LM], str | None]] = {
        "inspect": inspected,
        "padding": lambda lm: forward_fault(lm, "float32"),
        "cache": cached,
    }
    checks |= {method: functools.partial(edited, method=method) for method in methods}
    return {key: cell(lambda check=check: check(fresh())) for key, check in checks.items()}  # type: ignore[misc]


def read(path: Path = FILE) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    import architectures

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=architectures.EVERY, help="these architectures only")
    parser.add_argument("--out", type=Path, default=FILE, metavar="FILE", help="where to write (docs/architectures.json)")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    found = read(args.out)["architectures"] if args.out.exists() else {}
    for name in args.only or architectures.EVERY:
        found[name] = verify(name)
        bad = {key: own for key, own in found[name].items() if "fault" in own}
        print(
            f"{name}: {'; '.join(f'{k}: {v}' for k, v in bad.items()) or 'no fault'}, {sum(1 for v in found[name].values() if v)} refused",
            flush=True,
        )
        ordered = {key: found[key] for key in architectures.EVERY if key in found}
        lines = ",\n".join(f"    {json.dumps(key)}: {json.dumps(own, ensure_ascii=False)}" for key, own in ordered.items())
        versions = f'"torch": {json.dumps(torch.__version__)}, "transformers": {json.dumps(transformers.__version__)}'
        args.out.write_text(f'{{\n  {versions},\n  "architectures": {{\n{lines}\n  }}\n}}\n', encoding="utf-8")
    return int(any("fault" in own for row in found.values() for own in row.values()))


if __name__ == "__main__":
    sys.exit(main())
