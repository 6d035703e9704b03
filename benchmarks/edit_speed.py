"""Seconds for N single BaFT edits: one at a time with full forwards, one at a time with the tail, all at once with the tail.

    python benchmarks/edit_speed.py [--edits 64] [--steps 40] [--repeat 3] [--out FILE.json]     # the almanac, on this machine
    python benchmarks/edit_speed.py --shape llama-2-7b --device cuda --dtype bfloat16 --batches 1,16,64,256

All three make the same patches (checked here).  Early stop is off, so every edit takes the same number of steps.  Machines are noisy:
compare the ratios of one run.  The floor is what the products alone cost: the FLOPs of the batched run, counted by torch,
divided by the rate of a plain matrix product of the model's size measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

import errata
from errata import registry
from errata.core.model import LM
from errata.core.tail import FullForward, Tail
from errata.request import EditRequest


def timed(work: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    out = work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began, out


def shaped(name: str, device: str, dtype: torch.dtype) -> LM:
    """A model of a published shape with random weights and the almanac's tokenizer: right for speed, meaningless for quality."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"llama-2-7b": (4096, 11008, 32, 32, 32000), "tiny": (64, 128, 4, 4, 6144)}[name]
    width, inner, layers, heads, vocabulary = sizes
    config = LlamaConfig(
        hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads, vocab_size=vocabulary,
        pad_token_id=0,
    )  # fmt: skip
    with torch.device(device):
        torch.set_default_dtype(dtype)
        try:
            model = LlamaForCausalLM(config)
        finally:
            torch.set_default_dtype(torch.float32)
    return LM(model, errata.load("almanac").tokenizer, name)


def difference(ours: list[Any], theirs: list[Any]) -> float:
    """Largest relative distance between two patches' tensors."""
    worst = 0.0
    for a, b in zip(ours, theirs, strict=True):
        for x, y in zip(a.ops, b.ops, strict=True):
            for name in x.tensors:
                gap = (x.tensors[name] - y.tensors[name]).norm() / y.tensors[name].norm()
                worst = max(worst, float(gap))
    return worst


def peak_rate(lm: LM, rows: int) -> float:
    """FLOP/s of the model's own down-projection shape, forward, best of ten."""
    inner = lm.config.intermediate_size
    x = torch.randn(rows, inner, device=lm.device, dtype=lm.dtype)
    w = torch.randn(inner, lm.width, device=lm.device, dtype=lm.dtype)
    best = min(timed(lambda: [x @ w for _ in range(20)], lm.device)[0] for _ in range(10)) / 20
    return 2 * rows * inner * lm.width / best


def flops_of(editor: Any, lm: LM, requests: list[EditRequest]) -> int:
    """FLOPs of one batched run.  Torch counts those of the calling thread, so this run takes one lane."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with FlopCounterMode(display=False) as counter:
            editor.edit_each(lm, requests)
    finally:
        torch.set_num_threads(threads)
    return int(counter.get_total_flops())


def interleaved(
    ways: Mapping[str, Callable[[], Any]], repeat: int, device: torch.device, count: int, what: str
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """(seconds of each way, ``repeat`` times in turn so that a busy moment hits all alike; what each made last)."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    made: dict[str, Any] = {}
    for _ in range(repeat):
        for name, way in ways.items():
            taken, made[name] = timed(way, device)
            seconds[name].append(round(taken, 4))
            print(f"{name:32} {taken:8.3f} s  {count / taken:8.2f} {what}/s", flush=True)
    return seconds, made


def compare(lm: LM, editor: Any, requests: list[EditRequest], repeat: int) -> dict[str, Any]:
    """The three ways, best of ``repeat``, interleaved so that a busy moment hits all alike."""
    ways: dict[str, Callable[[], Any]] = {
        "a_one_at_a_time_full_forward": lambda: [editor.edit(lm, [r], runner=FullForward) for r in requests],
        "b_one_at_a_time_tail": lambda: [editor.edit(lm, [r], runner=Tail) for r in requests],
        "c_one_batch_tail": lambda: editor.edit_each(lm, requests, runner=Tail),
    }
    editor.edit_each(lm, requests[:2])  # warm up
    seconds, patches = interleaved(ways, repeat, lm.device, len(requests), "edits")
    best = {name: min(values) for name, values in seconds.items()}
    a, b, c = best.values()
    flops, rate = flops_of(editor, lm, requests), peak_rate(lm, 8 * len(requests))
    return {
        "seconds": seconds,
        "ratio_a_to_b": round(a / b, 2),
        "ratio_a_to_c": round(a / c, 2),
        "largest_relative_difference_a_c": difference(patches["a_one_at_a_time_full_forward"], patches["c_one_batch_tail"]),
        "largest_relative_difference_b_c": difference(patches["b_one_at_a_time_tail"], patches["c_one_batch_tail"]),
        "flops_of_c": flops,
        "matmul_rate": rate,
        "floor_seconds": round(flops / rate, 4),
        "c_over_floor": round(c / (flops / rate), 2),
    }


def batches(lm: LM, editor: Any, requests: list[EditRequest], sizes: list[int]) -> list[dict[str, Any]]:
    """Seconds per edit and peak memory at several batch sizes."""
    rows = []
    for size in sizes:
        chosen = (requests * (size // len(requests) + 1))[:size]
        editor.edit_each(lm, chosen)
        if lm.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        taken, _ = timed(lambda chosen=chosen: editor.edit_each(lm, chosen), lm.device)  # type: ignore[misc]
        flops = flops_of(editor, lm, chosen)
        memory = torch.cuda.max_memory_allocated() if lm.device.type == "cuda" else 0
        rate = peak_rate(lm, 8 * size)
        row = {"edits": size, "seconds_per_edit": taken / size, "edits_per_second": size / taken, "peak_bytes": memory}
        row |= {"flops": flops, "over_flop_floor": taken / (flops / rate)}
        print(row, flush=True)
        rows.append(row)
    return rows


def options(about: str | None, items: str, count: int, steps: int) -> argparse.ArgumentParser:
    """The arguments that speed benchmarks share."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(f"--{items}", type=int, default=count)
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--shape", help="a published shape with random weights in place of the almanac: llama-2-7b, tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=Path)
    return parser


def begin(args: argparse.Namespace, count: int) -> tuple[LM, list[EditRequest], dict[str, Any]]:
    """(model, requests, what the result says of machine and arguments)."""
    torch.set_num_threads(args.threads)
    lm = shaped(args.shape, args.device, getattr(torch, args.dtype)) if args.shape else errata.load("almanac")
    requests = [case.request for case in registry.get("benchmark", "almanac")().load("dev", count)]
    about: dict[str, Any] = {"machine": platform.processor() or platform.machine(), "torch": torch.__version__}
    about |= {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    if args.device == "cuda":
        about["gpu"] = torch.cuda.get_device_name()
    return lm, requests, about


def end(result: dict[str, Any], out: Path | None) -> None:
    print(json.dumps(result, indent=1))
    if out:
        out.write_text(json.dumps(result, indent=1) + "\n")


def main() -> None:
    parser = options(__doc__, "edits", 64, 40)
    parser.add_argument("--batches", default="", help="edits at once, with commas: seconds an edit and peak memory instead")
    args = parser.parse_args()
    lm, requests, result = begin(args, args.edits)
    editor = registry.get("method", "baft").for_model(lm, steps=args.steps, stop=0.0, locality=False)
    if args.batches:
        result["batches"] = batches(lm, editor, requests, [int(n) for n in args.batches.split(",")])
    else:
        result |= compare(lm, editor, requests, args.repeat)
    end(result, args.out)


if __name__ == "__main__":
    main()
