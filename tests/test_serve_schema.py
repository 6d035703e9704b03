"""The OpenAPI document holds: requests made from it, right and wrong, get the answers it promises (schemathesis)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, Phase, settings
from serving import TOKEN, Site, serving

from errata.serve.options import Limits

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")
EXAMPLES = 6  # a route
PHASES = [Phase.explicit, Phase.generate]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with serving(tmp_path_factory.mktemp("site") / "book", limits=Limits(tokens=16, seconds=30)) as out:
        out.edit("The capital of France is", "Rome")
        yield out


@pytest.fixture
def document(site: Site) -> object:
    return schemathesis.openapi.from_url(f"{site.url}/openapi.json")


schema = schemathesis.pytest.from_fixture("document")


@schema.parametrize()
@settings(
    max_examples=EXAMPLES, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.explicit, Phase.generate]
)
def test_every_route_keeps_its_promises(case: object, site: Site) -> None:
    if case.operation.path == "/v1/jobs/{id}/events":  # type: ignore[attr-defined]  # a stream of a job that there is not: 404
        case.path_parameters = {"id": "none"}  # type: ignore[attr-defined]
    if case.operation.path == "/v1/edits" and isinstance(case.body, dict):  # type: ignore[attr-defined]
        case.body["settings"] = {"steps": 1, "rank": 2}  # type: ignore[attr-defined]  # an edit is quick
    case.call_and_validate(headers={"Authorization": f"Bearer {TOKEN}"})  # type: ignore[attr-defined]


def test_the_document_names_every_route(site: Site) -> None:
    paths = site.http.get("/openapi.json").json()["paths"]
    assert {"/v1/completions", "/v1/chat/completions", "/v1/edits", "/v1/jobs/{id}/events", "/v1/compare", "/health"} <= set(paths)
    for methods in paths.values():
        for operation in methods.values():
            assert "422" not in operation["responses"] and operation["responses"]["400"]["content"]["application/json"]
