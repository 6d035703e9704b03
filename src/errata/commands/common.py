"""Arguments and steps that several commands share."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from errata import registry
from errata.benchmarks.files import open_benchmark
from errata.commands.screen import Progress, Screen, quiet
from errata.config import parse_sets, read_yaml
from errata.core.chat import apply_chat_template, request_in_chat
from errata.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from errata.core.model import LM
    from errata.request import EditRequest

Subparsers: TypeAlias = "argparse._SubParsersAction[Any]"
MODES = ("single", "batched", "continual")
_BATCH = 10  # requests in one joint patch, where not given


def occurrence_option(parser: argparse.ArgumentParser) -> None:
    """Where a subject stands more than once."""
    parser.add_argument(
        "--occurrence", type=int, metavar="N", help="which of the subject's places in the prompt: 1 the first, -1 the last (1)"
    )


def positive(text: str) -> int:
    """An argument that counts something."""
    return _at_least(1, text)


def count(text: str) -> int:
    """An argument that counts something of which there may be none."""
    return _at_least(0, text)


def _at_least(least: int, text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}, not {text!r}")
    return value


def subparser(commands: Subparsers, name: str, about: str) -> argparse.ArgumentParser:
    """A subcommand's parser without arguments."""
    out: argparse.ArgumentParser = commands.add_parser(name, help=about, description=about[0].upper() + about[1:] + ".", allow_abbrev=False)
    return out


def parser(commands: Subparsers, name: str, run: Any, about: str, *, model: bool = True, json: bool = True) -> argparse.ArgumentParser:
    """A subcommand's parser with the arguments all have."""
    out = subparser(commands, name, about)
    if model:
        model_argument(out)
    if json:
        out.add_argument("--json", action="store_true", help="print one JSON document and nothing else")
    out.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show tracebacks, and what libraries log")
    out.set_defaults(run=run)
    return out


def model_argument(out: argparse.ArgumentParser) -> None:
    out.add_argument(
        "model", metavar="MODEL", help="a folder saved by transformers, a hub name, a GGUF file, a name of `errata models`, or 'almanac'"
    )
    model_options(out)


def model_options(out: argparse.ArgumentParser) -> None:
    out.add_argument("--dtype", help="float32, bfloat16 …; without it as the model was saved (a GGUF: what the CPU is fast in)")
    out.add_argument("--device", help="cpu, cuda, cuda:1 …; without it as transformers chooses")


def mode_options(out: argparse.ArgumentParser) -> None:
    out.add_argument(
        "--mode", choices=MODES, default="single", help="a patch a request; joint patches of N on a growing stack; one after another"
    )
    out.add_argument("--batch-size", type=positive, metavar="N", help=f"requests in one joint patch (batched mode; {_BATCH})")
    out.add_argument(
        "--set", action="append", default=[], metavar="K=V", help="a hyper-parameter of the method; may be repeated (see `errata methods`)"
    )
    out.add_argument("--config", metavar="FILE.yaml", help="hyper-parameters from a file; --set goes on top")


def set_options(out: argparse.ArgumentParser, what: str) -> None:
    """``what``: that --set sets."""
    out.add_argument("--set", action="append", default=[], metavar="K=V", help=f"{what}; may be repeated")
    out.add_argument("--config", metavar="FILE.yaml", help="settings from a file; --set goes on top")


def out_options(out: argparse.ArgumentParser) -> None:
    out.add_argument("--out", type=Path, metavar="DIR", help="folder to save in; without it nothing is saved")
    out.add_argument("--force", action="store_true", help="replace an earlier result of errata at --out (as a whole)")


def _seed_or_file(text: str) -> int | None:
    """The argument --seed where "file" means the file's own order: None."""
    if text == "file":
        return None
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, or 'file' for the file's own order, not {text!r}") from None


def benchmark_options(out: argparse.ArgumentParser, default: str | None, cases: int) -> None:
    out.add_argument("--benchmark", default=default, metavar="NAME", help=f"see `errata benchmarks`{f' ({default})' if default else ''}")
    out.add_argument("--data", metavar="PATH", help="its file, a folder with it, or hub:OWNER/NAME/PATH (the almanac needs none)")
    out.add_argument("--split", metavar="NAME", help="of the almanac or of a folder: test, dev …; a file is one split")
    out.add_argument("--n", type=positive, help=f"cases ({cases}, or as many as there are)")


def case_options(out: argparse.ArgumentParser, cases: int) -> None:
    """`benchmark_options` on the almanac, and the order of the cases."""
    benchmark_options(out, "almanac", cases)
    out.add_argument("--seed", type=_seed_or_file, default=0, help="of the order of the cases (0); file: the file's own order")
    out.add_argument("--consistent", action="store_true", help="one case a fact, where a file edits some facts twice (ZsRE does)")


def items(args: argparse.Namespace, most: int, packaged: str, seed: int | None) -> tuple[Any, list[Any]]:
    """(the benchmark, its first items): --n of them, else up to ``most``.  ``packaged``: the split of a benchmark in the package."""
    benchmark = open_benchmark(args.benchmark, args.data, getattr(args, "consistent", False))
    if not benchmark.needs_data:
        splits = getattr(benchmark, "splits", (packaged,))
        args.split = args.split or (packaged if packaged in splits else splits[0])
    found = benchmark.load(args.split, args.n, seed)
    return benchmark, list(found if args.n else itertools.islice(found, most))


def benchmark_facts(args: argparse.Namespace, benchmark: Any, count: int) -> dict[str, Any]:
    """What was asked, for a document."""
    out = {"benchmark": args.benchmark, "version": benchmark.version, "split": args.split, "n": count, "seed": args.seed}
    if benchmark.needs_data:
        out["data"] = str(args.data)
        out |= {"consistent": True} if getattr(args, "consistent", False) else {}
        if benchmark.kind == "edits":
            out["records"] = benchmark.report.to_dict()
    return out


def tens(count: int) -> list[int]:
    """Where continual editing is looked at: the powers of ten below ``count``, and ``count``."""
    return [*(t for t in (10**i for i in range(8)) if t < count), count]


def batch_size(args: argparse.Namespace) -> int:
    if args.batch_size is not None and args.mode != "batched":
        raise ConfigError(f"--batch-size has no meaning in {args.mode} mode; add --mode batched")
    return int(args.batch_size or _BATCH)


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """Hyper-parameters of --config with those of --set on top."""
    values: dict[str, Any] = {}
    if args.config is not None:
        values |= read_yaml(args.config)
    values |= parse_sets(args.set)
    if odd := [k for k in values if not isinstance(k, str)]:
        raise ConfigError(f"{args.config}: the setting {odd[0]!r} is not a name")
    return values


def listed(text: str) -> list[str]:
    """The parts of a text with commas; empty ones do not count."""
    return [part.strip() for part in text.split(",") if part.strip()]


def editors(names: str) -> list[str]:
    """The methods of a comma-separated list; `UnknownNameError` for one that does not exist."""
    out = listed(names)
    if not out:
        raise ConfigError(f"--method {names!r} names no method; there are {', '.join(registry.names('method'))}")
    for name in out:
        registry.get("method", name)
    if len(set(out)) < len(out):
        raise ConfigError(f"--method {names!r} names one method twice")
    return out


def load(args: argparse.Namespace, *, as_saved: bool = False, **more: Any) -> LM:
    """The model of the command line.  From here to the end of the command, libraries are quiet.

    ``as_saved``: in the dtype it was saved in; ``--dtype`` means something else there.  ``more``: what else `errata.load` takes.
    """
    import errata

    args.until_end.enter_context(quiet(args.debug))

    if args.device is not None:
        import torch

        try:
            torch.empty(0, device=args.device)
        except (RuntimeError, AssertionError) as error:  # torch says the latter where it was built without CUDA
            raise ModelError(f"device {args.device!r} cannot be used: {str(error).splitlines()[0]}") from None
    saved = None if args.model == "almanac" else "auto"
    with Screen().progress() as progress:  # of a GGUF, which is converted once
        return errata.load(args.model, dtype=saved if as_saved else args.dtype, device=args.device, progress=progress, **more)


def prepare(editor: Any, lm: LM, progress: Progress) -> None:
    """Make the statistics that a method needs, where it needs any and they are not there yet."""
    if hasattr(editor, "prepare"):
        editor.prepare(lm, lambda done, of: progress("statistics, tokens", done, of))


def chunks(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def chat_option(out: argparse.ArgumentParser, what: str) -> None:
    """``what``: that is put into the template."""
    out.add_argument("--chat", action="store_true", help=f"{what} as the user's turn of the model's chat template")


def asked(lm: LM, prompts: Sequence[str], chat: bool) -> list[str]:
    """The prompts, rendered where ``chat`` says so."""
    return [apply_chat_template(lm.tokenizer, p) if chat else p for p in prompts]


def edited(lm: LM, requests: Sequence[EditRequest], chat: bool) -> list[EditRequest]:
    """The requests, rendered where ``chat`` says so."""
    return [request_in_chat(lm.tokenizer, r) if chat else r for r in requests]


def answers(lm: LM, asked: Iterable[tuple[str, tuple[Any, ...]]], tokens: int | None) -> list[str]:
    """`errata.core.decode.greedy_answers`, which is loaded when a model is."""
    from errata.core import decode

    return decode.greedy_answers(lm, asked, tokens)


def saved(out: Path | None) -> str:
    """The last line of a command that can save."""
    return "Nothing was saved; give --out DIR to keep it." if out is None else f"Saved in {out}."
