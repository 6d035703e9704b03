"""What else an edit moved, for commands: the watch half of each edit's neighbours, asked before and after."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.commands import common
from errata.commands.screen import Progress, Screen, said
from errata.contrast import names as lists
from errata.contrast.names import COUNT, Names

if TYPE_CHECKING:
    from errata.core.bank import Stack
    from errata.core.model import LM
    from errata.request import EditRequest

EDITS = 32  # edits that are looked at; the search takes a second or more each
_SHOWN = 8  # neighbours that moved, in a table


def options(out: argparse.ArgumentParser) -> None:
    """How many neighbours, and where their names come from."""
    out.add_argument(
        "--neighbours",
        type=common.count,
        default=COUNT,
        metavar="N",
        help=f"other subjects that are asked before and after, to see what else moved ({COUNT}; 0: none)",
    )
    out.add_argument("--names", type=Path, metavar="FILE", help="names to take neighbours from, one a line, instead of errata's list")


def names(args: argparse.Namespace) -> Names | None:
    """The user's list, where there is one."""
    return None if args.names is None else lists.read(args.names)


def watched(
    lm: LM,
    requests: Sequence[EditRequest],
    stacks: Sequence[Stack],
    args: argparse.Namespace,
    chosen: Names | None,
    progress: Progress,
    otherwise: bool = False,
) -> list[dict[str, Any] | None]:
    """What became of each edit's neighbours; None of an edit that was not looked at.  ``otherwise``: asked in other forms, too."""
    from errata.score import neighbours

    out: list[dict[str, Any] | None] = [None] * len(requests)
    if not args.neighbours:
        return out
    step = max(1, -(-len(requests) // EDITS))
    places = range(0, len(requests), step)
    for done, i in enumerate(places, 1):
        (kept,) = neighbours.watch(lm, [requests[i]], [stacks[i]], count=args.neighbours, names=chosen, otherwise=otherwise)
        out[i] = {"said": str(kept), **kept.to_dict()}
        progress("neighbours of edits", done, len(places))
    return out


def show(screen: Screen, found: Sequence[dict[str, Any] | None]) -> None:
    """How many kept their answers, and those that did not."""
    seen = [one for one in found if one is not None]
    if not seen:
        return
    kept, of = (sum(one[key] for one in seen) for key in ("kept", "of"))
    if len(seen) == 1 or not of:
        screen.say(f"{seen[0]['said'][0].upper()}{seen[0]['said'][1:]}.")
    else:
        some = "" if len(seen) == len(found) else f" ({len(seen)} of {len(found)} edits were looked at)"
        screen.say(f"Neighbours kept: {kept} of {of}{some}.")
    if asked := sum(one["otherwise"] for one in seen):
        moved = sum(row["form"] != "same" for one in seen for row in one["lost"])
        screen.say(f"As a question or in a free paragraph: {asked - moved} of {asked} kept.")
    lost = sorted((row for one in seen for row in one["lost"]), key=lambda row: -row["moved"])
    if lost:
        screen.table(
            ("moved although it should not", "before", "after"), [(r["prompt"], said(r["before"]), said(r["after"])) for r in lost[:_SHOWN]]
        )
    if len(lost) > _SHOWN:
        screen.say(f"… and {len(lost) - _SHOWN} more (--json lists them).")
