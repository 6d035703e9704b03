"""What families.json claims is well-formed, covers the laws' families, and is true of the models; the check behind it can fail."""

from __future__ import annotations

import copy
import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import docs_families
import families_file
import pytest
import torch
import verify_families
from families import FAMILIES, build
from families_file import TINY

from errata import registry
from errata.core import families as known
from errata.core.model import LM
from errata.errors import ModelError

DATA = families_file.read()
METHODS = registry.names("method")


def claims(family: str, weights: str = TINY) -> list[dict[str, Any]]:
    return [claim for claim in DATA["families"][family]["verified"] if claim["weights"] == weights]


# -- the data -------------------------------------------------------------------------------------------------


def test_the_data_is_well_formed() -> None:
    assert families_file.faults(DATA) == []


def test_the_tiny_claims_are_those_of_the_laws() -> None:
    """One for each family that is built in tests/families.py, and none for another; every method is claimed, or failed with a reason."""
    assert {family for family in DATA["families"] if claims(family)} == set(FAMILIES)
    for family in FAMILIES:
        (claim,) = claims(family)
        assert claim["methods"] == [m for m in METHODS if m not in claim["failed"]], f"run scripts/verify_families.py --family {family}"
        assert claim["dtypes"] == ["float32", "bfloat16"] and claim["forward"] and claim["undo"]


def test_the_almanac_is_verified_and_some_families_are_not() -> None:
    (claim,) = claims("llama", "almanac")
    assert claim["methods"] == METHODS
    assert DATA["families"]["gptj"]["verified"] == DATA["families"]["gemma3"]["verified"] == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d.update(familys={}), "'familys' is not one of"),
        (lambda d: d["all_methods"].remove("rome"), "all_methods are not the methods that are registered"),
        (lambda d: d["families"]["gpt2"].update(verifed=[]), "gpt2: has"),
        (lambda d: d["families"]["gpt2"]["paths"].update(block="transformer.h"), "gpt2: paths are"),
        (lambda d: d["families"]["gpt2"]["paths"].update(blocks="transformer h"), "gpt2: blocks is 'transformer h'"),
        (lambda d: d["families"]["llama"]["verified"][0].pop("undo"), "llama: a verification has"),
        (lambda d: d["families"]["llama"]["verified"][0].update(forward="yes"), "llama: forward is 'yes', not a bool"),
        (lambda d: d["families"]["llama"]["verified"][0].update(weights="tiny"), "llama: nobody knows the weights 'tiny'"),
        (lambda d: d["families"]["llama"]["verified"][0].update(dtypes=["float8"]), "llama: dtypes"),
        (lambda d: d["families"]["llama"]["verified"][0]["methods"].append("memmit"), "llama: no method is called 'memmit'"),
        (lambda d: d["families"]["llama"]["verified"][0]["failed"].update(rome="why"), "llama: rome is said to work and to fail"),
        (lambda d: d["families"]["llama"]["verified"][0].update(forward=False), "llama: whether the forward holds"),
        (lambda d: d["families"]["llama"]["verified"][0].update(date="today"), "llama: 'today' is no date"),
        (lambda d: d["families"]["llama"]["verified"].append(d["families"]["llama"]["verified"][0]), "llama: two verifications"),
    ],
)
def test_what_is_wrong_in_the_data_is_found(change: Any, said: str) -> None:
    data = copy.deepcopy(DATA)
    change(data)
    found = families_file.faults(data)
    assert any(fault.startswith(said) for fault in found), found


def test_writing_and_reading_is_the_same_and_a_new_method_is_claimed_for_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "families.json"
    families_file.write(DATA, path)
    assert path.read_text(encoding="utf-8") == known.FILE.read_text(encoding="utf-8")
    monkeypatch.setitem(registry.ENTRIES["method"], "brand-new", "errata.methods.none:Unedited")
    assert "run scripts/verify_families.py" in " ".join(families_file.faults(families_file.read(path)))
    families_file.write(families_file.read(path), path)  # as after one family was verified anew: the others keep what they had
    raw = json.loads(path.read_text(encoding="utf-8"))
    assert "brand-new" in raw["all_methods"] and raw["families"]["gpt2"]["verified"][0]["methods"] == METHODS


# -- the paths ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [f for f in FAMILIES if DATA["families"][f]["paths"] is not None])
def test_the_paths_are_those_of_the_model(family: str) -> None:
    hf = build(family)
    found, paths = known.find(hf), DATA["families"][family]["paths"]
    assert found == known.Family(family, **paths, found="table")
    blocks = known.resolve(hf, paths["blocks"])
    assert len(blocks) == hf.config.num_hidden_layers
    for block in blocks:
        for part in ("mlp_down", "attn_out"):
            module = known.resolve(block, paths[part])
            assert known.is_linear(module) and known.linear_sizes(module)[1] == hf.config.hidden_size
    assert known.resolve(hf, paths["embedding"]) is hf.get_input_embeddings()
    assert "norm" in type(known.resolve(hf, paths["final_norm"])).__name__.lower()


def test_a_family_without_paths_is_searched() -> None:
    assert DATA["families"]["starcoder2"]["paths"] is None
    assert known.find(build("starcoder2")).found == "search"


def test_of_two_lists_of_blocks_the_one_that_runs_is_taken() -> None:
    hf = build("starcoder2")
    hf.spare = deepcopy(hf.model.layers)  # as many blocks, and no text runs through them
    assert known.find(hf).blocks == "model.layers"


def test_what_is_not_found_is_told_where_to_go() -> None:
    hf = build("starcoder2")
    hf.config.num_hidden_layers = 5
    with pytest.raises(ModelError, match=r"add a row to errata/core/families\.json"):
        known.find(hf)


# -- the check ------------------------------------------------------------------------------------------------


def checked(*methods: str) -> dict[str, Any]:
    return verify_families.check(verify_families.tiny("gpt2"), methods, ["float32"])


def test_the_check_holds() -> None:
    claim = checked("rome", "none")
    assert tuple(claim) == tuple(families_file.FIELDS)
    assert claim["forward"] and claim["undo"] and claim["methods"] == ["rome", "none"] and claim["failed"] == {}


def test_the_check_fails_when_detach_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LM, "detach", lambda self, *ids: None)
    claim = checked("rome")
    assert not claim["undo"] and claim["methods"] == [] and claim["failed"]["rome"] == "float32: undo: the logits are not as before"


def test_the_check_fails_when_a_method_writes_a_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """That of a position no text reaches: no logit shows it, but the weights do.  The methods after it get the model as it was."""
    from errata.methods.locate.rome import ROME

    real = ROME.edit_each

    def writes(self: Any, lm: LM, *args: Any, **more: Any) -> Any:
        patches = real(self, lm, *args, **more)
        with torch.no_grad():
            lm.hf.transformer.wpe.weight[-1] += 1.0
        return patches

    monkeypatch.setattr(ROME, "edit_each", writes)
    claim = checked("rome", "none")
    assert not claim["undo"] and claim["methods"] == ["none"]
    assert claim["failed"] == {"rome": "float32: undo: the weight transformer.wpe.weight was changed"}


def test_the_check_fails_when_padding_is_counted_as_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LM, "forward", lambda self, ids, mask, **more: self.hf(input_ids=ids, attention_mask=mask, **more))
    claim = checked("none")
    assert not claim["forward"] and claim["failed"]["forward"].startswith("float32: padded on the left, logits are off by")


def test_the_check_says_why_a_method_stopped_or_did_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from errata.methods.locate.rome import ROME
    from errata.methods.none import Unedited

    monkeypatch.setattr(ROME, "edit_each", lambda self, lm, requests: Unedited().edit_each(lm, requests))
    assert checked("rome")["failed"] == {"rome": "float32: attached, it changes nothing"}
    monkeypatch.setattr(ROME, "edit_each", lambda self, lm, requests: 1 / 0)
    assert checked("rome")["failed"] == {"rome": "float32: ZeroDivisionError: division by zero"}


def test_the_script_writes_one_family_and_keeps_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "names", lambda kind: ["none"])
    monkeypatch.setenv("ERRATA_CACHE", str(tmp_path))
    out = tmp_path / "out.json"
    assert verify_families.main(["--family", "gpt2", "--weights", "tiny", "--out", str(out)]) == 0
    written = families_file.read(out)["families"]
    assert written["gpt2"]["verified"][0]["methods"] == ["none"]
    assert {**written, "gpt2": None} == {**DATA["families"], "gpt2": None}
    with pytest.raises(SystemExit):
        verify_families.main(["--family", "gtp2", "--out", str(out)])


# -- the page -------------------------------------------------------------------------------------------------


def test_the_table_has_a_line_a_family_and_says_what_failed() -> None:
    data = copy.deepcopy(DATA)
    claim = data["families"]["gpt2"]["verified"][0]
    claim.update(forward=False, methods=[m for m in METHODS if m != "rome"], failed={"forward": "float32: off", "rome": "float32: why"})
    lines = docs_families.families(data).splitlines()
    assert len(lines) == 2 + len(data["families"])
    (gpt2,) = [line for line in lines if line.startswith("| `gpt2`")]
    assert gpt2.endswith(f"| **no** | yes | {len(METHODS) - 1} of {len(METHODS)} |")
    assert lines[-1].startswith("| `gptj` | name | not verified |")
    assert "- `gpt2`, tiny, trained in the tests: rome failed. float32: why" in docs_families.failures(data)
