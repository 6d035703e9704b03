"""The OpenAPI document holds: requests made from it, right and wrong, get the answers it promises (schemathesis)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from serving import TOKEN, Site, serving

from errata.serve.options import Limits

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")
from schemathesis.specs.openapi.checks import positive_data_acceptance  # noqa: E402

HOW = settings(
    max_examples=4, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate]
)
EDIT = {"steps": 1, "rank": 2}  # an edit that is quick


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with serving(tmp_path_factory.mktemp("site") / "book", limits=Limits(body=1 << 25, tokens=16, seconds=30)) as out:
        out.edit("The capital of France is", "Rome")
        yield out


def hold(url: str, mode: Any) -> int:
    """Requests of one mode for every route, each checked; how many there were."""
    sent = [0]

    def keeps(operation: Any) -> None:
        @given(case=operation.as_strategy(generation_mode=mode))
        @HOW
        def promises(case: Any) -> None:
            if operation.path == "/v1/edits" and operation.method == "post" and isinstance(case.body, dict):
                case.body["settings"] = EDIT
            sent[0] += 1
            case.call_and_validate(headers={"Authorization": f"Bearer {TOKEN}"}, excluded_checks=LENIENT)

        promises()

    for result in schemathesis.openapi.from_url(f"{url}/openapi.json").get_all_operations():
        operation = result.ok()
        if mode is schemathesis.GenerationMode.POSITIVE or operation.body:  # what takes nothing cannot be asked wrongly
            keeps(operation)
    return sent[0]


# A request may fit the document and still be refused: an unknown model, a subject that its prompt does not hold, texts of no token.
LENIENT = [positive_data_acceptance]


@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode), ids=lambda m: m.name.lower())
def test_every_route_keeps_its_promises(mode: Any, site: Site) -> None:
    assert hold(site.url, mode) >= 20


def test_the_document_names_every_route(site: Site) -> None:
    paths = site.http.get("/openapi.json").json()["paths"]
    assert {"/v1/completions", "/v1/chat/completions", "/v1/edits", "/v1/jobs/{id}/events", "/v1/compare", "/health"} <= set(paths)
    for methods in paths.values():
        for operation in methods.values():
            assert "422" not in operation["responses"] and operation["responses"]["400"]["content"]["application/json"]
