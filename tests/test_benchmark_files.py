"""Benchmarks in files: what is read, what is refused and where the error points, what is counted, in which order cases come."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from errata import registry
from errata.benchmarks.files import open_benchmark
from errata.benchmarks.records import locate, read_records
from errata.errors import InputError, UnknownNameError
from errata.request import PROBE_KINDS, ROBUST_KINDS, Case

SAMPLES = Path(__file__).parent / "data" / "benchmarks"
REAL = {  # sample -> (benchmark, form)
    "wiki-recent.json": ("wiki-recent", "KnowEdit"),
    "wiki-counterfact.jsonl": ("wiki-counterfact", "KnowEdit"),
    "wikibio.json": ("wikibio", "KnowEdit"),
    "convsent.json": ("convsent", "KnowEdit"),
    "counterfact-flattened.json": ("counterfact", "flattened"),
    "counterfact-original.json": ("counterfact", "original"),
    "counterfact-alias.json": ("counterfact", "original"),
    "mquake.json": ("mquake", "MQuAKE"),
    "qaedit.json": ("qaedit", "QAEdit"),
}
QA = {"id": 1, "source": "NQ", "prompt": "who?", "target": "A", "subject": "who", "rephrase": "who, say?", "locality": []}


def write(folder: Path, *records: Any, name: str = "data.json") -> Path:
    path = folder / name
    text = "\n".join(map(json.dumps, records)) if name.endswith("l") else json.dumps(list(records))
    path.write_text(text, encoding="utf-8")
    return path


def load(name: str, path: Path, **how: Any) -> list[Case]:
    return list(open_benchmark(name, path).load(**how))


def ids(cases: list[Case]) -> list[str]:
    return [case.id for case in cases]


@pytest.mark.parametrize("sample", REAL)
def test_real_records_make_cases(sample: str) -> None:
    name, form = REAL[sample]
    benchmark = open_benchmark(name, SAMPLES / sample)
    cases = list(benchmark.load())
    assert benchmark.report.form == form and benchmark.report.records == 5
    assert len(cases) == 5 - benchmark.report.dropped.total() - benchmark.report.joined >= 4
    kinds = {probe.kind for case in cases for probe in case.probes}
    assert kinds <= set(benchmark.probes) <= set(PROBE_KINDS) and "rewrite" in kinds
    assert benchmark.report.probes.total() == sum(len(case.probes) for case in cases)
    for case in cases:
        rewrites = [(p.prompt, p.target) for p in case.probes if p.kind == "rewrite"]
        assert rewrites == [(r.prompt, r.target) for r in case.requests]


@pytest.mark.parametrize("sample", REAL)
def test_fewer_cases_are_the_beginning_of_more(sample: str) -> None:
    name, _ = REAL[sample]
    whole = {seed: ids(load(name, SAMPLES / sample, seed=seed)) for seed in (0, 1, None)}
    for seed, every in whole.items():
        assert len(set(every)) == len(every)
        for n in range(1, len(every) + 1):
            assert ids(load(name, SAMPLES / sample, n=n, seed=seed)) == every[:n]
    assert sorted(whole[0]) == sorted(whole[1]) == sorted(whole[None])


def test_the_order_is_drawn_by_the_seed_and_the_case_alone(tmp_path: Path) -> None:
    records = [{**QA, "target": f"answer {i}"} for i in range(40)]
    orders = [ids(load("qaedit", write(tmp_path, *records), seed=seed)) for seed in range(4)]
    assert len({tuple(order) for order in orders}) == 4
    fewer = ids(load("qaedit", write(tmp_path, *records[::-1][:20]), seed=0))
    assert fewer == [i for i in orders[0] if i in set(fewer)]
    assert [c.request.target for c in load("qaedit", write(tmp_path, *records), seed=None)] == [f"answer {i}" for i in range(40)]


@pytest.mark.parametrize("n", [0, 6, -1, True, 2.0, "3"])
def test_a_number_that_is_not_there_is_refused(n: Any) -> None:
    with pytest.raises(InputError, match=r"1 to 5|whole number"):
        load("qaedit", SAMPLES / "qaedit.json", n=n)


def test_a_list_and_lines_read_alike(tmp_path: Path) -> None:
    records = json.loads((SAMPLES / "qaedit.json").read_text(encoding="utf-8"))
    lines = write(tmp_path, *records, name="x.jsonl")
    assert load("qaedit", lines) == load("qaedit", SAMPLES / "qaedit.json")
    lines.write_text("\ufeff\n" + lines.read_text().replace("\n", "\r\n\n"), encoding="utf-8")
    assert load("qaedit", lines) == load("qaedit", SAMPLES / "qaedit.json")


GOOD = json.dumps(QA)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"[{GOOD}, {GOOD[:40]}", r"record 2: not valid JSON: .*cut off"),
        (f"[{GOOD}, {GOOD}", r"record 2: the file is cut off behind this record"),
        (f"[{GOOD} {GOOD}]", r"record 1: '\{' stands where , or \] should"),
        (f"[{GOOD}] x", r"'x' stands behind the end of the list, after record 1"),
        (f"{GOOD}\n{GOOD[:-3]}\n{GOOD}", "record 2: not valid JSON"),
        (f"{GOOD}\n{GOOD} {GOOD}", "record 2: .* stands behind the object"),
        (json.dumps(QA, indent=1), "one JSON value over several lines"),
        ('{"success": [1],\n "locality": []}', "one JSON value over several lines"),
        ("[]", "holds no record"),
        ("", "holds no record"),
        ("  \n", "holds no record"),
        (f"[{GOOD}, 3]", "record 2: must be an object with fields, not int"),
        ("[" * 100_000, "record 1: not valid JSON"),
        (f"[{GOOD[:-1]}, \"x\": NaN}}]", "record 1: NaN is not a JSON value"),
        ("nonsense", "record 1: not valid JSON"),
    ],
)  # fmt: skip
def test_a_broken_file_is_refused_with_the_record(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=message) as caught:
        load("qaedit", path)
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": None}, "record 2: prompt must be a text, not NoneType"),
        ({"target": ["A"]}, "record 2: target must be a text, not list"),
        ({"locality": {}}, "record 2: locality must be a list of objects, not dict"),
        ({"locality": ["x"]}, r"record 2: locality\[0\] must be an object, not str"),
        ({"locality": [{"loc": "q"}]}, r"record 2, locality\[0\]: field 'loc_ans' is missing"),
        ({"locality": [{"loc": "q", "loc_ans": "a", "more": 1}]}, r"record 2, locality\[0\]: unknown field 'more'"),
        ({"locality": [{"loc": "q", "loc_ans": 3}]}, r"record 2, locality\[0\]: loc_ans must be a text, or lists of texts, not int"),
        ({"rephrases": "x"}, "record 2: unknown field 'rephrases'; did you mean 'rephrase'"),
        ({"rephrase": ...}, "record 2: field 'rephrase' is missing; the QAEdit form has"),
        ({"target": "\ud800"}, "record 2: target holds half a character"),
        ({"rephrase": "\udfff"}, "record 2: probe prompt holds half a character"),
    ],
)
def test_a_wrong_field_is_refused_with_the_record(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    wrong = {k: v for k, v in {**QA, **change}.items() if v is not ...}
    with pytest.raises(InputError, match=message):
        load("qaedit", write(tmp_path, QA, wrong))


def test_a_file_of_another_benchmark_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"record 1: not a record of zsre \(MEND or KnowEdit form\); it is written like qaedit"):
        load("zsre", SAMPLES / "qaedit.json")
    with pytest.raises(InputError, match=r"not a record of qaedit .*; it has a, b"):
        load("qaedit", write(tmp_path, {"a": 1, "b": 2}))
    with pytest.raises(InputError, match="field 'rephrase' is missing"):
        load("qaedit", write(tmp_path, {k: v for k, v in QA.items() if k != "rephrase"}))


def test_every_sample_is_taken_by_its_own_benchmark_only() -> None:
    for sample, (name, _) in REAL.items():
        first = read_records(SAMPLES / sample)[0]
        takes = [n for n in registry.names("benchmark") if any(f.fits(first) for f in getattr(registry.get("benchmark", n), "forms", ()))]
        assert takes == [name]


def test_what_cannot_be_used_is_counted_by_reason(tmp_path: Path) -> None:
    records = [
        QA,
        {**QA, "target": " "},
        {**QA, "prompt": ""},
        {**QA, "subject": "nobody"},
        {**QA, "subject": ""},
        {**QA, "rephrase": "who?", "locality": [{"loc": "", "loc_ans": "a"}, {"loc": "q", "loc_ans": ""}, {"loc": "q", "loc_ans": []}]},
        {**QA, "prompt": "WHO is it?", "target": "B", "rephrase": ""},
    ]
    benchmark = open_benchmark("qaedit", write(tmp_path, *records))
    cases = list(benchmark.load(seed=None))
    report = benchmark.report
    assert report.dropped == {
        "the target is empty": 1, "the prompt is empty": 1, "the subject does not occur in the prompt": 1, "the subject is empty": 1
    }  # fmt: skip
    assert report.left_out == {
        "rephrase: it is the edited prompt itself": 1, "unrelated: its prompt is empty": 1, "rephrase: its prompt is empty": 1,
        "unrelated: asked twice of one edit": 1,
    }  # fmt: skip
    assert report.joined == 1 and report.cases == len(cases) == 2
    assert cases[1].request.subject == "WHO"  # spelt as in the prompt
    assert [(p.kind, p.prompt, p.target) for p in cases[0].probes] == [
        ("rewrite", "who?", "A"), ("rephrase", "who, say?", "A"), ("unrelated", "q", None)
    ]  # fmt: skip
    assert "dropped 1 record: the target is empty" in report.lines() and "7 records (QAEdit), 2 cases" in report.lines()
    assert report.to_dict()["dropped"]["the target is empty"] == 1


def test_what_a_reader_should_know_is_counted(tmp_path: Path) -> None:
    same = {"prompt": "P is", "target_new": "x", "subject": "P", "ground_truth": "x", "rephrase_prompt": "so P is"}
    records = [
        {**same, "locality_prompt": "Q is", "locality_ground_truth": "z"},
        {**same, "target_new": "y", "locality_prompt": "R is", "locality_ground_truth": "y"},
        {**same, "prompt": "Q is", "subject": "Q", "target_new": "w", "locality_prompt": "R is", "locality_ground_truth": "z"},
    ]
    benchmark = open_benchmark("counterfact", write(tmp_path, *records))
    list(benchmark.load())
    assert benchmark.report.remarks == {
        "the new answer is the old one": 1,
        "a later case writes the same fact otherwise (`consistent` leaves one case a fact)": 1,
        "another case edits the same prompt to another answer": 2,
        "a fact that should stay is edited by another case": 1,
        "a fact that should stay has the new answer": 1,
    }


def test_nothing_usable_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no record makes a case of qaedit; .*dropped 1 record: the target is empty"):
        load("qaedit", write(tmp_path, {**QA, "target": ""}))


def test_a_folder_has_one_file_of_the_benchmark_and_split(tmp_path: Path) -> None:
    write(tmp_path, QA, name="x-QAEdit-1.json")
    write(tmp_path, *read_all("wikibio.json"), name="other_QAEdit.json")
    (tmp_path / "broken_QAEdit.json").write_text("[{")
    assert len(load("qaedit", tmp_path)) == 1
    assert len(load("wikibio", tmp_path, split="QAEdit")) == 5
    with pytest.raises(InputError, match=r"holds no file of qaedit with 'test' in the name"):
        load("qaedit", tmp_path, split="test")
    with pytest.raises(InputError, match=r"holds no file of unke .*; not read: .*broken_QAEdit.json: record 1"):
        load("unke", tmp_path, split="QAEdit")
    write(tmp_path, QA, name="y_QAEdit.jsonl")
    with pytest.raises(InputError, match=r"several files \(x-QAEdit-1.json, y_QAEdit.jsonl\)"):
        load("qaedit", tmp_path)
    with pytest.raises(InputError, match="is one file, which has no splits"):
        load("qaedit", tmp_path / "y_QAEdit.jsonl", split="test")


def read_all(sample: str) -> list[Any]:
    return [dict(r.values) for r in read_records(SAMPLES / sample)]


def test_data_is_needed_or_not() -> None:
    with pytest.raises(InputError, match=r"'zsre' is not in the package; give its file with --data"):
        open_benchmark("zsre")
    with pytest.raises(InputError, match="'almanac' is in the package and takes no data"):
        open_benchmark("almanac", "x.json")
    with pytest.raises(UnknownNameError, match="did you mean 'counterfact'"):
        open_benchmark("counterfct")
    with pytest.raises(InputError, match="no such file or folder"):
        load("zsre", Path("nowhere.json"))
    with pytest.raises(InputError, match="give a number as seed"):
        open_benchmark("almanac").load(seed=None)


def test_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    path, asked = write(tmp_path, QA), []

    def download(repository: str, inside: str, **how: Any) -> str:
        asked.append((repository, inside, how))
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert len(list(open_benchmark("qaedit", "hub:owner/name/a/b.json@v1").load())) == 1
    assert asked == [("owner/name", "a/b.json", {"repo_type": "dataset", "revision": "v1"})]
    for wrong in ("hub:", "hub:owner", "hub:owner/name", "hub:owner/name/@v1"):
        with pytest.raises(InputError, match="write hub:OWNER/NAME/PATH"):
            locate(wrong)
    monkeypatch.undo()
    with pytest.raises(InputError, match=r"hub:owner/name/b.json: could not be fetched .*check name and network"):
        locate("hub:owner/name/b.json")  # the tests are offline
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match="needs huggingface_hub; pip install huggingface_hub"):
        locate("hub:owner/name/b.json")


def test_every_benchmark_says_where_it_comes_from() -> None:
    for name in registry.names("benchmark"):
        kind = registry.get("benchmark", name)
        assert kind.name == name
        assert all(getattr(kind, key).strip() for key in ("version", "source", "licence", "citation", "kind"))
        assert kind.splits and (kind.kind != "edits" or set(kind.probes) <= {*PROBE_KINDS, *ROBUST_KINDS})


@pytest.mark.skipif("ERRATA_DATA" not in os.environ, reason="ERRATA_DATA names no folder with the real files")
def test_the_documented_counts_are_those_of_the_real_files(monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(__file__).parents[1]
    monkeypatch.syspath_prepend(str(root / "scripts"))
    import benchmark_counts

    assert benchmark_counts.text(Path(os.environ["ERRATA_DATA"])) in (root / "docs" / "benchmarks.md").read_text(encoding="utf-8")
