"""Second moments of keys: against a plain loop; the cache; going on after a stop; every source of text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from families import lm

from errata.cli import main
from errata.core.model import LM
from errata.core.patch import Site
from errata.errors import InputError, PatchError, StorageError
from errata.text import statistics as stats
from errata.text.corpora import bundled, open_corpus
from errata.text.statistics import Moments, load, moments, save

SITES = [Site(1, "mlp_down"), Site(2, "mlp_down")]
TEXTS = ["The capital of France is Paris.", "In Rome people speak Italian.", "The language of Spain is Spanish.", "Tokyo"] * 5


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(TEXTS))
    return str(path)


def plain(model: LM, site: Site, texts: list[str]) -> tuple[torch.Tensor, int]:
    """C by one text a pass."""
    total, count = 0.0, 0
    for one in texts:
        seen = []
        module = model.module(Site(site.block, "mlp_down"))
        handle = module.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0][0].detach()))
        model.hf(input_ids=model.tokenizer(one, return_tensors="pt")["input_ids"])
        handle.remove()
        total, count = total + seen[0].T @ seen[0], count + len(seen[0])
    return total / count, count


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("batch_tokens", [8, 64, 4096])
def test_moments_are_the_mean_outer_product_over_every_token(family: str, batch_tokens: int, text: str, tmp_path: Path) -> None:
    model = lm(family, torch.float64)
    found = moments(model, SITES, text, tokens=10**6, batch_tokens=batch_tokens, cache=tmp_path / "cache")
    for site in SITES:
        want, count = plain(model, site, TEXTS)
        assert found[site].tokens == count and found[site].second_moment.dtype == torch.float64
        torch.testing.assert_close(found[site].second_moment, want, atol=1e-12, rtol=1e-9)


def test_the_cache_is_read_and_belongs_to_one_model(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, model = tmp_path / "cache", lm("llama")
    first = moments(model, SITES[:1], text, tokens=100, cache=cache)
    both = moments(lm("llama"), SITES, text, tokens=100, cache=cache)  # the missing one is made, the other read
    assert torch.equal(both[SITES[0]].second_moment, first[SITES[0]].second_moment)
    monkeypatch.setattr(stats, "_Pass", None)
    assert torch.equal(moments(lm("llama"), SITES, text, tokens=100, cache=cache)[SITES[1]].second_moment, both[SITES[1]].second_moment)
    files = sorted((cache / "stats").iterdir())
    assert len(files) == 2 and all(model.fingerprint in f.name for f in files)
    with pytest.raises(PatchError, match=r"moments of model .* make them for this model with `errata stats`"):
        load(files[0], lm("qwen2"), SITES[0])
    with pytest.raises(PatchError, match="at block 1"):
        load(files[0], model, SITES[1])
    with pytest.raises(TypeError):  # another text, another count: another entry, so a new pass is begun
        moments(lm("llama"), SITES, text, tokens=101, cache=cache)
    Path(text).write_text("Other words.")
    with pytest.raises(TypeError):
        moments(lm("llama"), SITES, text, tokens=100, cache=cache)
    files[0].write_bytes(files[0].read_bytes()[:100])
    with pytest.raises(StorageError, match="damaged or truncated"):
        load(files[0], model, SITES[0])


@pytest.mark.parametrize("damage", [False, True])
def test_a_stopped_pass_goes_on_where_it_was(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: bool) -> None:
    monkeypatch.setattr(stats, "WINDOW", 2)
    monkeypatch.setattr(stats, "SAVE_SECONDS", 0.0)
    cache = tmp_path / "cache"
    whole = moments(lm("llama"), SITES, text, tokens=10**6, cache=tmp_path / "other")

    def stop(done: int, of: int) -> None:
        seen.append(done)
        if len(seen) == 6:
            raise KeyboardInterrupt

    seen: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        moments(lm("llama"), SITES, text, tokens=10**6, cache=cache, progress=stop)
    (partial,) = (cache / "stats").glob("partial-*")
    if damage:  # a damaged beginning costs the work, nothing else
        partial.write_bytes(b"x" * 50)
    again: list[int] = []
    found = moments(lm("llama"), SITES, text, tokens=10**6, cache=cache, progress=lambda done, of: again.append(done))
    assert (again[0] > seen[0]) != damage
    for site in SITES:
        torch.testing.assert_close(found[site].second_moment, whole[site].second_moment)
        assert found[site].tokens == whole[site].tokens
    assert not list((cache / "stats").glob("partial-*"))


def test_solve_eigen_and_null_space() -> None:
    generator = torch.Generator().manual_seed(0)
    k = torch.randn(12, 7, generator=generator, dtype=torch.float64)
    m = Moments(SITES[0], k @ k.T / 7, 7, "", "")  # rank 7 of 12
    assert m.null_space(1e-9).shape == (12, 5) and m.null_space(share=0.25).shape == (12, 3)
    torch.testing.assert_close(m.null_space(1e-9).T @ k, torch.zeros(5, 7, dtype=torch.float64), atol=1e-9, rtol=0)
    x = torch.randn(12, 3, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(
        m.second_moment @ m.solve(m.second_moment @ x), m.second_moment @ x, atol=1e-5, rtol=1e-5
    )  # singular: the least ridge is added
    full = Moments(SITES[0], m.second_moment + torch.eye(12, dtype=torch.float64), 7, "", "")
    torch.testing.assert_close(full.solve(x), torch.linalg.solve(full.second_moment, x))
    torch.testing.assert_close(full.solve(x, 0.5), torch.linalg.solve(full.second_moment + 0.5 * torch.eye(12, dtype=torch.float64), x))


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, content: bytes) -> None:
        path.write_bytes(content[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(stats.storage, "write", full)
    with pytest.raises(StorageError, match=r"nothing was written \(No space left on device\).*ERRATA_CACHE"):
        save(Moments(SITES[0], torch.eye(3), 1, "", ""), tmp_path / "a" / "m.safetensors")
    assert not list((tmp_path / "a").iterdir())


def test_every_source_of_text(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "a.txt").write_text("one\n\n two \n")
    (tmp_path / "b" / "c.jsonl").write_text('{"text": "three"}\n\n{"text": "four", "more": 1}\n')
    assert list(open_corpus(str(tmp_path / "a.txt")).texts) == ["one", "two"]
    assert list(open_corpus(str(tmp_path)).texts) == ["one", "two", "three", "four"]
    assert open_corpus("bundled").digest != open_corpus("heldout").digest
    assert len(open_corpus("almanac").texts) > len(open_corpus("bundled").texts) > 1000
    assert open_corpus("bundled").texts[0] in bundled("train")


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (b"", "t.txt", "holds no text"),
        (b"\n \n", "t.txt", "holds no text"),
        (b"\xff\xfe", "t.txt", "not UTF-8 at byte 0"),
        (b'{"text": 1\n', "t.jsonl", "t.jsonl:1: expected an object"),
        (b'{"words": "x"}\n', "t.jsonl", "t.jsonl:1: expected an object"),
    ],
)
def test_text_that_cannot_be_read(content: bytes, name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        open_corpus(str(tmp_path / name))


def test_sources_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="no such text; give bundled"):
        open_corpus(str(tmp_path / "none.txt"))
    with pytest.raises(InputError, match=r"holds no \.txt"):
        open_corpus(str(tmp_path))
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(InputError, match="needs the package `datasets`"):
        open_corpus("hub:wikitext")
    with pytest.raises(InputError, match="tokens must be at least 1"):
        moments(lm("llama"), SITES, tokens=0)


def test_the_command(tiny: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stats", tiny, "--text", text, "--tokens", "100", "--layers", "1,2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [b["block"] for b in found["blocks"]] == [1, 2] and all(b["tokens"] >= 100 for b in found["blocks"])
    assert all(0 <= b["null_share"] <= 1 and b["smallest"] <= b["median"] <= b["largest"] for b in found["blocks"])
    assert main(["stats", tiny, "--text", text, "--tokens", "100"]) == 0  # the blocks that the methods edit in this model
    assert "null space" in capsys.readouterr().out
    wrong = {"--layers=9": "block 9 does not exist", "--layers=x": "write block numbers", "--text=no.txt": "no such text"}
    for argument, message in wrong.items():
        assert main(["stats", tiny, argument]) == 2
        assert message in capsys.readouterr().err
