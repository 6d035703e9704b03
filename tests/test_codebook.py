"""The look-up that GRACE and MELO share: the nearest key whatever the norms, hits on the edge of a radius, labels."""

from __future__ import annotations

import pytest
import torch
from codebooks import text

from errata.methods.codebook.grace import GRACE
from errata.methods.codebook.lookup import nearest, nearest_within_radius, rounding_of
from errata.methods.codebook.store import FilledCodebook, pack, unpack


@pytest.mark.parametrize("far", [0.0, 30.0, 1000.0])
def test_the_coarse_look_up_gives_the_nearest_key(far: float) -> None:
    """Keys of norms up to 8,000 that lie around 1 apart: a look-up by products alone picks wrong ones, ours does not."""
    generator = torch.Generator().manual_seed(0)
    keys = far + torch.randn(700, 64, generator=generator) * torch.rand(700, 1, generator=generator)
    query = keys[torch.randint(700, (90,), generator=generator)] + 0.05 * torch.randn(90, 64, generator=generator)
    exact = torch.cdist(query.double(), keys.double(), compute_mode="donot_use_mm_for_euclid_dist")
    distance, number = nearest(keys, query)
    torch.testing.assert_close(distance.double(), exact.min(1)[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(exact.gather(1, number[:, None])[:, 0], exact.min(1)[0], atol=1e-4, rtol=1e-4)
    naive = (keys.square().sum(1) - 2 * query @ keys.T).argmin(1)
    assert (naive == exact.argmin(1)).all() == (far < 1000)
    own = keys.expand(90, -1, -1)[:, :50]  # a book a row
    torch.testing.assert_close(nearest(own, query)[0], nearest(keys[:50], query)[0], atol=1e-4, rtol=1e-4)


def test_queries_on_a_radius_are_hit_whatever_the_last_bits() -> None:
    """Coverage puts radii exactly on a query; in another batch that query differs in its last bits."""
    key = torch.full((1, 640), 40.0)  # norm 1,012
    query = key + 0.05 * torch.randn(1, 640, generator=torch.Generator().manual_seed(0))
    book = FilledCodebook(GRACE(eps=1.0), None, [text(key[0], 5), text(query[0], 5)], 0.0)
    assert book.counts["expanded"] == 1
    noisy = query + 1e-6 * 40 * torch.randn(500, 640, generator=torch.Generator().manual_seed(1))
    keys, radii = book.book.keys, book.radii
    assert 50 < int((nearest_within_radius(keys, radii, noisy, 0.0) < 0).sum()) < 450
    assert (nearest_within_radius(keys, radii, noisy, rounding_of(torch.float32)) == 0).all()
    away = key + 1.3 * (query - key)
    assert (nearest_within_radius(keys, radii, away, rounding_of(torch.float32)) == -1).all()


def test_labels_survive_packing() -> None:
    labels = [(3, 0), (), (5,), (1, 2, 3)]
    assert unpack(pack(labels)) == labels
    assert unpack(pack([])) == []
