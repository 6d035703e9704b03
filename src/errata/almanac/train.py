"""Train the almanac: ``python -m errata.almanac.train --out FOLDER``.

Data, tokenizer, model, in that order, with a fixed seed.  A checkpoint is written every few minutes; started again
with the same arguments, training continues from it and ends where an uninterrupted run would.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from errata.almanac.corpus import IGNORE_INDEX, Corpus, train_tokenizer
from errata.almanac.muon import Muon

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights."""

    seed: int = 20261121
    steps: int = 2700
    rows: int = 128  # fact sentences a step
    text_rows: int = 4
    length: int = 192  # tokens of a text row
    text_weight: float = 0.3  # of the text's mean loss against the facts'
    vocab: int = 6144
    width: int = 256
    layers: int = 8
    heads: int = 4
    inner: int = 640
    optimiser: str = "muon"
    lr: float = 0.02  # Muon, for matrices
    adam_lr: float = 3e-3  # AdamW: embeddings, norms (and everything when optimiser is "adamw")
    weight_decay: float = 0.01
    warmup: int = 100
    floor: float = 0.02  # last learning rate, as a share of the first


def build(recipe: Recipe, pad: int, bos: int, eos: int) -> Any:
    """A plain LlamaForCausalLM with tied embeddings."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(recipe.seed)
    config = LlamaConfig(
        vocab_size=recipe.vocab, hidden_size=recipe.width, intermediate_size=recipe.inner, num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads, num_key_value_heads=recipe.heads, max_position_embeddings=1024, tie_word_embeddings=True,
        pad_token_id=pad, bos_token_id=bos, eos_token_id=eos, attention_dropout=0.0,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def _optimisers(model: Any, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW for the rest."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    if recipe.optimiser == "adamw":
        return [torch.optim.AdamW(model.parameters(), recipe.adam_lr, betas=(0.9, 0.98), weight_decay=recipe.weight_decay, foreach=True)]
    return [
        Muon(matrices, recipe.lr, weight_decay=recipe.weight_decay),
        torch.optim.AdamW(rest, recipe.adam_lr, betas=(0.9, 0.98), weight_decay=0.0, foreach=True),
    ]


def schedule(recipe: Recipe, step: int) -> float:
    """Linear warm-up, constant for two fifths, then a cosine down to ``floor``."""
    if step < recipe.warmup:
        return (step + 1) / recipe.warmup
    done = (step - 0.4 * recipe.steps) / (0.6 * recipe.steps)
    return recipe.floor + (1 - recipe.floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, done))))


def losses(model: Any, corpus: Corpus, step: int) -> tuple[Tensor, Tensor, int]:
    """Mean loss on answers, mean loss on text, tokens read."""
    ids, labels = corpus.facts(step)
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state  # right padding: causal attention needs no mask
    keep = labels != IGNORE_INDEX  # the head is wide; run it where the loss is taken only
    fact = F.cross_entropy(model.lm_head(hidden[keep]), labels[keep])
    text_ids, text_labels = corpus.text(step)
    text_hidden = model.model(input_ids=text_ids, use_cache=False).last_hidden_state
    text = F.cross_entropy(model.lm_head(text_hidden).flatten(0, 1), text_labels.flatten())
    return fact, text, ids.numel() + text_ids.numel()


def _save_checkpoint(path: Path, payload: dict[str, Any]) -> None:
    """Write beside, then rename: a stop at any moment leaves a whole file."""
    beside = path.with_suffix(".part")
    torch.save(payload, beside)
    os.replace(beside, path)


@functools.lru_cache(maxsize=1)  # half a minute's work; neither changes in training
def prepared(vocab: int, seed: int, rows: int, text_rows: int, length: int) -> tuple[PreTrainedTokenizerFast, Corpus]:
    """Tokenizer and batches of a recipe."""
    tokenizer = train_tokenizer(vocab)
    return tokenizer, Corpus(tokenizer, seed, rows, text_rows, length)


def train(recipe: Recipe, out: Path, checkpoint_every: int = 150, stop_after: int | None = None) -> Path:
    """Train (or go on training) and export to ``out/model``; returns that folder."""
    out.mkdir(parents=True, exist_ok=True)
    checkpoint, saved = out / "checkpoint.pt", None
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        if saved["recipe"] != asdict(recipe):
            raise SystemExit(f"{checkpoint} was made with another recipe; give another --out or remove it")
    tokenizer, corpus = prepared(recipe.vocab, recipe.seed, recipe.rows, recipe.text_rows, recipe.length)
    model = build(recipe, tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    opts = _optimisers(model, recipe)
    first, tokens, curve = 0, 0, []
    if saved is not None:
        model.load_state_dict(saved["model"])
        for opt, state in zip(opts, saved["optimisers"], strict=True):
            opt.load_state_dict(state)
        first, tokens, curve = saved["step"], saved["tokens"], saved["curve"]
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {corpus.steps_per_epoch} steps a pass", flush=True)
    base = [[g["lr"] for g in o.param_groups] for o in _optimisers(model, recipe)]
    began, seen = time.monotonic(), tokens
    last = min(recipe.steps, stop_after or recipe.steps)
    for step in range(first, last):
        for opt, rates in zip(opts, base, strict=True):
            for group, rate in zip(opt.param_groups, rates, strict=True):
                group["lr"] = rate * schedule(recipe, step)
        fact, text, n = losses(model, corpus, step)
        (fact + recipe.text_weight * text).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            opt.step()
            opt.zero_grad(set_to_none=True)
        tokens += n
        if step % 20 == 19:
            rate = (tokens - seen) / (time.monotonic() - began)
            curve.append([step + 1, tokens, round(fact.item(), 4), round(text.item(), 4)])
            print(f"step {step + 1} tokens {tokens:,} fact {fact.item():.4f} text {text.item():.3f} {rate:.0f} tokens/s", flush=True)
        if (step + 1) % checkpoint_every == 0 or step + 1 == last:
            state = {"recipe": asdict(recipe), "model": model.state_dict(), "optimisers": [o.state_dict() for o in opts]}
            _save_checkpoint(checkpoint, {**state, "step": step + 1, "tokens": tokens, "curve": curve})
    return export(model, tokenizer, out / "model", {"recipe": asdict(recipe), "tokens": tokens, "curve": curve})


def export(model: Any, tokenizer: Any, folder: Path, training: dict[str, Any]) -> Path:
    """fp16 safetensors, tokenizer and the training record."""
    model.half().save_pretrained(folder, safe_serialization=True)
    tokenizer.save_pretrained(folder)
    (folder / "training.json").write_text(json.dumps(training))
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m errata.almanac.train", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("almanac-training"))
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--stop-after", type=int, help="stop at this step (to go on later)")
    for name, value in asdict(Recipe()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    args = vars(parser.parse_args())
    torch.set_num_threads(args.pop("threads"))
    out, stop = args.pop("out"), args.pop("stop_after")
    print(train(Recipe(**args), out, stop_after=stop))


if __name__ == "__main__":
    main()
