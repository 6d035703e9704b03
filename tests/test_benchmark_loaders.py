"""What each benchmark's fields become: request and probes, one record of every form, real where the licence lets it be here."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from errata.benchmarks.convsent import QUESTION, SENTIMENTS
from errata.benchmarks.files import FileBenchmark, open_benchmark
from errata.benchmarks.records import read_records
from errata.benchmarks.wise import halves
from errata.errors import InputError
from errata.request import Case

SAMPLES = Path(__file__).parent / "data" / "benchmarks"
Told = list[tuple[Any, ...]]


def one(name: str, record: dict[str, Any], folder: Path) -> Case:
    """The case of a record written as a file."""
    path = folder / "data.json"
    path.write_text(json.dumps([record]), encoding="utf-8")
    (case,) = open_benchmark(name, path).load()
    return case


def told(case: Case, *kinds: str) -> Told:
    """(kind, prompt, target[, further answers]) of the probes, those of some kinds."""
    return [(p.kind, p.prompt, p.target, *p.also) for p in case.probes if not kinds or p.kind in kinds]


def real(name: str, sample: str) -> list[tuple[dict[str, Any], Case]]:
    """(record, case) of a sample in which every record makes one."""
    records = [dict(r.values) for r in read_records(SAMPLES / sample)]
    cases = list(open_benchmark(name, SAMPLES / sample).load(seed=None))
    assert len(records) == len(cases)
    return list(zip(records, cases, strict=True))


MEND = {
    "subject": "Lake Nowhere", "src": "Which river feeds Lake Nowhere?", "pred": "Rhine", "rephrase": "What is Lake Nowhere fed by?",
    "alt": "Danube", "answers": ["Oder", "Odra"], "cond": "Rhine >> Danube || Which river feeds Lake Nowhere?",
}  # fmt: skip


def test_zsre_mend(tmp_path: Path) -> None:
    portability = {"Recalled Relation": "(Danube, flows into, Black Sea)", "New Question": "Where does it end?", "New Answer": "Black Sea"}
    record = {**MEND, "loc": "nq question: who sang it", "loc_ans": "Nina", "portability": portability}
    case = one("zsre", record, tmp_path)
    request = case.request
    assert (request.prompt, request.target, request.subject, request.old) == (MEND["src"], "Danube", "Lake Nowhere", "Oder")
    assert told(case) == [
        ("rewrite", MEND["src"], "Danube"),
        ("rephrase", MEND["rephrase"], "Danube"),
        ("unrelated", "nq question: who sang it", "Nina"),
        ("two_hop", "Where does it end?", "Black Sea"),
    ]


def test_zsre_other_subject_and_backwards(tmp_path: Path) -> None:
    other = {**MEND, "alternative_subject": "the Nowhere", "alter_subject_question": "Which river feeds the Nowhere?"}
    assert told(one("zsre", other, tmp_path), "alias") == [("alias", "Which river feeds the Nowhere?", "Danube")]
    back = {**MEND, "inverse question": "What does the Danube feed?"}
    assert told(one("zsre", back, tmp_path), "reverse") == [("reverse", "What does the Danube feed?", "Lake Nowhere")]


def test_zsre_knowedit(tmp_path: Path) -> None:
    record = {
        "subject": "Lake Nowhere", "prompt": MEND["src"], "target_new": "Danube", "ground_truth": ["Oder"], "cond": "…",
        "rephrase_prompt": "Fed by what is Lake Nowhere?", "generate_prompt": ["Lake Nowhere gets its water from", ""],
        "locality": {"Relation_Specificity": [{"prompt": "Lake Nowhere country", "ground_truth": ["Poland"]}]},
        "portability": {"Logical_Generalization": [{"prompt": "The Danube feeds", "ground_truth": "Lake Nowhere"}]},
    }  # fmt: skip
    case = one("zsre", record, tmp_path)
    assert case.request.old == "Oder"
    assert told(case)[1:] == [
        ("rephrase", "Fed by what is Lake Nowhere?", "Danube"),
        ("rephrase", "Lake Nowhere gets its water from", "Danube"),
        ("logical", "The Danube feeds", "Lake Nowhere"),
        ("same_subject", "Lake Nowhere country", "Poland"),
    ]


@pytest.mark.parametrize(("name", "sample"), [("wiki-recent", "wiki-recent.json"), ("wiki-counterfact", "wiki-counterfact.jsonl")])
def test_wikidata(name: str, sample: str) -> None:
    keys = {
        "two_hop": ("portability", "Reasoning"), "alias": ("portability", "Subject_Aliasing"),
        "logical": ("portability", "Logical_Generalization"), "same_subject": ("locality", "Relation_Specificity"),
        "forgetfulness": ("locality", "Forgetfulness"),
    }  # fmt: skip
    seen = set()
    for record, case in real(name, sample):
        request = case.request
        assert (request.prompt, request.target, request.old) == (record["prompt"], record["target_new"], record.get("ground_truth"))
        for kind, (field, key) in keys.items():
            wanted = {q["prompt"]: [a for answers in q["ground_truth"] for a in answers] for q in record[field].get(key, ())}
            found = {prompt: [target, *also] for _, prompt, target, *also in told(case, kind)}
            assert set(found) <= set(wanted) and all(set(found[p]) == set(wanted[p]) and found[p][0] == wanted[p][0] for p in found)
            assert {p for p in wanted if any(a.strip() for a in wanted[p])} - set(found) <= {record["prompt"]}
            seen |= {kind} if found else set()
        rephrases = [record["rephrase"]] if "rephrase" in record else record["generate_prompt"]
        assert [p for _, p, _ in told(case, "rephrase")] == [p for p in dict.fromkeys(rephrases) if p.strip()]
    assert seen == set(keys)


def test_wikibio() -> None:
    for record, case in real("wikibio", "wikibio.json"):
        assert (case.request.prompt, case.request.target, case.request.old) == (record["text"], record["labels"], None)
        assert case.request.subject == record["concept"]
        asked = [("same_subject", q["prompt"], *q["ground_truth"]) for q in record["locality"]["Relation_Specificity"]]
        assert told(case) == [("rewrite", record["text"], record["labels"]), *asked]


def test_counterfact_original() -> None:
    for record, case in real("counterfact", "counterfact-original.json"):
        edit = record["requested_rewrite"]
        new, true = edit["target_new"]["str"], edit["target_true"]["str"]
        request = case.request
        assert request.prompt == edit["prompt"].replace("{}", edit["subject"])
        assert (request.target, request.old, request.subject) == (new, true, edit["subject"])
        assert told(case, "rephrase") == [("rephrase", p, new) for p in record["paraphrase_prompts"]]
        assert told(case, "neighbour") == [("neighbour", p, true) for p in dict.fromkeys(record["neighborhood_prompts"])]
        assert told(case, "distracting") == [("distracting", p, true) for p in dict.fromkeys(record["distracting_neighborhood_prompts"])]
        assert told(case, "same_subject") == [
            ("same_subject", record["unrelated_relation"]["question"], record["unrelated_relation"]["object"])
        ]
        assert told(case, "two_hop") == [("two_hop", record["portability"]["New Question"], record["portability"]["New Answer"])]
        assert not {p for _, p, *_ in told(case)} & set(record["attribute_prompts"])


def test_counterfact_offers_prompts_for_fluency_but_no_references() -> None:
    benchmark = open_benchmark("counterfact", SAMPLES / "counterfact-original.json")
    records = {r.values["requested_rewrite"]["subject"]: r.values["generation_prompts"] for r in read_records(benchmark.data)}
    for case in benchmark.load(n=3):
        prompts, references = benchmark.generation(case)
        assert list(prompts) == list(dict.fromkeys(records[case.request.subject])) and references == ()
    assert benchmark.collection() == ()
    flat = open_benchmark("counterfact", SAMPLES / "counterfact-flattened.json")
    assert [flat.generation(case) for case in flat.load(n=1)] == [((), ())]


def test_counterfact_flattened_and_alias(tmp_path: Path) -> None:
    for record, case in real("counterfact", "counterfact-flattened.json"):
        assert (case.request.old, case.request.subject) == (record["ground_truth"], record["subject"])
        assert told(case)[1:] == [
            ("rephrase", record["rephrase_prompt"], record["target_new"]),
            ("neighbour", record["locality_prompt"], record["locality_ground_truth"]),
        ]
    for record, case in real("counterfact", "counterfact-alias.json"):
        prompt = record["requested_rewrite"]["prompt"].replace("{}", record["alternative_subject"])
        assert told(case, "alias") == [("alias", prompt, case.request.target)]
    wrong = json.loads((SAMPLES / "counterfact-alias.json").read_text(encoding="utf-8"))[0]
    wrong["requested_rewrite"]["prompt"] = "died in"
    with pytest.raises(InputError, match=r"record 1, requested_rewrite: the prompt 'died in' must hold \{\} once"):
        one("counterfact", wrong, tmp_path)


def test_mquake_writes_a_chain_together() -> None:
    for record, case in real("mquake", "mquake.json"):
        edits = record["requested_rewrite"]
        assert [(r.prompt, r.target, r.old) for r in case.requests] == [
            (e["prompt"].replace("{}", e["subject"]), e["target_new"]["str"], e["target_true"]["str"]) for e in edits
        ]
        assert len(case.more) == len(edits) - 1 == 3
        assert told(case, "rephrase") == [("rephrase", e["question"], e["target_new"]["str"]) for e in edits]
        aliases = [a for a in record["new_answer_alias"] if a != record["new_answer"]]
        assert told(case, "multi_hop") == [("multi_hop", q, record["new_answer"], *aliases) for q in record["questions"]]
        assert not told(case, "unrelated")  # every fact of these chains is edited


def test_mquake_keeps_the_facts_of_a_chain_that_no_edit_changes(tmp_path: Path) -> None:
    def target(text: str) -> dict[str, str]:
        return {"str": text, "id": "Q1"}

    def hop(question: str, cloze: str, answer: str, *alias: str) -> dict[str, Any]:
        return {"question": question, "cloze": cloze, "answer": answer, "answer_alias": list(alias)}

    edit = {
        "prompt": "{} lives in", "relation_id": "P1", "target_new": target("Oslo"), "target_true": target("Rome"), "subject": "Ann",
        "question": "Where does Ann live?", "fact_new": "Ann lives in Oslo.", "fact_new_uns": "…", "verify_unsfact_GPT": True,
        "unsfact_triplets_GPT": [],
    }  # fmt: skip
    record = {
        "case_id": 1, "requested_rewrite": [edit], "questions": ["What country is Ann's home in?"], "answer": "Italy", "answer_alias": [],
        "new_answer": "Norway", "new_answer_alias": ["Norge"], "single_hops": [], "orig": {},
        "new_single_hops": [hop("Where does Ann live?", "Ann lives in", "Oslo"), hop("Where is Oslo?", "Oslo lies in", "Norway", "Norge")],
    }  # fmt: skip
    case = one("mquake", record, tmp_path)
    assert not case.more and case.id == case.request.id
    assert told(case) == [
        ("rewrite", "Ann lives in", "Oslo"),
        ("rephrase", "Where does Ann live?", "Oslo"),
        ("two_hop", "What country is Ann's home in?", "Norway", "Norge"),
        ("unrelated", "Oslo lies in", "Norway", "Norge"),
    ]
    two = {**record, "requested_rewrite": [edit, {**edit, "subject": "Oslo", "prompt": "{} lies in", "question": "Where is Oslo?"}]}
    assert told(one("mquake", two, tmp_path), "unrelated") == []
    assert one("mquake", two, tmp_path).id != case.id


def test_wise(tmp_path: Path) -> None:
    record = {
        "prompt": "Ann is",
        "target_new": "a sailor.",
        "subject": "Ann",
        "locality_prompt": "A sh",
        "locality_ground_truth": "op sells",
    }
    case = one("wise-hallucination", record, tmp_path)
    assert told(case) == [("rewrite", "Ann is", "a sailor."), ("unrelated", "A sh", "op sells")] and case.request.old is None
    case = one("wise-temporal", {**record, "ood_rephrase": "Ann lives at sea. She sails. Often."}, tmp_path)
    assert told(case, "out_of_domain") == [("out_of_domain", "Ann lives at sea.", "She sails. Often.")]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("One. Two", ("One.", "Two")),
        (" A sentence of six whole words ", ("A sentence of", "six whole words")),
        ("It ends. ", ("It", "ends.")),
        ("Word", ("", "Word")),
    ],
)
def test_halves(text: str, parts: tuple[str, str]) -> None:
    assert halves(text) == parts


def test_qaedit() -> None:
    for record, case in real("qaedit", "qaedit.json"):
        assert (case.request.prompt, case.request.target, case.request.old) == (record["prompt"], record["target"], None)
        assert told(case)[1:] == [
            ("rephrase", record["rephrase"], record["target"]), *(("unrelated", q["loc"], q["loc_ans"]) for q in record["locality"])
        ]  # fmt: skip


def test_unke(tmp_path: Path) -> None:
    record = {
        "id": 0,
        "question": "Why?",
        "para_question": "For what?",
        "answer": "Long. Very.",
        "sub_question": ["How?"],
        "sub_answer": ["So."],
    }
    case = one("unke", record, tmp_path)
    assert case.request.subject is None
    assert told(case) == [("rewrite", "Why?", "Long. Very."), ("rephrase", "For what?", "Long. Very."), ("sub_fact", "How?", "So.")]
    with pytest.raises(InputError, match="record 1: 2 sub_question but 1 sub_answer"):
        one("unke", {**record, "sub_question": ["How?", "When?"]}, tmp_path)


def test_peak(tmp_path: Path) -> None:
    edit = {"prompt": "{} plays for", "relation_id": "r", "target_new": {"str": "X"}, "target_true": {"str": "Y"}, "subject": "Ann"}
    record = {
        "case_id": 0, "requested_rewrite": edit, "postive_list": ["Y"], "negtive_list": ["Z"], "negtive_random_list": [],
        "para_add_prompts": ["Ann, a player of"], "neighborhood_prompts": [["Bob plays for", "Y"]],
    }  # fmt: skip
    case = one("peak", record, tmp_path)
    assert told(case) == [("rewrite", "Ann plays for", "X"), ("rephrase", "Ann, a player of", "X"), ("neighbour", "Bob plays for", "Y")]
    assert case.request.old is None  # it is appended to, not replaced
    with pytest.raises(InputError, match=r"neighborhood_prompts\[0\] must be a pair"):
        one("peak", {**record, "neighborhood_prompts": [["Bob plays for"]]}, tmp_path)


def test_convsent_wants_one_sentiment_and_never_edits_bystanders() -> None:
    benchmark: FileBenchmark = open_benchmark("convsent", SAMPLES / "convsent.json")
    records = {r.values["ent"]: {side: {t.strip() for t in r.values[side]} for side in SENTIMENTS} for r in read_records(benchmark.data)}
    cases = list(benchmark.load())
    edited = {case.request.subject for case in cases}
    bystanders = set(records) - edited
    assert len(bystanders) == benchmark.report.dropped["set aside as a bystander, whose replies should stay"] >= 1
    for case in cases:
        thing = case.request.subject
        assert case.request.prompt == QUESTION.format(thing)
        (wanted,) = [side for side in SENTIMENTS if case.request.target in records[thing][side]]
        (other,) = {*SENTIMENTS} - {wanted}
        same, opposite = ({t for _, _, t in told(case, kind)} for kind in ("same_sentiment", "opposite_sentiment"))
        assert same == records[thing][wanted] - {case.request.target} and opposite == records[thing][other]
        assert {p for _, p, _ in told(case, "same_sentiment", "opposite_sentiment")} == {case.request.prompt}
        asked = told(case, "unrelated")
        assert {p for _, p, _ in asked} <= {QUESTION.format(b) for b in bystanders} and {t for *_, t in asked} == {None}


def test_convsent_draws_both_sentiments_about_equally(tmp_path: Path) -> None:
    records = [{"ent": f"thing {i}", "pos": ["good", "fine"], "neg": ["bad", "poor"]} for i in range(400)]
    path = tmp_path / "data.json"
    path.write_text(json.dumps(records))
    cases = list(open_benchmark("convsent", path).load())
    good = sum(case.request.target in ("good", "fine") for case in cases)
    assert abs(good - len(cases) / 2) < 3 * math.sqrt(len(cases)) / 2
    assert 400 - len(cases) == pytest.approx(40, abs=3 * math.sqrt(36))
