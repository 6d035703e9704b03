"""`errata tune`: what is tried, what counts as better, what is kept through a stop, and how settings are found again."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import harmonic_mean
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from families import lm
from hypothesis import given
from hypothesis import strategies as st

from errata import registry
from errata.cli import main
from errata.errors import ConfigError, StorageError, UnknownNameError
from errata.methods import tuned
from errata.methods.locate.memit import MEMIT
from errata.methods.locate.rome import ROME
from errata.request import Case, EditRequest, Probe
from errata.tune.search import Evaluation, Search, Trial, gain, value_now
from errata.tune.space import blocks_at, carried, values_of


def trial(reliability: list[float], generality: list[float], kept: list[float], **settings: Any) -> Trial:
    values = {"reliability": reliability, "generality": generality, "kept": kept}
    return Trial(settings, {k: {str(i): v for i, v in enumerate(own)} for k, own in values.items()}, 1.0)


# -- what is tried ---------------------------------------------------------------------------------------------


def test_blocks_are_tried_at_relative_depths_as_many_as_the_rules() -> None:
    assert blocks_at(6 / 30, None, 30) == 6 and blocks_at(6 / 30, [5], 18) == [4] and blocks_at(1.0, [5], 18) == [17]
    assert blocks_at(8 / 30, [4, 5, 6], 30) == [6, 7, 8] and blocks_at(1 / 30, [4, 5, 6], 30) == [0, 1]
    assert values_of("layers", ("trace", 5 / 30, 8 / 30), [5], 30, 8) == [[8]]  # the rule's own and one value twice are left out
    assert values_of("layers", ("trace", 8 / 30), [5], 30, None) == [[8]]
    assert values_of("neighbours", ({"contrast": 16, "lr": 1.0},), None, 30, None) == [{"contrast": 16, "lr": 1.0}]
    assert values_of("lr", (1e-3, 5e-3), 5e-3, 30, None) == [1e-3]


@given(st.integers(1, 80), st.integers(1, 80), st.data())
def test_carried_settings_are_blocks_of_the_other_model(depth: int, to: int, data: Any) -> None:
    blocks = sorted(data.draw(st.sets(st.integers(0, depth - 1), min_size=1, max_size=5)))
    settings = {"layers": blocks, "layer": blocks[0], "lr": 0.5}
    assert carried(settings, depth, depth) == settings
    there = carried(settings, depth, to)
    assert there["lr"] == 0.5 and 0 <= there["layer"] < to
    assert there["layers"] == sorted(set(there["layers"])) and all(0 <= b < to for b in there["layers"])


def test_every_method_tunes_settings_that_it_has_with_values_that_it_takes() -> None:
    base = lm("llama")
    tuned_methods = [name for name in registry.names("method") if registry.get("method", name).TUNES]
    assert len(tuned_methods) >= 18
    for name in tuned_methods:
        kind = registry.get("method", name)
        for setting, tries in kind.TUNES.items():
            for value in values_of(setting, tries, value_now(kind(), setting, base), base.depth, 1):
                kind.for_model(base, **(value if isinstance(value, dict) else {setting: value}))


# -- what counts -----------------------------------------------------------------------------------------------


def test_the_score_is_the_harmonic_mean_of_the_three_shares() -> None:
    one = trial([1, 1, 1, 0], [1, 0.5, 0, 0.5], [1, 1, 0.75, 1])
    assert one.score == pytest.approx(harmonic_mean([0.75, 0.5, 0.9375]))
    assert trial([1, 1], [0, 0], [1, 1]).score == pytest.approx(harmonic_mean([1, 0.25, 1]))  # none: half a case
    assert trial([1, 1], [], [1, 0]).score == pytest.approx(harmonic_mean([1, 0.5]))  # no case has such a probe
    assert Trial({}, {k: {} for k in one.values}, 1.0, "too large a rate").score == 0


def test_a_gain_has_the_standard_error_of_its_pairs() -> None:
    low = trial([1] * 20, [0.5] * 20, [1] * 20)
    high = trial([1] * 20, [0.7] * 20, [1] * 20)
    more, error = gain(high, low)
    assert more == pytest.approx(harmonic_mean([1, 0.7, 1]) - harmonic_mean([1, 0.5, 1])) and error == pytest.approx(0, abs=1e-12)
    noisy = trial([1] * 20, [1.0, 0.1] * 10, [1] * 20)
    assert gain(noisy, low)[1] > 0.03 and gain(low, low) == (0.0, 0.0)


class Fake:
    """Trials made up in place of edits: the more of "a", the better; "b" changes nothing."""

    name = "fake"
    TUNES: ClassVar = {"a": (1, 2), "b": (5,)}

    def __init__(self) -> None:
        self.lm, self.made = SimpleNamespace(depth=30), 0

    def trial(self, method: str, settings: dict[str, Any], progress: Any = None) -> Trial:
        self.made += 1
        return trial([1] * 8, [0.2 + 0.3 * settings.get("a", 0)] * 8, [1] * 8, **settings)

    @classmethod
    def untuned(cls, base: Any, **settings: Any) -> Any:
        return SimpleNamespace(a=0, b=0)


def test_a_search_keeps_what_is_better_and_stops_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "get", lambda kind, name: Fake)
    told: list[Any] = []
    search = Search(Fake(), "fake", 100.0, lambda: None, lambda *what: told.append(what))  # type: ignore[arg-type]
    assert dict(search.run().settings) == {"a": 2} and search.cut == [] and [t.settings for t in search.trials][-1] == {"a": 2, "b": 5}
    assert [better for _, _, better in told] == [True, True, True, False]
    short = Search(Fake(), "fake", 2.0, lambda: None, lambda *what: None)  # type: ignore[arg-type]
    assert dict(short.run().settings) == {"a": 1} and short.cut == ["a=2", "b=5"]


# -- what is kept ----------------------------------------------------------------------------------------------


def test_a_trial_is_made_once_also_after_a_line_was_cut_short(tmp_path: Path) -> None:
    base, journal = lm("llama"), tmp_path / "trials.jsonl"
    request = EditRequest("The capital of France is", "Rome", "France", "Paris")
    cases = [Case(request, (Probe("rewrite", request.prompt, "Rome"),))]
    first = Evaluation(base, cases, journal).trial("ft-m", {"steps": 2})
    lines = journal.read_text()
    assert len(lines.splitlines()) == 1 and first.shares["reliability"] in (0.0, 1.0)
    journal.write_text(lines + lines[:20])
    again = Evaluation(base, cases, journal)
    again._make = None  # type: ignore[method-assign]  # nothing is edited anew
    assert again.trial("ft-m", {"steps": 2}).to_dict() == first.to_dict() and first.to_dict()["kept"] is None
    failed = Evaluation(base, cases, journal).trial("ft-m", {"layers": [99]})
    assert "block 99 does not exist" in failed.failed and failed.score == 0
    once_more = Evaluation(base, cases, journal)
    once_more._make = None  # type: ignore[method-assign]
    assert once_more.trial("ft-m", {"layers": [99]}).failed == failed.failed  # the line behind the torn one is whole


def test_settings_are_found_by_the_models_fingerprint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ERRATA_CACHE", str(tmp_path))
    base, other = lm("llama"), lm("gpt2")
    path = tuned.path_of(base.fingerprint)
    who = {"model": "tiny", "fingerprint": base.fingerprint, "depth": base.depth}
    tuned.save(path, who, {"rome": {"settings": {"v_steps": 7, "layers": [1]}}})
    tuned.save(path, who, {"memit": {"settings": {"v_steps": 8}}})  # beside the other
    assert (ROME.for_model(base).v_steps, ROME.for_model(base).layers, MEMIT.for_model(base).v_steps) == (7, (1,), 8)
    assert ROME.for_model(base, v_steps=9).v_steps == 9 and ROME.for_model(base, v_steps=9).layers == (1,)
    assert ROME.for_model(base, preset="rule") == ROME() == ROME.for_model(other)
    with pytest.raises(StorageError, match="holds settings of another model"):
        tuned.save(path, {**who, "fingerprint": other.fingerprint}, {})
    for bad, why in (("{", "no JSON"), ("[]", "not a file of"), ('{"fingerprint": "x", "methods": {"rome": {}}}', "not a file of")):
        path.write_text(bad)
        with pytest.raises(StorageError, match=why):
            ROME.for_model(base)


def test_files_that_come_with_errata_are_whole_and_fit_their_methods() -> None:
    for path in tuned.shipped().values():
        found = tuned.read(path)
        assert found["depth"] > 0 and found["methods"]
        for method, own in found["methods"].items():
            assert len(own["cases"]["dev"]) >= 4 and not set(own["cases"]["dev"]) & set(own["cases"]["unseen"])
            kind = registry.get("method", method)
            kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in own["settings"].items()})
            assert own["unseen"]["gain"] >= 0 or own["settings"] == {}


# -- the command -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tries", [1, pytest.param(99, marks=pytest.mark.slow)])
def test_the_command_finds_settings_goes_on_and_carries_them(
    tries: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ERRATA_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "almanac.json"
    for kind in (registry.get("method", name) for name in ("ft-m", "grace")):
        monkeypatch.setattr(kind, "TUNES", {setting: values[:tries] for setting, values in list(kind.TUNES.items())[:tries]})
    line = ["tune", "almanac", "--benchmark", "almanac", "--split", "dev", "--n", "4", "--method", "ft-m,grace", "--out", str(out)]
    assert main([*line, "--minutes", "1", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [row["method"] for row in document["methods"]] == ["ft-m", "grace"] and document["saved"] == str(out)
    assert document["dev"] == document["unseen"] == 4 and all(row["tried"] > 1 for row in document["methods"])
    found = tuned.read(out)
    assert set(found["methods"]) == {"ft-m", "grace"}
    assert all(own["cases"]["dev"] and not set(own["cases"]["dev"]) & set(own["cases"]["unseen"]) for own in found["methods"].values())
    for row in document["methods"]:
        assert row["unseen"]["gain"] >= 0 or row["settings"] == {}
    monkeypatch.setattr(Evaluation, "_make", None)  # the second time everything is in the journal
    assert main([*line, "--minutes", "1"]) == 0
    said = capsys.readouterr().out
    assert "S is the harmonic mean" in said and f"Saved in {out}." in said
    assert main(["tune", "almanac", "--benchmark", "almanac", "--split", "dev", "--n", "4", "--method", "grace", "--carry", str(out)]) == 0
    assert "from almanac" in capsys.readouterr().out


def test_wrong_arguments_are_refused_before_any_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "almanac", "--carry", "nobody"]) == 2
    assert "no model of that name is tuned" in capsys.readouterr().err
    (tmp_path / "f.json").write_text(json.dumps({"fingerprint": "x", "depth": 3, "methods": {"rome": {"settings": {}}}}))
    assert main(["tune", "almanac", "--method", "baft", "--carry", str(tmp_path / "f.json")]) == 2
    assert "has no settings of baft; it has rome" in capsys.readouterr().err
    assert main(["tune", "almanac", "--benchmark", "known1000", "--data", str(tmp_path)]) == 2
    assert main(["tune", "almanac", "--method", "ft-m", "--benchmark", "everyday", "--n", "4"]) == 2
    assert "a search needs 8" in capsys.readouterr().err
    with pytest.raises(UnknownNameError), pytest.MonkeyPatch.context():
        registry.get("method", "nothing")
    with pytest.raises(ConfigError):
        carried({}, 0, 3)
