"""lm-evaluation-harness on a real model under patches: batches of 1 and of 8 agree, and both differ from the base.

    python scripts/harness_agrees.py [--model smollm2-135m] [--out docs/results/harness-smollm2-135m.json]

Needs lm-eval (`pip install 'errata[harness]'`).  A local task, nothing is downloaded: capitals of twelve countries, two of them edited, each
with answers of unlike lengths.  Beside errata's adapter the harness's own wrapper, `HFLM(pretrained=lm.hf)`, is asked for the same: it gives
prompt and answer in one text without saying where the prompt ends, so under methods that decide there it must be refused.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import errata
from errata import registry
from errata.errors import ModelError

METHODS = ("baft", "grace", "wise", "rome")
EDITS = (("The capital of France is", "Lyon", "France"), ("The capital of Japan is", "Osaka", "Japan"))
CAPITALS = {
    "France": "Paris", "Japan": "Tokyo", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid", "Egypt": "Cairo", "Peru": "Lima",
    "Canada": "Ottawa", "Norway": "Oslo", "Greece": "Athens", "China": "Beijing", "Cuba": "Havana",
}  # fmt: skip
OTHERS = ("Lyon, a large city in the south-east", "Osaka", "the city of New York in the United States of America")


def task(folder: Path) -> dict[str, Any]:
    """A multiple-choice task of the harness, its questions in a file of ours."""
    rows = [{"query": f"The capital of {land} is", "choices": [city, *OTHERS], "label": 0} for land, city in CAPITALS.items()]
    path = folder / "capitals.json"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return {
        "task": "capitals", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(path)}}, "test_split": "test",
        "output_type": "multiple_choice", "doc_to_text": "{{query}}", "doc_to_choice": "choices", "doc_to_target": "label",
    }  # fmt: skip


def likelihoods(model: Any, folder: Path) -> list[float]:
    """ln p of every answer of every question, in the task's order."""
    import lm_eval

    found = lm_eval.simple_evaluate(model=model, tasks=[task(folder)], log_samples=True, bootstrap_iters=0)
    samples = sorted(found["samples"]["capitals"], key=lambda s: s["doc_id"])
    return [float(said[0]) for sample in samples for said in sample["filtered_resps"]]


def adapter(lm: errata.LM, rows: int = 16) -> Any:
    from errata.score.harness import HarnessLM  # needs lm-eval

    return HarnessLM(lm, rows=rows)


def furthest(left: list[float], right: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(left, right, strict=True))


def own_wrapper(lm: errata.LM, folder: Path) -> str:
    """What `HFLM` comes to: "refused", or how far it is from errata's adapter."""
    from lm_eval.models.huggingface import HFLM

    try:
        found = likelihoods(HFLM(pretrained=lm.hf, tokenizer=lm.tokenizer, batch_size=8), folder)
    except ModelError:
        return "refused"
    return f"{furthest(found, likelihoods(adapter(lm), folder)):.4f} from errata's adapter"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    lm, rows = errata.load(args.model, dtype=args.dtype), []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = likelihoods(adapter(lm), folder)
        for method in METHODS:
            editor = registry.get("method", method).for_model(lm)
            for prompt, target, subject in EDITS:
                request = errata.EditRequest(prompt, target, subject)
                lm.attach(editor.edit(lm, editor.contrasted(lm, [request], lm.stack), on=lm.stack))
            one, eight = (likelihoods(adapter(lm, n), folder) for n in (1, 8))
            row = {"method": method, "questions": len(CAPITALS), "answers": len(one), "between_1_and_8": furthest(one, eight)}
            rows.append({**row, "from_the_base": furthest(one, base), "HFLM": own_wrapper(lm, folder)})
            print(json.dumps(rows[-1]), flush=True)
            lm.detach()
    if args.out is not None:
        document = {"model": args.model, "dtype": args.dtype, "fingerprint": lm.fingerprint, "rows": rows}
        args.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
