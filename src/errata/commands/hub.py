"""``errata patch push``: a patch to the Hugging Face hub."""

from __future__ import annotations

import argparse
from pathlib import Path

from errata.commands import common
from errata.commands.screen import Screen


def add(group: common.Subparsers) -> None:
    """Into the group ``errata patch``."""
    out = common.parser(group, "push", push, "put a patch on the Hugging Face hub, with a model card", model=False)
    out.add_argument("folder", metavar="DIR", type=Path, help="a patch folder, or one made by `errata edit --out` that holds one")
    out.add_argument("repo", metavar="OWNER/NAME", help="a model repository, made where it is not there")
    out.add_argument("--private", action="store_true", default=None, help="make the repository private")
    out.add_argument("--licence", help="of the patch, as the hub names it (apache-2.0, mit …)")
    out.add_argument("--revision", metavar="BRANCH", help="the branch to commit to, made where it is not there")
    out.add_argument("--message", default="", help="of the commit")


def push(args: argparse.Namespace, screen: Screen) -> None:
    from errata.core.patch import Patch

    patch = Patch.load(args.folder)
    how = {"private": args.private, "licence": args.licence, "revision": args.revision, "message": args.message}
    url = patch.push_to_hub(args.repo, **how)
    screen.say(f"patch {patch.id} is at {url}; errata ask MODEL … --patch {args.repo} reads it there.")
    screen.document({"patch": patch.id, "repo": args.repo, "commit": url})
