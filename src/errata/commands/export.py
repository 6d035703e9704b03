"""``errata patch bake``, ``patch export`` and ``patch merge``: patches as one checkpoint, as a LoRA adapter, as one patch."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.commands import common, files
from errata.commands.screen import Screen
from errata.errors import ConfigError, PatchError

if TYPE_CHECKING:
    from errata.core.model import LM
    from errata.core.patch import Patch
    from errata.export.changes import ExportReport

_LOSS = 0.01  # share of a change beyond which a loss is worth a sentence


def add(group: common.Subparsers) -> None:
    """Into the group ``errata patch``."""
    out = _parser(group, "bake", bake, "write a checkpoint, or a GGUF, with the edits in its weights")
    out.add_argument(
        "--dtype",
        help="float32, bfloat16 … of the written weights, without it as the model was saved; of a GGUF the edited ones' (float16), or same",
    )
    out.add_argument("--base", metavar="FILE.gguf", help="--out FILE.gguf: the file to copy, where MODEL was not loaded from one")
    out = _parser(group, "export", export, "write the edits as an adapter of the model")
    out.add_argument("--format", choices=("lora", "gguf"), required=True, help="lora: as PEFT and vLLM read it; gguf: as llama.cpp does")
    out.add_argument("--rank", type=common.positive, metavar="N", help="rank at most N, at the loss that is then told; without it exact")
    out.add_argument("--dtype", default="float32", help="float32 (the default), bfloat16 … of the adapter's weights")
    out.add_argument("--every-block", action="store_true", help="zeros for the same linears of the other blocks (TGI wants all)")
    _parser(group, "merge", merge, "write several patches as one, which runs as fast as one", model=False)


def _parser(group: common.Subparsers, name: str, run: Any, about: str, model: bool = True) -> argparse.ArgumentParser:
    """``--dtype`` is here that of what is written, so the model's own options are not used."""
    out = common.parser(group, name, run, about, model=False)
    if model:
        out.add_argument("model", metavar="MODEL", help="the model that the patches were made for")
        out.add_argument("--device", help="cpu, cuda, cuda:1 …; without it as transformers chooses")
    out.add_argument(
        "--patch",
        nargs="+",
        action="extend",
        required=True,
        metavar="DIR",
        help="patch folders, or a folder made by `errata edit --out`; stacked in this order",
    )
    out.add_argument("--out", type=Path, required=True, metavar="PLACE", help="folder to write; of a GGUF the file")
    out.add_argument("--force", action="store_true", help="replace what an earlier run wrote at --out (as a whole)")
    return out


def _loaded(args: argparse.Namespace) -> tuple[LM, tuple[Patch, ...]]:
    stack = files.load_patches(args.patch)
    if not stack:
        raise PatchError(f"{args.patch[0]} holds no patch; name a patch folder")
    return common.load(args, as_saved=True), stack


def bake(args: argparse.Namespace, screen: Screen) -> None:
    from errata.core.loading import auto_class
    from errata.export import bake as write
    from errata.export import bake_gguf
    from errata.export.changes import dtype_named
    from errata.export.gguf import place

    packed = args.out.suffix == ".gguf"
    if args.base is not None and not packed:
        raise ConfigError("--base is for a GGUF; give --out FILE.gguf too")
    if not packed or args.dtype not in (None, "same"):
        dtype_named(args.dtype)  # before a model is loaded for nothing
    if packed:
        place(args.out, args.force)
    lm, stack = _loaded(args)
    if packed:
        report = bake_gguf(lm, stack, args.out, base=args.base, dtype=args.dtype or "float16", force=args.force)
    else:
        report = write(lm, stack, args.out, dtype=args.dtype, force=args.force)
    _tell(screen, args, lm, stack, report, "gguf" if packed else "transformers")
    if report.lost > _LOSS:
        screen.say(
            f"Rounding to {report.dtype} moved the edited weights by up to {report.lost:.1%} of the change; ask it before you rely on it."
        )
    if packed:
        screen.say(f"Edited weights are stored as {report.dtype}, the others as in the base's file.")
        screen.say(f"Serve it without errata: llama-server -m {args.out}")
    else:
        auto = auto_class(lm.hf.config, [type(lm.hf).__name__])
        screen.say(f"Load it without errata: {auto}.from_pretrained({str(args.out)!r}), or vllm serve {args.out}")


def export(args: argparse.Namespace, screen: Screen) -> None:
    from errata.export import export_gguf, export_lora
    from errata.export.changes import dtype_named
    from errata.export.engines import objections
    from errata.export.gguf import place

    if args.every_block and args.format == "gguf":
        raise ConfigError("--every-block is for --format lora; llama.cpp wants only what is edited")
    dtype_named(args.dtype)
    if args.format == "gguf":
        place(args.out, args.force)
    lm, stack = _loaded(args)
    how = {"rank": args.rank, "dtype": args.dtype, "force": args.force}
    if args.format == "gguf":
        report = export_gguf(lm, stack, args.out, **how)
        _tell(screen, args, lm, stack, report, args.format)
    else:
        report = export_lora(lm, stack, args.out, **how, every_block=args.every_block)
        against = objections(args.out, lm.hf.config.model_type)
        _tell(screen, args, lm, stack, report, args.format, vllm_objections=against)
    if report.lost > _LOSS:
        screen.say(f"The adapter lacks up to {report.lost:.1%} of the change's norm; ask it before you rely on it.")
    if args.format == "gguf":
        tell_llama_cpp(screen, args.out)
    else:
        screen.say(f"Load it without errata: PeftModel.from_pretrained(base, {str(args.out)!r})")
        tell_vllm(screen, args.model, args.out, max(w.rank for w in report.linears), against)


def tell_llama_cpp(screen: Screen, adapter: str | Path) -> None:
    """The line that serves a GGUF adapter."""
    screen.say(f"llama-server -m BASE.gguf --lora {adapter}    # the base in any quantisation")


def tell_vllm(screen: Screen, model: str, adapter: str | Path, rank: int, objections: Sequence[str]) -> None:
    """The line that serves an adapter of that rank, or why there is none."""
    from errata.export.lora import vllm_rank

    if objections:
        screen.say("Not for vLLM: " + "; ".join(objections))
    else:
        screen.say(f"vllm serve {model} --enable-lora --max-lora-rank {vllm_rank(rank)} --lora-modules edited={adapter}")


def _tell(screen: Screen, args: argparse.Namespace, lm: LM, stack: tuple[Patch, ...], report: ExportReport, form: str, **more: Any) -> None:
    screen.document(
        {
            "model": lm.name,
            "base": lm.fingerprint,
            "patches": [p.id for p in stack],
            "format": form,
            "dtype": report.dtype,
            "lost": report.lost,
            "linears": [{"path": w.path, "rank": w.rank or None, "lost": w.lost} for w in report.linears],
            "saved": str(args.out),
            **more,
        }
    )
    rows = [(w.path, w.rank or "full", f"{w.lost:.1e}") for w in report.linears]
    screen.table(("edited linear", "rank", "share lost"), rows, right=(-1,))
    screen.say(common.saved(args.out))


def merge(args: argparse.Namespace, screen: Screen) -> None:
    from errata.core.bank import active_patches
    from errata.core.weights import compact
    from errata.core.weights import merge as merged

    files.check(args.out, args.force)
    stack = active_patches(files.load_patches(args.patch))
    if len(stack) < 2:
        raise ConfigError("--patch names fewer than two patches that run; nothing to merge")
    patch = merged(stack)
    patch = dataclasses.replace(patch, ops=tuple(map(compact, patch.ops)))
    with files.staged(args.out, args.force) as temporary:
        patch.save(temporary, overwrite=True)
    screen.document(
        {"id": patch.id, "base": patch.base, "parameters": patch.parameters, "replaces": list(patch.replaces), "saved": str(args.out)}
    )
    screen.say(patch.describe())
    screen.say(common.saved(args.out))
