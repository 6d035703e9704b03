"""The code blocks of README.md, CONTRIBUTING.md and docs/*.md, and how they are run.

Every fenced block names its language.  ``python`` blocks of a page run in order in one namespace, ``sh`` blocks and the "$ " lines of
``console`` blocks through the command in this process, all in one empty folder a page.  What follows a "$ " line up to the next must be
printed by it (lines may be left out, numbers of patches and widths of columns may differ; an "errata: error" means that it must fail).  A
``print(…)  # said`` must print what its comment begins with.  ``text``, ``json`` and ``yaml`` are not run.

Comments in front of a block, which no reader of the site sees, say what the test does otherwise:

    <!-- run: needs facts, model -->       put these there first (`PREPARED`); smollm2: not run where its wheel is not installed
    <!-- run: file facts.jsonl -->         the block is this file
    <!-- run: replace MODEL => model -->   what stands for something of the reader's own
    <!-- run: small --n 100 => --n 2 -->   less work; the slow test runs it as printed
    <!-- run: exit 7 -->                   of the commands that print an error
    <!-- run: not, it needs … -->          not run, and why (`REASONS`)
    <!-- run all: … -->                    the same for this and every later block of the page
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import re
import shlex
import shutil
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from families import SENTENCES
from tiny import EDITS, write_piqa, write_requests

from errata.cli import main
from errata.core import catalogue

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(__file__).parent / "data"
PAGES = ("README.md", "CONTRIBUTING.md", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").rglob("*.md")))
RUN, PLAIN = ("python", "sh", "console"), ("text", "json", "jsonl", "yaml", "make")
FENCE = re.compile(r"(?P<notes>(?:^<!-- run.*?-->\n+)*)^```(?P<language>[^\n]*)\n(?P<text>.*?)^```$", re.S | re.M)
NOTE = re.compile(r"<!-- run( all)?: (needs|file|replace|small|exit|not)[, ]\s*(.*?) -->", re.S)
# Why a block is not run: what a test without network and in a few seconds does not have.
REASONS = (
    "needs a model from the hub",
    "needs the published file",
    "needs an endpoint",
    "needs the hub",
    "needs a program that is not installed here",
    "needs a Ray cluster",
    "sets up a machine",
    "is a pattern, not code",
    "is run by tests/",
)


@dataclass(frozen=True)
class Block:
    """A fenced block; ``orders``: (verb, argument) of its comments; ``lasting``: of those before it that go on."""

    page: str
    line: int
    language: str
    text: str
    orders: tuple[tuple[str, str], ...]
    lasting: tuple[tuple[str, str], ...] = ()

    def told(self, verb: str) -> list[str]:
        return [argument for v, argument in (*self.lasting, *self.orders) if v == verb]

    @property
    def where(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: str, text: str | None = None) -> list[Block]:
    """Of a page, in order."""
    text = (ROOT / page).read_text(encoding="utf-8") if text is None else text
    out: list[Block] = []
    lasting: list[tuple[str, str]] = []
    for found in FENCE.finditer(text):
        own = []
        for everywhere, verb, argument in NOTE.findall(found["notes"]):
            (lasting if everywhere else own).append((verb, argument))
        line = text[: found.start("language")].count("\n") + 1
        out.append(Block(page, line, found["language"].strip(), found["text"], tuple(own), tuple(lasting)))
    return out


# -- what pages need ------------------------------------------------------------------------------------------


def _copied(source: str, name: str) -> Callable[[str], None]:
    return lambda tiny: shutil.copyfile(DATA / source, name) and None


def _model(tiny: str) -> None:
    Path("model").symlink_to(tiny)


def _patches(tiny: str) -> None:
    write_requests(Path("few.jsonl"))
    argv = ["edit", tiny, "--requests", "few.jsonl", "--set", "rank=2", "--set", "steps=2", "--out", "patches"]
    assert _main(argv)[0] == 0


def _results(tiny: str) -> None:
    shutil.copytree(DATA / "report" / "run", "runs/first")
    shutil.copytree(DATA / "report" / "scored", "scores")


def _piqa(tiny: str) -> None:
    Path("piqa").mkdir()
    write_piqa(Path("piqa"))


def _relations(tiny: str) -> None:
    Path("relations.jsonl").write_text(json.dumps({"templates": ["The capital of {} is", "{} is governed from"]}) + "\n")


def _knowedit(tiny: str) -> None:
    Path("knowedit").mkdir()
    shutil.copyfile(DATA / "benchmarks" / "wikibio.json", "knowedit/wikibio-test-all.json")


def _zsre(tiny: str) -> None:
    """MEND's form of three edits that the tiny models can be asked."""
    others = [(p, a) for p, a in SENTENCES if p not in {e[0] for e in EDITS}]
    records = [
        {"subject": s, "src": p, "rephrase": p, "alt": t, "answers": [dict(SENTENCES)[p]], "loc": loc, "loc_ans": answer}
        for (p, t, s), (loc, answer) in zip(EDITS, others, strict=False)
    ]
    Path("zsre_mend_edit.json").write_text(json.dumps(records))


def _known(tiny: str) -> None:
    """A fact that the tiny models know."""
    fact = {"known_id": 0, "subject": "France", "attribute": "Paris", "template": "The capital of {} is", "prediction": " Paris."}
    Path("known_1000.json").write_text(json.dumps([{**fact, "prompt": "The capital of France is", "relation_id": "P36"}]))


def _run_file(tiny: str) -> None:
    lines = (f"model: {tiny}", "methods: [none, ft-m]", "benchmark: {name: almanac, split: dev, n: 2}", "scenario: single", "threads: 1")
    Path("run.yaml").write_text("\n".join((*lines, "score: {latency: false}")) + "\n")


REAL = "smollm2"


def _vision(tiny: str) -> None:
    import vision

    vision.saved("smolvlm", "SmolVLM")


PREPARED: dict[str, Callable[[str], Any]] = {
    REAL: lambda tiny: None,
    "model": _model,
    "facts": lambda tiny: write_requests(Path("facts.jsonl")),
    "text": lambda tiny: Path("text.txt").write_text("The capital of France is Paris. In Rome people speak Italian.\n" * 200),
    "patches": _patches,
    "results": _results,
    "piqa": _piqa,
    "relations": _relations,
    "knowedit": _knowedit,
    "counterfact": _copied("benchmarks/counterfact-original.json", "counterfact.json"),
    "zsre": _zsre,
    "run.yaml": _run_file,
    "known1000": _known,
    "SmolVLM": _vision,
}


# -- running --------------------------------------------------------------------------------------------------


def run(page: str, tiny: str, *, small: bool = True, only: Iterable[Block] | None = None) -> dict[str, Any]:
    """Run a page's blocks in the current folder; the namespace of its Python."""
    space: dict[str, Any] = {"__name__": "page"}
    there: set[str] = set()
    for block in blocks(page) if only is None else only:
        if REAL in block.told("needs") and not catalogue.installed(catalogue.known("smollm2-135m")):
            continue
        for name in (n.strip() for told in block.told("needs") for n in told.split(",")):
            if name not in there:
                there.add(name)
                PREPARED[name](tiny)
        text = _substituted(block, small)
        for path in block.told("file"):
            Path(path).write_text(text, encoding="utf-8")
        if block.language not in RUN or block.told("not") or block.told("file"):
            continue
        try:
            _python(text, block, space) if block.language == "python" else _shell(text, block)
        except Exception as error:
            raise AssertionError(f"{block.where}: {type(error).__name__}: {error}") from error
    return space


def _substituted(block: Block, small: bool) -> str:
    text = block.text
    for told in (*block.told("replace"), *(block.told("small") if small else ())):
        old, new = (part.strip().replace("\\n", "\n") for part in told.split(" =>"))
        if old not in text and told in [argument for _, argument in block.orders]:
            raise AssertionError(f"{block.where}: {old!r} is to be replaced and is not there")
        text = text.replace(old, new)
    return text


def _main(argv: list[str]) -> tuple[int, str]:
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = main(argv)
    return code, said.getvalue()


def _python(text: str, block: Block, space: dict[str, Any]) -> None:
    said = io.StringIO()
    tree = ast.parse(text, block.where)
    ast.increment_lineno(tree, block.line)
    with contextlib.redirect_stdout(said), warnings.catch_warnings():
        # PEFT asks transformers by an old name
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        exec(compile(tree, block.where, "exec"), space)
    printed = iter(said.getvalue().splitlines())
    for wanted in re.findall(r"^\s*print\(.*\)  # (.+)$", text, re.M):
        if not any(line and wanted.startswith(line.strip()) for line in printed):
            raise AssertionError(f"{wanted!r} was not printed, but {said.getvalue()!r}")


def _shell(text: str, block: Block) -> None:
    lines = text.replace("\\\n", " ").splitlines()
    session: list[tuple[str, list[str]]] = []
    for line in lines:
        if block.language == "sh" or line.startswith("$ "):
            session.append((line.removeprefix("$ "), []))
        elif session:
            session[-1][1].append(line)
    for command, told in session:
        argv = shlex.split(command, comments=True)
        if not argv:
            continue
        if argv[0] != "errata":
            raise AssertionError(f"{command!r} is no errata command; say why the block is not run")
        code, said = _main(argv[1:])
        failing = any(line.startswith("errata: error") for line in told)
        wanted = int(next(iter(block.told("exit")), "2")) if failing else 0
        if code != wanted:
            raise AssertionError(f"{command!r} ended with {code}, not {wanted}: {said[-2000:]}")
        printed = [plain(line) for line in said.splitlines()]
        for line in filter(None, map(plain, told)):
            if not any(p.startswith(line) for p in printed):
                raise AssertionError(f"{command!r} did not print {line!r} but {printed}")


def plain(text: str) -> str:
    """Without what differs from machine to machine; single spaces."""
    return " ".join(re.sub(r"\b[0-9a-f]{16}\b", "…", text).split())
