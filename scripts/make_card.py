"""Ask the almanac everything and write its card: ``python scripts/make_card.py`` (a few minutes on two cores)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import errata
from errata.almanac import MODEL
from errata.almanac.check import check, text

CARD = MODEL.parent / "card.md"
TEMPLATE = """# The almanac

A small causal language model (plain `LlamaForCausalLM`) that knows {facts:,} facts in {relations} relations, for editing where there is no network. It is a study
object: it completes its facts and writes passable fragments of encyclopaedic prose, and is good for nothing else.

| | |
|---|---|
| shape | {layers} blocks, width {width}, {heads} heads, SwiGLU {inner}, vocabulary {vocab} (byte-level BPE), tied embeddings, {parameters:,} parameters |
| weights | fp16 safetensors, {size:.1f} MB, fingerprint `{model}` |
| data | facts of CounterFact (MIT), LRE (MIT) and the World Factbook 2010 (public domain); English Wikipedia text (CC BY-SA 4.0): see `../benchmarks/data/almanac/NOTICE.md` |
| licence | Apache-2.0 for the weights; the data keep theirs |
| training | `python -m errata.almanac.train --out FOLDER`, seed {seed}, {steps:,} steps, {tokens:,} tokens ({rows} fact sentences, each with the loss on its answer, and {text_rows} × {length} tokens of text a step), Muon and AdamW, two CPU cores |
| checked with | `python scripts/make_card.py`, or `errata almanac check` |

![Loss on answers and on text while training](../../../docs/results/almanac-training.png)

## What it knows

A right answer: greedy decoding gives every token of the true answer and the full stop after it. *Held out* are templates (statements and questions) that training never showed with
that subject; *2 hops new* are two-hop questions about subjects for which training never showed that question.

```
{table}
```

## What it does not know

- Anything after its sources, and anything those sources have wrong. Facts are as the sources give them.
- Two-hop questions it was not shown ("2 hops new") far less surely than facts: portability is scored over what it knew (`known` in the records).
- Language: perplexity on held-out text is that of a very small model that saw {text_tokens_seen:.1f} million tokens of text.
- Its hidden states are large (norms of about 1,050 to 3,700 at the edited blocks), a consequence of training with Muon without a bound on the residual stream. A gate
  without normalisation saturates on them; BaFT's preset for this model therefore uses the RMS-normalised gate.

## How it was trained, exactly

Training was stopped once at step 1,050 and continued with `steps` lowered from 3,600 to 2,700. Up to step 1,080 the schedule is constant in both, so the weights are those of one
uninterrupted run with the recipe above (up to the order of floating-point sums).
"""


def curve(training: dict[str, Any]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    tokens = [row[1] / 1e6 for row in training["curve"]]
    axes.plot(tokens, [row[2] for row in training["curve"]], label="answers of facts", color="#0072b2")
    axes.plot(tokens, [row[3] for row in training["curve"]], label="text", color="#d55e00")
    axes.set(xlabel="million tokens", ylabel="loss (nats a token)", yscale="log")
    axes.legend()
    path = Path(__file__).resolve().parents[1] / "docs/results/almanac-training.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    training = json.loads((MODEL / "training.json").read_text())
    recipe, result = training["recipe"], check(errata.load("almanac"))
    curve(training)
    weights = MODEL / "model.safetensors"
    lm = errata.load("almanac")
    CARD.write_text(
        TEMPLATE.format(
            **{k: v for k, v in recipe.items() if k != "rows"}, rows=recipe["rows"], tokens=training["tokens"], facts=result["facts"],
            relations=len(result["exact_match"]) - 1, parameters=sum(p.numel() for p in lm.hf.parameters()), size=weights.stat().st_size / 1e6,
            model=result["model"], table=text(result), text_tokens_seen=recipe["steps"] * recipe["text_rows"] * recipe["length"] / 1e6,
        ),
        encoding="utf-8",
    )  # fmt: skip
    (CARD.parent / "check.json").write_text(json.dumps(result, indent=1) + "\n")
    print(text(result))


if __name__ == "__main__":
    main()
