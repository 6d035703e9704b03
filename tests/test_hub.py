"""Patches on the hub: pushed and fetched through `huggingface_hub` itself, against a stand-in of the hub's API."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from families import lm
from hub import Hub, hub_here
from huggingface_hub import constants
from made import made

import errata
from errata.cli import main
from errata.core.patch_source import load_patches
from errata.errors import InputError, PatchError, StorageError
from errata.request import EditRequest


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with hub_here() as found:
        monkeypatch.setattr(constants, "ENDPOINT", found.address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", found.address + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield found


def test_what_is_pushed_is_what_is_fetched_and_nothing_else_is_there(hub: Hub) -> None:
    base = lm("llama")
    patch = made(base, 1)
    url = patch.push_to_hub("me/lyon", licence="apache-2.0", scores={"reliability": 1.0}, token="hf_writer")
    assert sorted(hub.files("me/lyon")) == ["README.md", "patch.json", "patch.safetensors"]
    (commit,) = [c for c in hub.commits["me/lyon"] if c in url]
    assert {key for how, path, key in hub.asked if how == "POST" and "/commit/" in path} == {"Bearer hf_writer"}
    for back in (errata.load_patch("me/lyon"), errata.Patch.from_hub("me/lyon", revision=commit), *load_patches(["me/lyon"])):
        assert back.id == patch.id and back.requests == patch.requests
    for one, other in zip(patch.ops, errata.load_patch("me/lyon").ops, strict=True):
        assert all(one.tensors[k].equal(other.tensors[k]) for k in one.tensors)


def test_its_card_says_whose_edit_it_is_and_how_it_is_taken_back(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    base = lm("llama")
    monkeypatch.setattr("errata.core.patch_card._NAMES", {base.fingerprint: "someone/small-llama"})
    patch = errata.edit(base, "The *capital* of\nFrance is", "Rome", subject="France", method="none")
    patch.push_to_hub("me/lyon", licence="mit", scores={"reliability": 0.98})
    card = hub.files("me/lyon")["README.md"].decode()
    _, head, text = re.split(r"^---$", card, maxsplit=2, flags=re.M)
    fields = yaml.safe_load(head)
    assert fields["base_model"] == "someone/small-llama" and fields["license"] == "mit" and fields["library_name"] == "errata"
    assert "none" in fields["tags"]
    for said in (
        patch.id,
        base.fingerprint,
        "`someone/small-llama`",
        r"- The \*capital\* of France is **Rome**",
        "lm.detach(patch)",
        "0.98",
    ):
        assert said in text
    assert 'errata.load_patch("me/lyon")' in text
    assert errata.load_patch("me/lyon").notes["model"] == "someone/small-llama"


def test_a_later_push_is_a_commit_and_a_pinned_revision_stays(hub: Hub) -> None:
    base = lm("llama")
    first, second = made(base, 1), made(base, 2)
    pinned = first.push_to_hub("me/lyon").rsplit("/", 1)[1]
    second.push_to_hub("me/lyon")
    first.push_to_hub("me/lyon", revision="try")
    assert errata.load_patch("me/lyon").id == second.id
    assert errata.load_patch("me/lyon", revision=pinned).id == errata.load_patch("me/lyon", revision="try").id == first.id


def test_what_the_hub_refuses_is_one_error(hub: Hub) -> None:
    patch = made(lm("llama"), 1)
    with pytest.raises(StorageError, match=r"did not take the patch .*403"):
        patch.push_to_hub("me/lyon", token="hf_reader")
    with pytest.raises(InputError, match="is no repository of the hub"):
        patch.push_to_hub("lyon")
    patch.push_to_hub("me/lyon")
    for name, revision in (("me/rome", None), ("me/lyon", "never")):
        with pytest.raises(StorageError, match=f"{name}: could not be fetched"):
            errata.load_patch(name, revision=revision)
    for damaged in ("patch.safetensors", "patch.json"):
        there = hub.files("me/lyon")
        kept, there[damaged] = there[damaged], b"{}"
        with pytest.raises(PatchError):
            errata.load_patch("me/lyon", revision=_again(hub))
        there[damaged] = kept


def test_a_hub_that_is_out_of_reach_is_one_error(monkeypatch: pytest.MonkeyPatch, hub: Hub) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(StorageError, match="did not take the patch"):
        made(lm("llama"), 1).push_to_hub("me/lyon")
    with pytest.raises(StorageError, match="could not be fetched"):
        errata.load_patch("me/lyon")
    with pytest.raises(StorageError, match="there is no folder out/lyon, and out/lyon: could not be fetched"):
        load_patches(["out/lyon"])  # a mistyped folder looks like a repository
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(StorageError, match="could not be fetched"):
        errata.load_patch("me/lyon")


def test_a_repository_without_a_patch_is_said_to_have_none(hub: Hub) -> None:
    made(lm("llama"), 1).push_to_hub("me/lyon")
    for name in ("patch.json", "patch.safetensors"):
        del hub.files("me/lyon")[name]
    with pytest.raises(PatchError, match=r"me/lyon.*patch\.json is missing"):
        errata.load_patch("me/lyon")


def _again(hub: Hub) -> str:
    """The same files under a new commit, which no cache has."""
    commit = f"{len(hub.commits['me/lyon']):040d}"
    hub.commits["me/lyon"][commit] = hub.files("me/lyon")
    return commit


def test_a_folder_comes_before_a_repository_of_its_name(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = lm("llama")
    made(base, 1).push_to_hub("me/lyon")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "me").mkdir()
    here = made(base, 2)
    here.save(tmp_path / "me" / "lyon")
    assert errata.load_patch("me/lyon").id == load_patches(["me/lyon"])[0].id == here.id
    with pytest.raises(PatchError, match=r"patch\.json is missing"):
        errata.load_patch(tmp_path / "me" / "nothing")


def test_a_folder_of_edits_is_the_patch_it_holds_or_names_them(tmp_path: Path) -> None:
    requests = [EditRequest("The capital of France is", "Lyon", "France"), EditRequest("The capital of Italy is", "Turin", "Italy")]
    for number, facts in enumerate((requests[:1], requests)):
        path = tmp_path / f"{number}.jsonl"
        path.write_text("".join(f'{{"prompt": "{r.prompt}", "target": "{r.target}", "subject": "{r.subject}"}}\n' for r in facts))
        more = ["--mode", "single"] if number else []
        told = ["edit", "almanac", "--method", "none", "--requests", str(path), "--out", str(tmp_path / str(number)), "--neighbours", "0"]
        assert main([*told, *more]) in (0, 1)
    (one,) = load_patches([str(tmp_path / "0")])
    assert errata.Patch.load(tmp_path / "0").id == errata.load_patch(tmp_path / "0").id == one.id
    assert "`almanac`" in (tmp_path / "0" / one.id / "README.md").read_text()
    two = load_patches([str(tmp_path / "1")])
    with pytest.raises(PatchError, match="holds 2 patches; name one of them") as error:
        errata.Patch.load(tmp_path / "1")
    assert all(p.id in str(error.value) for p in two)


def test_the_command_pushes(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    patch = made(lm("llama"), 1)
    patch.save(tmp_path / "lyon")
    assert main(["patch", "push", str(tmp_path / "lyon"), "me/lyon", "--licence", "mit", "--revision", "try"]) == 0
    assert f"patch {patch.id} is at {hub.address}/me/lyon/commit/" in capsys.readouterr().out
    assert errata.load_patch("me/lyon", revision="try").id == patch.id
    assert main(["patch", "push", str(tmp_path / "lyon"), "lyon"]) == 2
    assert "write OWNER/NAME" in capsys.readouterr().err
