"""Every kind of bad input: one line that says what and where, the right exit code, no traceback, nothing half written.

A `Bad` builds its input in a fresh folder and returns the command line; `message` is searched for in stderr.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from families import lm
from safetensors.torch import load, save
from tiny import FAST, FRANCE, head

from errata.cli import main
from errata.editing import edit

GOOD = '{"prompt": "The capital of France is", "target": "Rome"}'


MAGIC = {"kind": "magic", "block": 1, "point": "block", "settings": {}, "tensors": []}


@dataclass(frozen=True)
class World:
    """A fresh folder, the tiny model's folder and a good patch of it (both shared: copy before breaking them)."""

    folder: Path
    model: str
    patch: Path

    def file(self, content: str | bytes, name: str = "r.jsonl") -> str:
        path = self.folder / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    def requests(self, content: str | bytes) -> list[str]:
        return ["edit", self.model, "--requests", self.file(content)]

    def edit(self, *more: str) -> list[str]:
        return ["edit", self.model, "--prompt", FRANCE, "--target", "Rome", *more]

    def set(self, *sets: str) -> list[str]:
        return self.edit(*(part for s in sets for part in ("--set", s)))

    def score(self, *more: str) -> list[str]:
        return ["score", self.model, *FAST, *more]

    def broken_patch(self, breaks: Callable[[Path], object]) -> list[str]:
        copy = Path(shutil.copytree(self.patch, self.folder / "patch"))
        breaks(copy)
        return ["patch", "show", str(copy)]

    def broken_model(self, breaks: Callable[[Path], object]) -> list[str]:
        copy = Path(shutil.copytree(self.model, self.folder / "model"))
        breaks(copy)
        return ["ask", str(copy), FRANCE]


@dataclass(frozen=True)
class Bad:
    name: str
    code: int
    message: str
    argv: Callable[[World], list[str]]


@pytest.fixture
def world(tmp_path: Path, tiny: str, good: Path) -> World:
    return World(tmp_path, tiny, good)


def truncate(path: Path, keep: float = 0.5) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])


def first_op(folder: Path, literal: str) -> None:
    """Put a literal in place of the first op's block number."""
    path = folder / "patch.json"
    path.write_text(re.sub(r'"block": \d+,', f'"block": {literal},', path.read_text(), count=1))


def with_nan(folder: Path) -> None:
    """A patch whose sum is right and whose numbers are not."""
    import hashlib

    tensors = load((folder / "patch.safetensors").read_bytes())
    tensors["0.b"] = torch.full_like(tensors["0.b"], torch.nan)
    blob = save(tensors)
    (folder / "patch.safetensors").write_bytes(blob)
    head(folder, sha256=hashlib.sha256(blob).hexdigest())


def other_patch(world: World) -> list[str]:
    """A patch of another base."""
    folder = edit(lm("qwen2"), FRANCE, "Rome", rank=2, steps=1).save(world.folder / "other")
    return ["ask", world.model, FRANCE, "--patch", str(folder)]


def mixed(world: World) -> list[str]:
    """The json of one patch with the tensors (and their sum) of another."""
    other = edit(lm("llama"), FRANCE, "Tokyo", rank=2, steps=1).save(world.folder / "other")

    def breaks(folder: Path) -> None:
        shutil.copy(other / "patch.safetensors", folder)
        head(folder, sha256=json.loads((other / "patch.json").read_text())["sha256"])

    return world.broken_patch(breaks)


def taken(world: World) -> list[str]:
    (world.folder / "out").mkdir()
    shutil.copytree(world.patch, world.folder / "out" / "p")
    return world.edit("--out", str(world.folder / "out"))


def foreign(world: World) -> list[str]:
    (world.folder / "out").mkdir()
    world.file("my thesis", "out/thesis.tex")
    return world.edit("--out", str(world.folder / "out"), "--force")


def half_foreign(world: World) -> list[str]:
    """A patch folder to which the user has added a file of theirs."""
    shutil.copytree(world.patch, world.folder / "out")
    world.file("my notes", "out/notes.txt")
    return world.edit("--out", str(world.folder / "out"), "--force")


def stolen_index(world: World) -> list[str]:
    world.file(json.dumps({"patches": [{"id": "../" + world.patch.name}]}), "edit.json")
    return ["ask", world.model, FRANCE, "--patch", str(world.folder)]


REQUESTS = [
    Bad("not JSON", 2, r"r\.jsonl:2: not valid JSON: .*each line holds one object", lambda w: w.requests(GOOD + "\n{prompt: 1}")),
    Bad("a JSON list", 2, r"r\.jsonl:1: .*one JSON list", lambda w: w.requests("[\n" + GOOD + "\n]")),
    Bad("not an object", 2, r"r\.jsonl:1: expected an object like .* found int", lambda w: w.requests("5")),
    Bad("unknown key", 2, r"r\.jsonl:1: unknown key 'answer'; known keys are prompt", lambda w: w.requests(GOOD[:-1] + ', "answer": "x"}')),
    Bad("missing key", 2, r"r\.jsonl:1: key 'target' is missing", lambda w: w.requests('{"prompt": "a"}')),
    Bad("subject not in prompt", 2, r"subject 'Spain' does not occur in prompt", lambda w: w.requests(GOOD[:-1] + ', "subject": "Spain"}')),
    Bad("empty target", 2, r"r\.jsonl:1: target is empty", lambda w: w.requests('{"prompt": "a", "target": " "}')),
    Bad("wrong type", 2, r"prompt must be a text, not list", lambda w: w.requests('{"prompt": ["a"], "target": "b"}')),
    Bad("paraphrases no list", 2, r"paraphrases must be a list, not str", lambda w: w.requests(GOOD[:-1] + ', "paraphrases": "x"}')),
    Bad("pair of three", 2, r"unrelated\[0\] must be a pair", lambda w: w.requests(GOOD[:-1] + ', "unrelated": [["a", "b", "c"]]}')),
    Bad("pair is a number", 2, r"r\.jsonl:1: unrelated\[0\] must be a pair", lambda w: w.requests(GOOD[:-1] + ', "unrelated": [5]}')),
    Bad(
        "pair is an object", 2, r"unrelated\[0\] must be a pair", lambda w: w.requests(GOOD[:-1] + ', "unrelated": [{"a": "b", "c": "d"}]}')
    ),
    Bad("NaN", 2, r"r\.jsonl:1: NaN is not a JSON value", lambda w: w.requests('{"prompt": NaN, "target": "b"}')),
    Bad("number of 5000 digits", 2, r"r\.jsonl:1: ", lambda w: w.requests('{"prompt": ' + "1" * 5000 + ', "target": "b"}')),
    Bad("nested too deep", 2, r"r\.jsonl:1: not valid JSON", lambda w: w.requests("[" * 100_000)),
    Bad("half a character", 2, r"r\.jsonl:1: ", lambda w: w.requests('{"prompt": "a \\ud800", "target": "b"}')),
    Bad("duplicate", 2, r"r\.jsonl:3: the same request stands at .*r\.jsonl:1", lambda w: w.requests(f"{GOOD}\n\n{GOOD}\n")),
    Bad("empty file", 2, r"holds no request", lambda w: w.requests("\n\n")),
    Bad("not UTF-8", 2, r"r\.jsonl:2: not UTF-8 at byte 12", lambda w: w.requests(GOOD.encode() + b'\n{"prompt": "\xff"}')),
    Bad("missing file", 2, r"nowhere\.jsonl: no such file", lambda w: ["edit", w.model, "--requests", str(w.folder / "nowhere.jsonl")]),
    Bad("a folder as file", 2, r"cannot be read \(Is a directory\)", lambda w: ["edit", w.model, "--requests", str(w.folder)]),
    Bad("both", 2, r"--prompt and --requests exclude each other", lambda w: [*w.requests(GOOD), "--prompt", "a"]),
    Bad("neither", 2, r"nothing to edit; give --prompt and --target", lambda w: ["edit", w.model, "--prompt", "a"]),
    Bad("subject argument", 2, r"subject 'Spain' does not occur", lambda w: w.edit("--subject", "Spain")),
]
SETTINGS = [
    Bad("unknown method", 2, r"no method named 'bafd'; did you mean 'baft'\?", lambda w: w.edit("--method", "bafd")),
    Bad("unknown setting", 2, r"BaFT has no setting 'rnak'; did you mean 'rank'\?", lambda w: w.set("rnak=3")),
    Bad("not a setting at all", 2, r"--set 'rank': write key=value", lambda w: w.set("rank")),
    Bad("ill-typed", 2, r"BaFT\.rank must be int, not 2\.5", lambda w: w.set("rank=2.5")),
    Bad("a switch as number", 2, r"BaFT\.steps must be int, not True", lambda w: w.set("steps=true")),
    Bad("NaN rate", 2, r"BaFT\.lr must be a finite number, not nan", lambda w: w.set("lr=nan")),
    Bad("YAML NaN rate", 2, r"BaFT\.lr must be a finite number, not nan", lambda w: w.set("lr=.nan")),
    Bad("negative rate", 2, r"a learning rate must be positive", lambda w: w.set("lr=-1")),
    Bad("no steps", 2, r"steps must be at least 1", lambda w: w.set("steps=0")),
    Bad("rate of 400 digits", 2, r"BaFT\.lr", lambda w: w.set("lr=" + "9" * 400)),
    Bad("an impossible date", 2, r"--set 'lr=2001-99-99'", lambda w: w.set("lr=2001-99-99")),
    Bad("a seed of 30 digits", 2, r"seed", lambda w: w.set("seed=" + "9" * 30)),
    Bad("not one of", 2, r"BaFT\.gate must be one of .*rmsnorm", lambda w: w.set("gate=sigmoid")),
    Bad("not YAML", 2, r"--set 'lr=\[1': the value is not valid YAML", lambda w: w.set("lr=[1")),
    Bad("layer out of range", 2, r"block 9 does not exist \(0 to 3\)", lambda w: w.set("layers=[1, 9]")),
    Bad("layer twice", 2, r"none twice", lambda w: w.set("layers=[1, 1]")),
    Bad("rank too large", 2, r"rank 64 exceeds the width 32", lambda w: w.set("rank=64")),
    Bad("rate that explodes", 5, r"lower the learning rate", lambda w: w.set("lr=1e30", "stop=0.0")),
    Bad("config missing", 2, r"c\.yaml: no such file", lambda w: w.edit("--config", str(w.folder / "c.yaml"))),
    Bad("config a folder", 2, r"cannot be read", lambda w: w.edit("--config", str(w.folder))),
    Bad("config no mapping", 2, r"must hold one mapping", lambda w: w.edit("--config", w.file("- a", "c.yaml"))),
    Bad("config with a number as name", 2, r"the setting 1 is not a name", lambda w: w.edit("--config", w.file("1: 2", "c.yaml"))),
    Bad("config not YAML", 2, r"not valid YAML", lambda w: w.edit("--config", w.file("a: [", "c.yaml"))),
    Bad("batch size without mode", 2, r"--batch-size has no meaning in single mode", lambda w: w.edit("--batch-size", "3")),
    *(
        Bad(
            f"edits of one stack contradict each other, {mode}",
            7,
            r"nothing was edited.* -> 'Madrid': another new request writes 'Rome' .*go on with --allow-conflicts",
            lambda w, mode=mode: [*w.requests(GOOD + "\n" + GOOD.replace("Rome", "Madrid")), "--mode", mode],
        )
        for mode in ("continual", "batched")
    ),
    Bad(
        "an occurrence beside a file",
        2,
        r"--occurrence and --requests exclude each other",
        lambda w: [*w.requests(GOOD), "--occurrence", "2"],
    ),
    Bad("a join beside a file", 2, r"--join and --requests exclude each other", lambda w: [*w.requests(GOOD), "--join", "none"]),
    Bad(
        "occurrence 0",
        2,
        r"occurrence must be 1 for the subject's first place",
        lambda w: w.edit("--subject", "France", "--occurrence", "0"),
    ),
    Bad("batch size 0", 2, r"must be a whole number of at least 1", lambda w: w.edit("--mode", "batched", "--batch-size", "0")),
]
MODELS = [
    Bad("no such model", 3, r"cannot be loaded", lambda w: ["ask", str(w.folder / "none"), "a"]),
    Bad("no config.json", 3, r"holds no config\.json", lambda w: w.broken_model(lambda f: (f / "config.json").unlink())),
    Bad("config.json cut", 3, r"cannot be loaded", lambda w: w.broken_model(lambda f: truncate(f / "config.json"))),
    Bad("weights cut", 3, r"damaged or truncated", lambda w: w.broken_model(lambda f: truncate(f / "model.safetensors"))),
    Bad(
        "weights empty",
        3,
        r"damaged or truncated|cannot be loaded",
        lambda w: w.broken_model(lambda f: truncate(f / "model.safetensors", 0)),
    ),
    Bad("weights missing", 3, r"cannot be loaded", lambda w: w.broken_model(lambda f: (f / "model.safetensors").unlink())),
    Bad("a tensor missing", 3, r"model\.norm\.weight", lambda w: w.broken_model(without_a_tensor)),
    Bad("a tensor of another shape", 3, r"cannot be loaded", lambda w: w.broken_model(other_shape)),
    Bad("tokenizer missing", 3, r"cannot be loaded", lambda w: w.broken_model(without_tokenizer)),
    Bad("unknown dtype", 3, r"dtype 'float33' is not one of torch's", lambda w: ["ask", w.model, "a", "--dtype", "float33"]),
    Bad("unknown device", 3, r"device 'gpu7' cannot be used", lambda w: ["ask", w.model, "a", "--device", "gpu7"]),
    Bad("half a character asked", 2, r"bytes that are not UTF-8", lambda w: ["ask", w.model, "a \udcff"]),
    Bad("no token to answer with", 2, r"must be a whole number", lambda w: ["ask", w.model, "", "--max-new-tokens", "-1"]),
]
PATCHES = [
    Bad("wrong model", 4, r"was made for base \w+, this model is \w+", other_patch),
    Bad("no such patch", 4, r"patch\.json is missing", lambda w: ["patch", "show", str(w.folder / "none")]),
    Bad("a file as patch", 4, r"cannot be read", lambda w: ["patch", "show", w.file("x")]),
    Bad(
        "tensors cut", 4, r"patch\.safetensors: damaged or truncated", lambda w: w.broken_patch(lambda f: truncate(f / "patch.safetensors"))
    ),
    Bad("tensors missing", 4, r"patch\.safetensors is missing", lambda w: w.broken_patch(lambda f: (f / "patch.safetensors").unlink())),
    Bad("json cut", 4, r"patch\.json: not valid JSON", lambda w: w.broken_patch(lambda f: truncate(f / "patch.json"))),
    Bad("json not UTF-8", 4, r"not valid JSON", lambda w: w.broken_patch(lambda f: (f / "patch.json").write_bytes(b"\xff{}"))),
    Bad("json of another shape", 4, r"format 'list'", lambda w: w.broken_patch(lambda f: (f / "patch.json").write_text("[]"))),
    Bad("later format", 4, r"format 2, this errata reads format 1", lambda w: w.broken_patch(lambda f: head(f, format=2))),
    Bad("NaN inside", 4, r"tensor '0\.b' holds NaN or infinity", lambda w: w.broken_patch(with_nan)),
    Bad("edited by hand", 4, r"content does not match its id", lambda w: w.broken_patch(lambda f: head(f, method="reft"))),
    Bad("ops removed by hand", 4, r"incomplete or edited by hand|does not match", lambda w: w.broken_patch(lambda f: head(f, ops="none"))),
    Bad("unknown op", 4, r"no op named 'magic'", lambda w: w.broken_patch(lambda f: head(f, ops=[MAGIC]))),
    Bad("infinite block", 4, r"patch\.json", lambda w: w.broken_patch(lambda f: first_op(f, "1e999"))),
    Bad("block of 5000 digits", 4, r"patch\.json", lambda w: w.broken_patch(lambda f: first_op(f, "1" * 5000))),
    Bad("two patches mixed", 4, r"content does not match its id", mixed),
    Bad("given twice", 4, r"is given twice", lambda w: ["ask", w.model, "a", "--patch", str(w.patch), str(w.patch)]),
    Bad(
        "index cut",
        4,
        r"edit\.json: cannot be read",
        lambda w: ["ask", w.model, "a", "--patch", str(Path(w.file("{", "edit.json")).parent)],
    ),
    Bad("index that points elsewhere", 4, r"is not the id of a patch", stolen_index),
]
PLACES = [
    Bad("out exists", 6, r"out exists already; give another name, or --force", taken),
    Bad("out is not ours", 6, r"is not a result of errata; it is left alone", foreign),
    Bad("out holds a file of the user", 6, r"is not a result of errata; it is left alone", half_foreign),
    Bad("out is a file", 6, r"is left alone", lambda w: w.edit("--out", w.file("x"), "--force")),
    Bad("out below a file", 6, r"is not a folder that can be written", lambda w: w.edit("--out", w.file("x") + "/a/b")),
    Bad("demo out exists", 6, r"exists already", lambda w: ["demo", "--model", w.model, "--out", taken(w)[-1]]),
]
SCORES = [
    Bad("unknown benchmark", 2, r"no benchmark named 'almanach'; did you mean 'almanac'\?", lambda w: w.score("--benchmark", "almanach")),
    Bad("unknown split", 2, r"no split 'train'; it has dev and test", lambda w: w.score("--split", "train")),
    Bad("too many cases", 2, r"100000 cases asked for", lambda w: w.score("--n", "100000")),
    Bad("no case", 2, r"--n: must be a whole number of at least 1, not '0'", lambda w: w.score("--n", "0")),
    Bad("bad marks", 2, r"--marks '1,x': write whole numbers", lambda w: w.score("--mode", "continual", "--marks", "1,x")),
    Bad("falling marks", 2, r"must rise", lambda w: w.score("--mode", "continual", "--marks", "3,1")),
    Bad(
        "marks beyond the cases",
        2,
        r"at most the number of cases \(5\)",
        lambda w: w.score("--mode", "continual", "--n", "5", "--marks", "1,9"),
    ),
    Bad("marks without mode", 2, r"--marks has no meaning in single mode", lambda w: w.score("--marks", "1")),
    Bad("second method unknown", 2, r"no method named 'serac'", lambda w: w.score("--method", "baft,serac")),
    Bad("a method twice", 2, r"names one method twice", lambda w: w.score("--method", "baft,baft")),
    Bad("no method", 2, r"names no method; there are adalora, alphaedit, baft", lambda w: w.score("--method", ",")),
    Bad("setting of an absent method", 2, r"no method 'reft' is scored here", lambda w: w.score("--n", "1", "--set", "reft.lr=1")),
    Bad("unknown command", 2, r"invalid choice: 'scores'", lambda w: ["scores"]),
    Bad("no command", 2, r"required: COMMAND", lambda w: []),
    Bad("unknown mode", 2, r"invalid choice: 'all'", lambda w: w.score("--mode", "all")),
    Bad("unknown option", 2, r"unrecognized arguments: --nn", lambda w: w.score("--nn", "3")),
]

LOCATE = [  # of the methods that edit at a subject and need statistics
    Bad(
        "no subject",
        2,
        r"give the subject of 'The capital of France is'",
        lambda w: w.edit("--method", "rome", "--set", "stats_tokens=500"),
    ),
    Bad("text of statistics", 2, r"no such text; give bundled", lambda w: w.edit("--method", "memit", "--set", "stats=nowhere.txt")),
    Bad("empty text of statistics", 2, r"holds no text", lambda w: w.edit("--method", "memit", "--set", f"stats={w.file('', 'e.txt')}")),
    Bad("two blocks for rome", 2, r"rome edits one block", lambda w: w.edit("--method", "rome", "--set", "layers=[0,1]")),
    Bad("share above one", 2, r"share above 0 and at most 1", lambda w: w.edit("--method", "alphaedit", "--set", "share=2")),
    Bad("prefixes that are no pairs", 2, r"prefixes are pairs", lambda w: w.edit("--method", "rome", "--set", "prefixes=[[5]]")),
    Bad("setting of another method", 2, r"ROME has no setting 'rank'", lambda w: w.edit("--method", "rome", "--set", "rank=4")),
    Bad("stats of no block", 2, r"block 9 does not exist", lambda w: ["stats", w.model, "--layers", "9"]),
]


def without_a_tensor(folder: Path) -> None:
    tensors = load((folder / "model.safetensors").read_bytes())
    del tensors["model.norm.weight"]
    (folder / "model.safetensors").write_bytes(save(tensors, {"format": "pt"}))


def other_shape(folder: Path) -> None:
    tensors = load((folder / "model.safetensors").read_bytes())
    tensors["model.norm.weight"] = torch.ones(7)
    (folder / "model.safetensors").write_bytes(save(tensors, {"format": "pt"}))


def without_tokenizer(folder: Path) -> None:
    for path in folder.glob("*token*"):
        path.unlink()


@pytest.mark.parametrize("bad", [*REQUESTS, *SETTINGS, *MODELS, *PATCHES, *PLACES, *SCORES, *LOCATE], ids=lambda bad: bad.name)
def test_bad_input(bad: Bad, world: World, capsys: pytest.CaptureFixture[str]) -> None:
    argv = bad.argv(world)
    before = {p: p.read_bytes() for p in world.folder.rglob("*") if p.is_file()}
    code = main(argv)
    out, err = capsys.readouterr()
    assert re.search(bad.message, err), err
    assert code == bad.code
    assert out == "" and "Traceback" not in err and err.splitlines()[-1].startswith("errata: error: ")
    assert {p: p.read_bytes() for p in world.folder.rglob("*") if p.is_file()} == before
