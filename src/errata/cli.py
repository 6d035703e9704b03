"""The command ``errata``: arguments in, exit code out.  Help and version load neither torch nor transformers.

Exit codes: 0 done; 1 an error errata did not foresee; 2 wrong input or arguments; 3 model or judge; 4 patch; 5 fit; 6 storage;
7 ledger; 130 Ctrl-C; 141 the reader of a pipe went away.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from errata import __version__
from errata.commands import (
    about,
    analyse,
    ask,
    demo,
    edit,
    ledger,
    models,
    report,
    reproduce,
    run,
    score,
    serve,
    stats,
    surfaces,
    trace,
    tune,
)
from errata.commands.screen import Screen, clean, write
from errata.errors import ErrataError, first_line, out_of_memory

_INTERRUPTED, _PIPE_CLOSED = 130, 141


class Parser(argparse.ArgumentParser):
    """Errors look the same whether argparse or errata finds them."""

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(2, f"errata: error: {clean(message)}\n")


def parser() -> argparse.ArgumentParser:
    """Every command and its arguments."""
    out = Parser(prog="errata", description="Edit what a language model knows: single facts, undoable, proven, fast.", allow_abbrev=False)
    out.add_argument("--version", action="version", version=f"errata {__version__}")
    out.add_argument("--debug", action="store_true", default=False, help="show tracebacks, and what libraries log")
    commands = out.add_subparsers(metavar="COMMAND", required=True, dest="command")
    for module in (edit, ask, ledger, serve, score, run, report, surfaces, stats, trace, analyse, tune, reproduce, demo, models, about):
        module.add(commands)
    return out


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.  Returns the exit code; never raises and never leaves a half-written folder."""
    try:
        args = parser().parse_args(argv)
    except SystemExit as stop:  # argparse: help, version, a wrong argument
        return int(stop.code or 0)
    try:
        with contextlib.ExitStack() as args.until_end:  # what a command turns off (see `common.load`) is turned on again
            args.run(args, Screen(json=getattr(args, "json", False)))
        sys.stdout.flush()
        return 0
    except KeyboardInterrupt:
        return _fail("interrupted", _INTERRUPTED, args.debug, kind="")
    except BrokenPipeError:
        _discard_stdout()
        return _PIPE_CLOSED
    except ErrataError as error:
        return _fail(str(error), error.exit_code, args.debug)
    except OSError as error:
        return _fail(f"{error.filename or 'a file'}: {error.strerror or error}", 6, args.debug)
    except Exception as error:
        if out_of_memory(error):
            return _fail("out of memory; use fewer cases, a smaller model or --dtype bfloat16", 3, args.debug)
        return _fail(f"not foreseen: {type(error).__name__}: {first_line(error)}; run again with --debug and report it", 1, args.debug)


def _fail(message: str, code: int, debug: bool, kind: str = "error: ") -> int:
    if debug:
        traceback.print_exc()
    line = " ".join(part.strip() for part in message.splitlines())  # one line, also where a library said several
    write(sys.stderr, f"errata: {kind}{clean(line)}\n")
    return code


def _discard_stdout() -> None:
    """What is still buffered goes nowhere, so that Python's own flush at the end stays silent."""
    with contextlib.suppress(OSError, ValueError):  # a stand-in without a descriptor
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
