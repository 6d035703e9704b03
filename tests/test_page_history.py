"""The page and what happens beside it: keys that are held, jobs that end half way, other people's edits, edits written again."""

from __future__ import annotations

import functools
import json
import re
import time
from collections.abc import Callable
from typing import Any

from desk import FRANCE, SPAIN, Desk, Server

QUICK = {"steps": 10}
FOCUS = "document.activeElement.id || document.activeElement.tagName"


def test_a_key_that_is_held_undoes_one_edit(desk: Callable[..., Desk], server: Server) -> None:
    (first,), (second,) = (server.edit(**fact, settings=QUICK)["edits"] for fact in (FRANCE, SPAIN))
    at = desk()
    at.side("After")
    at.page.locator("h1").click()
    keys = at.page.keyboard
    keys.down("Control")
    for _ in range(12):
        keys.down("z")  # repeats, as long as it is not let go
    assert at.number("is undone") == second
    for _ in range(12):
        keys.down("z")
    keys.up("z")
    keys.up("Control")
    at.side("After")
    assert [e["number"] for e in server.edits()] == [first]
    twice = at.page.evaluate_handle(f"document.querySelector('[aria-label=\"Undo edit {first}\"]')")
    twice.evaluate("button => { button.click(); button.click(); }")
    at.said.get_by_text(f"Edit {first} is undone").wait_for()
    at.side("After")
    assert server.edits() == [] and at.trouble.inner_text() == ""


def test_two_wishes_are_two(desk: Callable[..., Desk], server: Server) -> None:
    """Presses and buttons while the first undo has not ended; and what was typed meanwhile stays."""
    at = desk()
    at.page.route("**/v1/edits/*", slowly)
    for wish in ("keys", "buttons"):
        numbers = [server.edit(**fact, settings=QUICK)["edits"][0] for fact in (FRANCE, SPAIN)]
        for number in numbers:
            at.history.get_by_role("button", name=f"Undo edit {number}").wait_for()
        if wish == "keys":
            at.page.locator("h1").click()
            at.page.keyboard.press("Control+z")
            at.page.keyboard.press("Control+z")
        else:
            for number in numbers:
                at.press(f"Undo edit {number}")
        at.fill("The capital of Japan is", "Kyoto")
        for number in numbers:
            at.page.locator(f"#history .undone[data-edit='{number}']").wait_for(state="attached")
        assert server.edits() == []
        at.side("After")
        assert [at.page.locator(f"#{name}").input_value() for name in ("prompt", "target")] == ["The capital of Japan is", "Kyoto"]
    assert any(re.fullmatch(r"said: Edit \d+ is being undone …", s) for s in at.page.evaluate("window.seen"))


def slowly(route: Any) -> None:
    time.sleep(0.3)
    route.continue_()


def test_an_undo_that_another_one_did_first_is_none(desk: Callable[..., Desk], server: Server) -> None:
    (number,) = server.edit(**FRANCE, settings=QUICK)["edits"]
    at = desk()
    at.side("After")
    at.page.route("**/health", lambda route: route.abort())  # it does not hear of it
    server.call("DELETE", f"v1/edits/{number}")
    at.press(f"Undo edit {number}")
    at.said.get_by_text(f"Edit {number} is undone already").wait_for()
    assert at.trouble.inner_text() == "" and at.side("After")[0] == "Paris"


def test_only_a_missing_token_asks_for_one(desk: Callable[..., Desk], server: Server) -> None:
    at = desk()
    error = {"error": {"message": "start it with --allow-files", "code": "files_not_allowed"}}
    at.page.route("**/v1/edits", lambda r: r.fulfill(status=403, json=error) if r.request.method == "POST" else r.continue_())
    at.fill(**FRANCE)
    at.press("Edit")
    at.trouble.get_by_text("--allow-files").wait_for()
    assert at.page.get_by_role("textbox", name="Token").is_hidden()


def test_other_peoples_edits_do_not_take_the_focus(desk: Callable[..., Desk], server: Server) -> None:
    at = desk()
    at.fill(**FRANCE)
    at.press("Only ask")
    at.moved.get_by_role("button").first.wait_for()
    for place in (at.page.locator("#trace-it"), at.moved.get_by_role("button").first):
        place.focus()
        held = at.page.evaluate("document.activeElement.textContent")
        (number,) = server.edit(**SPAIN, settings=QUICK)["edits"]
        undo = at.history.get_by_role("button", name=f"Undo edit {number}")
        undo.wait_for()
        at.side("After")
        assert at.page.evaluate("document.activeElement.textContent") == held
        server.call("DELETE", f"v1/edits/{number}")
        undo.wait_for(state="detached")


def stream(route: Any, body: str) -> None:
    route.fulfill(body=body, content_type="text/event-stream")


def test_what_was_written_before_a_job_ended_is_said(desk: Callable[..., Desk], server: Server) -> None:
    (number,) = server.edit(**FRANCE)["edits"]
    at = desk()
    begun = {"job": {"id": "7"}}
    for status, words in (("cancelled", "the rest is not written."), ("failed", "the disk is full")):
        last = {"status": status, "edits": [number], "findings": [], "error": {"message": "the disk is full"}}
        at.page.route("**/v1/edits", lambda r: r.fulfill(json=begun) if r.request.method == "POST" else r.continue_())
        events = f"data: {json.dumps(last)}\n\n"
        at.page.route("**/v1/jobs/7/events", functools.partial(stream, body=events))
        at.fill(**FRANCE)
        at.press("Edit")
        note = at.page.locator("#notes").get_by_text(words)
        note.wait_for()
        assert f"Written before that, and live: edit {number}." in note.inner_text()
        at.page.unroute_all()
    at.history.get_by_role("button", name=f"Undo edit {number}").wait_for()


def test_what_others_change_is_seen(desk: Callable[..., Desk], server: Server) -> None:
    """Also where as many edits are live as before."""
    (number,) = server.edit(**FRANCE, settings=QUICK)["edits"]
    at = desk()
    assert at.side("After")[0] == "Lyon"
    server.call("DELETE", f"v1/edits/{number}")
    (other,) = server.edit(**SPAIN, settings=QUICK)["edits"]
    at.history.get_by_role("button", name=f"Undo edit {other}").wait_for()
    at.answers.get_by_text("Both give the same answer").wait_for()
    assert at.side("After")[0] == "Paris"


def test_an_address_with_a_token_may_be_opened_in_the_same_tab(desk: Callable[..., Desk], server: Server) -> None:
    at = desk(server.root)
    at.page.get_by_role("textbox", name="Token").wait_for()
    at.page.evaluate("token => { location.hash = 'token=' + token; }", server.token)
    at.page.get_by_role("textbox", name="Token").wait_for(state="hidden")
    assert "token" not in at.page.url
    assert at.write(**FRANCE)


def test_a_joint_edit_is_written_again_as_one(desk: Callable[..., Desk], server: Server) -> None:
    facts = {"requests": [FRANCE, SPAIN], "mode": "batched", "batch_size": 2, "settings": QUICK, "reason": "ticket 9"}
    (number,) = server.edit(**facts, force=True)["edits"]
    at = desk()
    at.press(f"Undo edit {number}")
    assert at.number("is undone") == number
    at.press("Redo it")
    again = at.number("is live")
    (edit,) = server.edits()
    assert edit["number"] == again and len(edit["requests"]) == 2 and edit["settings"]["steps"] == 10
    assert edit["applied"]["reason"] == "ticket 9"


def test_an_edit_that_came_as_a_patch_is_not_guessed_at(desk: Callable[..., Desk], server: Server) -> None:
    (number,) = server.edit(**FRANCE, settings=QUICK)["edits"]
    server.call("DELETE", f"v1/edits/{number}")

    def told(route: Any) -> None:
        found = route.fetch().json()
        route.fulfill(json={"edits": [{**e, "settings": None} for e in found["edits"]]})

    at = desk()
    at.page.route("**/v1/edits?live=false", told)
    at.page.reload()
    at.page.locator("#history summary").click()
    at.press(f"Redo edit {number}")
    at.said.get_by_text("came as a finished patch").wait_for()
    assert server.edits() == []


def test_the_focus_is_not_lost_with_a_button(desk: Callable[..., Desk], server: Server) -> None:
    at = desk()
    offered = at.answers.get_by_role("button").first
    offered.focus()
    at.page.keyboard.press("Enter")
    at.side("After")
    assert at.page.evaluate(FOCUS) == "result"
    at.write(**FRANCE)
    undo = at.page.get_by_role("button", name="Undo it")
    undo.focus()
    at.page.keyboard.press("Enter")
    at.number("is undone")
    assert at.page.evaluate(FOCUS) == "notes"
    asked = at.moved.get_by_role("button").first
    asked.focus()
    at.page.keyboard.press("Enter")
    at.side("After")
    assert at.page.evaluate(FOCUS) == "result"
    endless = json.dumps({**FRANCE, "settings": {"steps": 100_000, "stop": 0.0}})
    at.page.route("**/v1/edits", lambda route: route.continue_(post_data=endless if route.request.method == "POST" else None))
    at.fill(**FRANCE)
    at.press("Edit")
    at.page.locator("#loss").get_by_text("step").wait_for()
    at.page.get_by_role("button", name="Cancel").focus()
    at.page.keyboard.press("Enter")
    at.said.get_by_text("nothing was changed").wait_for()
    at.page.locator("#job").wait_for(state="hidden")
    assert at.page.evaluate(FOCUS) == "notes"
