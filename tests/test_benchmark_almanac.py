"""The almanac benchmark: sizes, and the promises that make its scores mean something."""

from __future__ import annotations

import collections
import subprocess
import sys
from collections.abc import Iterable

import pytest

from errata import registry
from errata.benchmarks import facts as data
from errata.benchmarks.almanac import BYSTANDERS, SPLITS, Almanac, _key, _split
from errata.errors import InputError
from errata.request import PROBE_KINDS, Case
from errata.request import EditRequest as Request


def cases(split: str) -> list[Case]:
    return list(Almanac().load(split))


@pytest.fixture(scope="module")
def said() -> dict[str, data.Fact]:
    """Prompt -> the fact it asks about, made from the facts alone."""
    return {
        template.format(fact.subject): fact
        for fact in data.facts()
        for template in (*data.relations()[fact.relation].templates, *data.relations()[fact.relation].questions)
    }


def edited(split: str, said: dict[str, data.Fact]) -> list[data.Fact]:
    return [said[case.request.prompt] for case in cases(split)]


def kinds(case: Case) -> collections.Counter[str]:
    return collections.Counter(probe.kind for probe in case.probes)


def prompts(case: Case, *kinds: str) -> list[str]:
    return [probe.prompt for probe in case.probes if probe.kind in kinds]


def pair_prompts(request: Request) -> list[str]:
    return [prompt for prompt, _ in request.unrelated]


def test_sizes() -> None:
    assert {split: len(cases(split)) for split in SPLITS} == {"dev": 500, "test": 1000}


@pytest.mark.parametrize("split", SPLITS)
def test_every_case_has_its_probes(split: str) -> None:
    for case in cases(split):
        count = kinds(case)
        assert (count["rewrite"], count["rephrase"], count["neighbour"], count["unrelated"]) == (1, 3, 3, 2), case
        assert count["two_hop"] <= 2
        assert set(count) <= set(PROBE_KINDS)
        assert len(case.request.unrelated) == 2
        everything = [*(p.prompt for p in case.probes), *pair_prompts(case.request)]
        assert len(set(everything)) == len(everything)
    total = sum((kinds(case) for case in cases(split)), collections.Counter())
    assert min(total["two_hop"], total["reverse"], total["alias"]) >= 40


@pytest.mark.parametrize("split", SPLITS)
def test_target_is_wrong_and_of_the_relation(split: str, said: dict[str, data.Fact]) -> None:
    objects = collections.defaultdict(set)
    for fact in data.facts():
        objects[fact.relation].add(fact.object)
    for case in cases(split):
        fact, request = said[case.request.prompt], case.request
        assert (request.subject, request.old, request.paraphrases) == (fact.subject, fact.object, ())
        assert request.target in objects[fact.relation]
        assert request.target.casefold().split()[0] != fact.object.casefold().split()[0]
        assert request.target.casefold() not in request.prompt.casefold()
        assert any(t.format(fact.subject) == request.prompt for t in data.templates(fact)[0]), "trained templates only"
        for probe in case.probes:
            if probe.kind in ("rewrite", "rephrase", "alias"):
                assert probe.target == request.target


@pytest.mark.parametrize("split", SPLITS)
def test_rephrases_hold_an_unseen_template_and_a_question(split: str, said: dict[str, data.Fact]) -> None:
    for case in cases(split):
        fact = said[case.request.prompt]
        asked = prompts(case, "rephrase")
        assert all(said[prompt] == fact for prompt in asked)
        assert any(prompt.endswith("?") for prompt in asked)
        held = {t.format(fact.subject) for t in data.templates(fact)[1]}
        assert not held or held & set(asked)


@pytest.mark.parametrize("split", SPLITS)
def test_locality_probes_are_true_and_of_other_subjects(split: str, said: dict[str, data.Fact]) -> None:
    for case in cases(split):
        fact = said[case.request.prompt]
        for probe in case.probes:
            if probe.kind in ("neighbour", "unrelated"):
                other = said[probe.prompt]
                assert probe.target == other.object
                assert other.subject != fact.subject
                assert (other.relation == fact.relation) == (probe.kind == "neighbour")
                assert probe.kind == "unrelated" or probe.target != case.request.target
        for prompt, answer in case.request.unrelated:
            assert said[prompt].object == answer
            assert said[prompt].relation != fact.relation


@pytest.mark.parametrize("split", SPLITS)
def test_nothing_edited_is_wanted_unchanged_by_another_case(split: str, said: dict[str, data.Fact]) -> None:
    subjects = [_key(fact.subject) for fact in edited(split, said)]
    assert len(set(subjects)) == len(subjects), "one case a subject"
    bystanders = [
        _key(said[p].subject) for case in cases(split) for p in (*prompts(case, "neighbour", "unrelated"), *pair_prompts(case.request))
    ]
    assert not set(subjects) & set(bystanders)


@pytest.mark.parametrize("split", SPLITS)
def test_every_relation_keeps_enough_to_measure_locality_on(split: str) -> None:
    asked = _split(split).asked
    assert set(asked) == set(data.relations())
    assert min(len(rows) for rows in asked.values()) >= BYSTANDERS


@pytest.mark.parametrize("split", SPLITS)
def test_pairs_to_train_on_are_probes_nowhere(split: str, said: dict[str, data.Fact]) -> None:
    trained = {_key(said[p].subject) for case in cases(split) for p in pair_prompts(case.request)}
    asked = {_key(said[p].subject) for case in cases(split) for p in prompts(case, "neighbour", "unrelated")}
    assert trained
    assert not trained & asked


@pytest.mark.parametrize("split", SPLITS)
def test_no_two_cases_want_different_answers_to_one_prompt(split: str) -> None:
    wanted: dict[str, set[str | None]] = collections.defaultdict(set)
    for case in cases(split):
        for probe in case.probes:
            wanted[probe.prompt].add(probe.target)
        for prompt, answer in case.request.unrelated:
            wanted[prompt].add(answer)
    assert {prompt: answers for prompt, answers in wanted.items() if len(answers) > 1} == {}


@pytest.mark.parametrize("split", SPLITS)
def test_two_hop_targets_follow_from_the_new_answer(split: str, said: dict[str, data.Fact]) -> None:
    touched = {(fact.subject, fact.relation) for fact in edited(split, said)}
    seen = 0
    for case in cases(split):
        fact = said[case.request.prompt]
        chains = {c.template.format(fact.subject): c for c in data.chains() if c.first == fact.relation}
        for probe in case.probes:
            if probe.kind == "two_hop":
                second = chains[probe.prompt].second
                assert data.by_subject()[case.request.target, second].object == probe.target
                before = data.by_subject().get((fact.object, second))
                assert before is None or before.object != probe.target
                assert (case.request.target, second) not in touched
                seen += 1
    assert seen > 50


@pytest.mark.parametrize("split", SPLITS)
def test_reverse_probes_ask_for_the_subject(split: str, said: dict[str, data.Fact]) -> None:
    for case in cases(split):
        fact = said[case.request.prompt]
        assert prompts(case, "reverse") == [t.format(case.request.target) for t in data.relations()[fact.relation].reverse]
        assert all(p.target == fact.subject for p in case.probes if p.kind == "reverse")
        assert all(fact.alias is not None and fact.alias in p for p in prompts(case, "alias"))


@pytest.mark.parametrize("split", SPLITS)
def test_generation_starts_beside_the_edit_and_compares_with_true_texts(split: str, said: dict[str, data.Fact]) -> None:
    everything = set(Almanac().collection())
    assert len(everything) == len(Almanac().collection()) == len({f.subject for f in data.facts()})
    several = 0
    for case in cases(split):
        fact, request = said[case.request.prompt], case.request
        prompts, references = Almanac().generation(case)
        assert prompts[0] == fact.subject and 1 <= len(prompts) <= 3 and len(set(prompts)) == len(prompts)
        assert not set(prompts) & {request.prompt, *pair_prompts(request), *(p.prompt for p in case.probes)}
        for prompt in prompts[1:]:
            (name,) = (n for n, r in data.relations().items() if any(t.format(fact.subject) == prompt for t in r.templates))
            assert name != fact.relation and not prompt.endswith("?")
        several += len(prompts) == 3
        owners = [f for f in data.facts() if (f.relation, f.object) == (fact.relation, request.target)]
        assert len(references) == len(owners) >= 1 and set(references) <= everything
        for owner, reference in zip(owners, references, strict=True):
            shown, held = data.templates(owner)
            assert all(f"{t.format(owner.subject)} {request.target}." in reference for t in shown)
            assert not any(f"{t.format(owner.subject)} {request.target}." in reference for t in held), "training text only"
    assert several > 0.8 * len(cases(split))


def test_generation_of_a_foreign_case() -> None:
    with pytest.raises(InputError, match="'The capital of Narnia is' is not a case of the almanac"):
        Almanac().generation(Case(Request("The capital of Narnia is", "Rome", "Narnia"), ()))


def test_dev_and_test_share_no_subject(said: dict[str, data.Fact]) -> None:
    def named(split: str) -> set[str]:
        shown: Iterable[str] = (
            p
            for case in cases(split)
            for p in (*prompts(case, "rewrite", "rephrase", "neighbour", "unrelated"), *pair_prompts(case.request))
        )
        return {_key(said[p].subject) for p in shown}

    assert not named("dev") & named("test")


def test_any_beginning_is_balanced_over_the_relations(said: dict[str, data.Fact]) -> None:
    count = len(data.relations())
    for seed in (0, 1):
        first = collections.Counter(said[case.request.prompt].relation for case in Almanac().load("test", 3 * count, seed))
        assert set(first) == set(data.relations())
        assert set(first.values()) == {3}


def test_n_and_seed() -> None:
    def ids(n: int | None, seed: int) -> list[str]:
        return [case.request.id for case in Almanac().load("test", n, seed)]

    assert ids(40, 0) == ids(40, 0) == ids(None, 0)[:40]
    assert ids(40, 0) != ids(40, 1)
    assert sorted(ids(None, 0)) == sorted(ids(None, 1))
    assert ids(1000, 3) == ids(None, 3)


@pytest.mark.parametrize(
    ("split", "n", "says"),
    [
        ("train", None, r"no split 'train'; it has dev and test"),
        ("", 1, r"no split ''"),
        ("test", 1001, r"1001 cases asked for, but the almanac's test split has 1 to 1000"),
        ("dev", 501, r"dev split has 1 to 500"),
        ("dev", 0, r"0 cases asked for"),
        ("dev", -1, r"-1 cases asked for"),
        ("dev", True, r"n must be a whole number of cases, not True"),
        ("dev", 2.0, r"n must be a whole number of cases, not 2\.0"),
    ],
)
def test_bad_arguments_raise_at_once(split: str, n: int | None, says: str) -> None:
    with pytest.raises(InputError, match=says):
        Almanac().load(split, n)


def test_same_on_another_machine() -> None:
    """Python's own hashes differ between processes; the cases must not."""
    code = "from errata.benchmarks.almanac import Almanac as A; print(*(c.request.id for c in A().load('dev', 50, 7)))"
    other = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": ":".join(sys.path), "PYTHONHASHSEED": "5"},
    )
    assert other.stdout.split() == [case.request.id for case in Almanac().load("dev", 50, 7)]


def test_needs_no_torch() -> None:
    code = "import sys, errata.benchmarks.almanac, errata.report.page, errata.score.metrics; print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONPATH": ":".join(sys.path)})
    assert out.stdout.strip() == "False"


def test_registered_with_source_and_licence() -> None:
    found = registry.get("benchmark", "almanac")
    assert found is Almanac
    assert (found.name, found.version) == ("almanac", "1")
    assert "CounterFact" in found.source
    assert "MIT" in found.licence
