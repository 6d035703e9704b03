"""The page of `errata serve almanac` in a real browser: what a user does with it, by pointer and by keyboard, on a screen and on a phone.

ERRATA_SCREENSHOTS=docs/page python -m pytest tests/test_page.py      takes the pictures of docs/page.md
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable

import pytest
from browser import NARROW
from desk import FRANCE, SPAIN, WATCHED, Desk, Server

HOSTILE = "<script>1</script><img src onerror=document.title=1>"


# -- screens (first: the ledger of the pictures is short) --------------------------------------------------------


def test_it_can_be_read_everywhere(desk: Callable[..., Desk], server: Server) -> None:
    server.edit(**SPAIN)
    (number,) = server.edit(**FRANCE, reason="ticket 41")["edits"]
    for name, size, scheme in (("light", (1280, 1000), "light"), ("dark", (1280, 1000), "dark"), ("phone", NARROW, "light")):
        at = desk(size=size, scheme=scheme, has_touch=name == "phone")
        at.fill(**FRANCE)
        at.answers.get_by_text(f"Edit {number} changes this answer").wait_for()
        rows = at.rows()
        at.press("Trace it")
        at.page.locator("table.heat").wait_for()
        more = at.page.locator("summary", has_text="More")
        more.click()
        assert at.view.overflow() == []
        if name != "phone":  # that has the colours of light
            assert at.view.faults("color-contrast" if name == "dark" else "") == []
        more.click()
        at.page.mouse.move(2, 2)
        at.page.evaluate("y => { document.activeElement.blur(); scrollTo(0, y); }", 10_000 if name == "dark" else 0)
        at.view.picture(f"{name}.png")
        assert at.view.complaints == []
        assert len(rows) >= 10 and rows["The capital of Spain is"][1].endswith("Seville")
        if name == "phone":
            assert all(before.startswith("before ") for before, _, _ in rows.values()), "labels where there are no columns"


# -- the story ---------------------------------------------------------------------------------------------------


def test_a_fact_is_written_seen_and_taken_back(desk: Callable[..., Desk], server: Server) -> None:
    at = desk()
    assert "token" not in at.page.url, "it is in no bookmark and no picture"
    number = at.write(**FRANCE)

    seen = at.page.evaluate("window.seen")
    assert "stage: Editing" in seen
    steps = [s for s in seen if re.match(r"loss: step \d+ of \d+", s)]
    assert len(set(steps)) > 1 and any(", loss " in s for s in steps), "watched while it trains"

    before, marked, odds = at.side("Before")
    assert (before, marked) == ("Paris", ["Paris"]) and odds["Paris"] > 0.5 > odds["Lyon"]
    after, marked, odds = at.side("After")
    assert (after, marked) == ("Lyon", ["Lyon"]) and odds["Lyon"] > 0.5 > odds["Paris"]
    at.answers.get_by_text(f"Edit {number} changes this answer").wait_for()

    rows = at.rows()
    # a question has two lines, which a table shows as one
    answers = server.call("POST", "v1/compare", {"prompts": [p for p in rows if not p.startswith("Question: ")]})["answers"]
    assert set(WATCHED) < set(rows) and sum(p.startswith("The capital of") for p in rows) >= 6, "and the same, asked of others"
    assert any(p.startswith("Question: ") for p in rows) and any(p.startswith("Here is what an encyclopedia says") for p in rows)
    for row in answers:
        before, after, moved = rows[row["prompt"]]
        assert before == (row["before"]["text"] or "(nothing)") and moved == pytest.approx(row["moved"], abs=0.0011)  # "< 0.1 %"
        assert after == ((row["after"]["text"] or "(nothing)") if row["changed"] else "the same")
    changed = [p for p, (_, after, _) in rows.items() if after != "the same"]
    assert {row["prompt"] for row in answers if row["changed"]} <= set(changed)
    at.moved.get_by_text(f"{len(changed) or 'None'} of {len(rows)} other answers changed").wait_for()
    assert sorted(list(rows)[: len(changed)]) == sorted(changed), "these stand first"

    at.page.get_by_role("button", name="Trace it").click()
    heat = at.page.get_by_role("region", name="Where the fact is").locator("table")
    heat.wait_for()
    assert heat.locator("tbody th").all_text_contents()[-2:] == ["France (subject)", "is"]
    assert heat.locator("thead th").all_inner_texts()[1:] == [str(b) for b in range(8)]
    cells = heat.locator("tbody td").evaluate_all("cells => cells.map(c => [Number(c.textContent), getComputedStyle(c).backgroundColor])")
    darkest, lightest = (pick(cells)[1] for pick in (max, min))
    assert max(cells)[0] > 50 and darkest != lightest

    entry = at.page.locator(f"#history [data-edit='{number}']")
    assert "The capital of France is Lyon" in entry.inner_text() and "ada" in entry.inner_text()
    at.history.get_by_role("button", name=f"Undo edit {number}").click()
    assert at.number("is undone") == number
    at.answers.get_by_text("Both give the same answer").wait_for()
    assert at.side("After")[:2] == ("Paris", []) and server.edits() == []
    assert "undone" in entry.inner_text()

    at.press("Redo it")
    assert at.number("is live") > number
    assert at.side("After")[0] == "Lyon"
    assert at.view.complaints == [] and all(a.startswith(server.root) for a in at.view.asked)


def test_it_is_done_by_keyboard_alone(desk: Callable[..., Desk], server: Server) -> None:
    at = desk()
    key, page = at.page.keyboard, at.page
    held = "document.activeElement.id || document.activeElement.getAttribute('aria-label') || document.activeElement.textContent"
    key.press("Control+k")
    for name, text in (("prompt", FRANCE["prompt"]), ("target", "Lyon"), ("subject", "France")):
        assert page.evaluate(held) == name
        key.type(text)
        key.press("Tab")
    assert page.evaluate(held) == "edit"
    outline = page.evaluate("(() => { const s = getComputedStyle(document.activeElement); return [s.outlineStyle, s.outlineWidth]; })()")
    assert outline == ["solid", "2px"], "where the focus is can be seen"
    key.press("Enter")
    number = at.number("is live")
    assert at.side("After")[0] == "Lyon"

    reached = []
    page.locator("#trace-it").wait_for()
    while (now := page.evaluate(held)) not in reached and len(reached) < 80:
        reached.append(now)
        key.press("Tab")
    assert {"edit", "ask", "Undo it", "Left side", "Right side", "trace-it", f"Undo edit {number}"} <= set(reached)
    page.locator("#trace-it").focus()
    key.press("Enter")
    heat = at.page.get_by_role("region", name="Where the fact is").locator("table")
    heat.wait_for()
    whole = heat.locator("tbody").inner_text()
    key.press("ArrowRight")
    page.get_by_text("Percent, MLPs").wait_for()
    assert heat.locator("tbody").inner_text() != whole

    page.get_by_role("textbox", name="Subject").focus()
    key.press("Control+z")
    assert page.evaluate("document.activeElement.value") != "France" and len(server.edits()) == 1, "in a field, Ctrl+Z is the field's"
    page.get_by_role("button", name=f"Undo edit {number}").focus()
    key.press("Control+z")
    assert at.number("is undone") == number
    assert at.side("After")[0] == "Paris" and server.edits() == []
    assert page.evaluate(held) == f"Redo edit {number}", "the focus stays at the edit"
    assert at.view.complaints == []


# -- what goes wrong ---------------------------------------------------------------------------------------------


def test_a_contradiction_is_said_and_may_be_insisted_on(desk: Callable[..., Desk], server: Server) -> None:
    at = desk()
    at.fill("The capital of Italy is", "Rome", "Italy")
    at.press("Edit")
    at.trouble.get_by_text("the model as it is now answers 'Rome' already").wait_for()
    at.fill("The capital of Italy is", "", "Italy")
    at.page.keyboard.press("Control+Enter")
    at.said.get_by_text("Which answer should it give?").wait_for()
    assert at.page.evaluate("document.activeElement.id") == "target"
    (number,) = server.edit(**FRANCE)["edits"]
    at.fill(FRANCE["prompt"], "Nice", "France")
    at.press("Edit")
    at.trouble.get_by_text(f"edit {number} writes 'Lyon' after 'The capital of France is'").wait_for()
    assert len(server.edits()) == 1
    at.press("Edit anyway")
    at.number("is live")
    (answer,) = server.call("POST", "v1/compare", {"prompts": [FRANCE["prompt"]]})["answers"]
    assert at.side("After")[0] == answer["after"]["text"] and len(server.edits()) == 2
    assert [c for c in at.view.complaints if "409" not in c] == [], "of the console, only the browser's own line on the refused request"


def test_without_the_token_it_shows_and_asks_for_it(desk: Callable[..., Desk], server: Server) -> None:
    (number,) = server.edit(**FRANCE)["edits"]
    at = desk(server.root)
    assert at.side("After")[0] == "Lyon"
    at.fill(**SPAIN)
    at.press("Edit")
    at.trouble.get_by_text("needs the server's token").wait_for()
    for token, ends in (("not this one at all", at.trouble.get_by_text("needs the server's token")), (server.token, None)):
        at.page.get_by_role("textbox", name="Token").fill(token)
        at.press("Use it")
        at.said.get_by_text("The token is kept until this tab is closed").wait_for()
        assert at.page.get_by_role("textbox", name="Token").is_hidden()
        at.press(f"Undo edit {number}")
        if ends is not None:
            ends.wait_for()
            assert len(server.edits()) == 1
    assert at.number("is undone") == number and server.edits() == []


def test_a_server_that_is_gone_is_said_and_comes_back(desk: Callable[..., Desk]) -> None:
    at = desk()
    alarm = at.page.get_by_role("alert").filter(has_text="The server does not answer")
    at.page.context.set_offline(True)
    at.fill(FRANCE["prompt"])
    at.press("Only ask")
    alarm.wait_for()
    at.page.context.set_offline(False)
    alarm.wait_for(state="hidden")
    at.press("Only ask")
    at.answers.get_by_text("Both give the same answer").wait_for()


def test_an_edit_is_cancelled(desk: Callable[..., Desk], server: Server) -> None:
    at = desk()
    endless = json.dumps({**FRANCE, "settings": {"steps": 100_000, "stop": 0.0}})
    at.page.route("**/v1/edits", lambda route: route.continue_(post_data=endless if route.request.method == "POST" else None))
    for stop in (lambda: at.press("Cancel"), lambda: at.page.keyboard.press("Escape")):
        at.fill(**FRANCE)
        at.press("Edit")
        at.page.locator("#loss").get_by_text("step").wait_for()
        stop()
        at.said.get_by_text("The edit is cancelled; nothing was changed.").wait_for()
        at.page.locator("#job").wait_for(state="hidden")
        assert server.edits() == []


def test_an_edit_inside_a_chain_is_undone_by_making_the_later_ones_again(desk: Callable[..., Desk], server: Server) -> None:
    first, second = (server.edit(**fact, mode="continual", settings={"steps": 3})["edits"][0] for fact in (FRANCE, SPAIN))
    at = desk()
    at.page.get_by_role("button", name=f"Undo edit {first}").click()
    at.trouble.get_by_text(f"edit {first} is inside a chain").wait_for()
    at.press("Undo, and make the later ones again")
    assert at.number("is undone") == first
    at.said.get_by_text(f"Made again without it: {second}").wait_for()
    assert [e["number"] for e in server.edits()] == [second]


def test_what_a_user_or_a_model_wrote_is_text(desk: Callable[..., Desk], server: Server) -> None:
    server.edit(prompt=HOSTILE + " is", target=HOSTILE, author=HOSTILE, reason=HOSTILE, settings={"steps": 1}, force=True)
    at = desk()
    at.history.get_by_text(HOSTILE).first.wait_for()
    at.side("After")
    assert at.history.inner_text().count(HOSTILE) == 4 and HOSTILE in at.answers.inner_text(), "prompt, target, author, reason"
    at.fill(HOSTILE, HOSTILE, HOSTILE)
    at.press("Only ask")
    at.side("After")
    assert HOSTILE in at.page.locator("#trace").inner_text()
    at.fill(HOSTILE + " is", HOSTILE, "img")
    at.press("Edit")
    at.trouble.get_by_text(HOSTILE).wait_for()
    assert at.page.locator("img, main script, aside script").count() == 0 and at.page.title() == "errata"


# -- history -----------------------------------------------------------------------------------------------------


def test_any_two_states_can_be_compared(desk: Callable[..., Desk], server: Server) -> None:
    (number,) = server.edit(**FRANCE)["edits"]
    event = server.call("GET", "v1/log")["events"][-1]["id"]
    server.call("DELETE", f"v1/edits/{number}")
    at = desk()
    at.page.locator("#history summary").click()
    at.history.get_by_role("button", name="The capital of France is Lyon").first.click()
    assert [at.side(name)[0] for name in ("Before", "After")] == ["Paris", "Paris"]
    left = at.page.get_by_label("Left side")
    left.focus()
    left.select_option(label=f"after event {event}: apply edit {number}")
    at.answers.locator("del", has_text="Lyon").wait_for()
    assert [at.side(name)[0] for name in ("Before", "After")] == ["Lyon", "Paris"]
    assert at.page.evaluate("document.activeElement.name") == "before", "the focus stays at the choice"
    assert max(moved for *_, moved in at.rows().values()) > 0
