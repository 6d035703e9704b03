"""What `errata trace` shows and saves: pictures, the command, its errors."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from tiny import FRANCE, leftovers

from errata.cli import main
from errata.errors import InputError
from errata.report import heatmap
from errata.trace import KINDS


def test_pictures_are_clean_and_the_same_each_time(tmp_path: Path) -> None:
    record = {
        "answer": "$5",
        "tokens": ["<s>", " a$b", "\n", " 東京", "\x07", " "],
        "span": [1, 3],
        "low": 0.25,
        "scores": {kind: [[0.25 + 0.01 * i * b for b in range(14)] for i in range(6)] for kind in KINDS},
    }
    for name in ("one", "two"):
        heatmap.fact(record, 3, [tmp_path / f"{name}.svg", tmp_path / f"{name}.png"])
    svg = (tmp_path / "one.svg").read_text()
    assert svg == (tmp_path / "two.svg").read_text()
    texts = ["".join(node.itertext()) for node in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]
    assert {"a$b*", "⏎*", "東京", "�", "␣", "p($5)", "single restored block", "centre of 3 restored MLP blocks", "10"} <= set(texts)
    assert "dc:date" not in svg and "<image" not in svg and (tmp_path / "one.png").read_bytes()[:4] == b"\x89PNG"
    flat = {**record, "scores": {"mlp": [[0.25]] * 6}}
    heatmap.fact(flat, 1, [tmp_path / "flat.svg"])
    with pytest.raises(InputError, match="finite numbers"):
        heatmap.fact({**record, "scores": {"mlp": [[float("nan")]] * 6}}, 1, [tmp_path / "nan.svg"])
    with pytest.raises(InputError, match="no averaged role"):
        heatmap.average({"facts": 0, "roles": {"last": {"n": 0}}}, 1, [tmp_path / "x.svg"])


QUICK = ("--samples", "2")


def test_command_on_one_fact(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trace", tiny, "--prompt", FRANCE, "--subject", "France", "--answer", "Paris", *QUICK, "--kinds", "hidden,mlp"]) == 0
    out, err = capsys.readouterr()
    assert err == "" and "' Paris': p 0.9" in out and "Suggested for an edit of one block" in out and "only 1 fact(s)" in out
    assert "Nothing was saved; give --out DIR" in out


def test_command_on_a_file_saves_all(tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = tmp_path / "r.jsonl", tmp_path / "new" / "out"
    lines = [(FRANCE, "France", "Paris"), ("The capital of Italy is", "Italy", "Madrid"), ("In Rome people speak", "Rome", "Italian")]
    path.write_text("".join(json.dumps({"prompt": p, "target": "Tokyo", "subject": s, "old": o}) + "\n" for p, s, o in lines))
    argv = ["trace", tiny, "--requests", str(path), *QUICK, "--out", str(out)]
    assert main([*argv, "--json"]) == 0
    text, err = capsys.readouterr()
    found = json.loads(text)
    assert err == "" and found == json.loads((out / "trace.json").read_text())
    names = [f"trace-{which}.{ending}" for which in ("1", "2", "average") for ending in ("png", "svg")]
    assert leftovers(out) == sorted([*names, "trace.json"]) and leftovers(out.parent) == ["out"]
    assert [f["prompt"] for f in found["facts"]] == [FRANCE, "In Rome people speak"] and len(found["skipped"]) == 1
    fact = found["facts"][0]
    assert [len(fact["scores"][k]) for k in KINDS] == [len(fact["tokens"])] * 3 and fact["low"] < fact["high"]
    assert found["average"]["roles"]["subject_first"] == {"n": 0, **{k: dict.fromkeys(KINDS, [None] * 4) for k in ("mean", "error")}}
    assert found["suggestion"]["weak"] and found["settings"]["window"] == 1
    assert main(argv) == 6 and "--force" in capsys.readouterr().err
    assert main([*argv, "--force"]) == 0 and "skipped 'The capital of Italy is'" in capsys.readouterr().out


def test_command_on_the_almanac(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trace", "almanac", "--benchmark", "almanac", "--n", "1", "--samples", "1", "--kinds", "mlp", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["facts"]) == 1 and found["settings"]["window"] == 2 and found["facts"][0]["high"] > 0.9


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ((), "nothing to trace"),
        (("--prompt", FRANCE), "nothing to trace; give --prompt and --subject"),
        (("--prompt", FRANCE, "--subject", "Spain"), "does not occur in prompt"),
        (("--prompt", FRANCE, "--subject", ""), "subject of a fact"),
        (("--prompt", "is \udcff", "--subject", "is"), "half a character"),
        (("--prompt", FRANCE, "--subject", "France", "--answer", "Rome"), "none of 1 fact(s) can be traced"),
        (("--prompt", FRANCE, "--subject", "France", "--kinds", "mlp,head"), "kinds must be some of hidden, mlp, attn"),
        (("--prompt", FRANCE, "--subject", "France", "--noise", "nan"), "noise must be a number"),
        (("--prompt", FRANCE, "--subject", "France", "--seed", "-1"), "seed must be"),
        (("--prompt", FRANCE, "--requests", "x"), "exclude each other"),
        (("--benchmark", "almanac", "--requests", "x"), "exclude each other"),
        (("--benchmark", "almanak"), "did you mean 'almanac'"),
        (("--benchmark", "almanac", "--split", "train"), "no split 'train'"),
        (("--prompt", FRANCE, "--subject", "France", "--split", "dev"), "--split has no meaning without --benchmark"),
        (("--requests", "{empty}"), "holds no request"),
        (("--requests", "{bare}"), "has no subject"),
        (("--requests", "{missing}"), "no such file"),
    ],
)
def test_command_errors_are_one_line(
    argv: tuple[str, ...], message: str, tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "bare").write_text(json.dumps({"prompt": FRANCE, "target": "Rome"}))
    parts = [str(tmp_path / a[1:-1]) if a.startswith("{") else a for a in argv]
    assert main(["trace", tiny, *parts, *QUICK, "--out", str(tmp_path / "out")]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("errata: error: ") and err.count("\n") == 1 and message in err
    assert leftovers(tmp_path) == ["bare", "empty"]
