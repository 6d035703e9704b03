/* The ledger's edits, live ones before undone ones, newest first: show one, take it back, write it again. */

import { Failure, call, get } from "./api.js";
import { button, make, when } from "./parts.js";

const place = document.getElementById("history");

export class History {
  /* show(edit), undone(edit), again(edit): what the page does with one.  changed(events, live edits): called whenever the record was read.
     said(words, more): a note, with buttons.  trouble(failure, more): likewise. */
  constructor({ show, undone, again, changed, said, trouble }) {
    Object.assign(this, { show, undone, again, changed, said, trouble });
    this.edits = [];
    this.open = false;  /* the list of those that are undone */
    this.undoing = new Set();  /* numbers of edits: a second click on one is no second wish */
  }

  get live() { return this.edits.filter((e) => e.live); }

  async read() {
    const [found, log] = await Promise.all([get("v1/edits?live=false"), get("v1/log")]);
    this.edits = found.edits.slice().sort((a, b) => b.number - a.number);
    this.events = log.events.map((e) => ({ number: e.id, said: words(e) }));
    this.draw();
    this.changed(this.events, this.live);
  }

  draw() {
    const held = place.contains(document.activeElement) ? document.activeElement.dataset.key : null;
    const list = (edits) => make("ol", null, edits.map((edit) => this.item(edit)));
    const gone = this.edits.filter((e) => !e.live), none = gone.length ? "No edit is live." : "No edit yet.";
    place.replaceChildren(...[
      this.live.length ? list(this.live) :
        make("p", { class: "soft" }, `${none} What you edit is listed here and can be undone at any time.`),
      gone.length && make("details", { open: this.open, ontoggle: (event) => { this.open = event.target.open; } },
        make("summary", null, `${gone.length} undone`), list(gone)),
    ].filter(Boolean));
    const back = held && (place.querySelector(`[data-key="${held}"]`) || place.querySelector(`[data-edit="${held.split(":")[1]}"] button`));
    if (back) { back.focus(); }  /* the list was drawn again under the keyboard */
  }

  item(edit) {
    const { number, prompt, target, live, applied, undone } = edit, more = edit.requests.length - 1;
    const title = button("", () => this.show(edit), { class: "link", "data-key": `show:${number}` });
    title.append(prompt, " ", make(live ? "ins" : "del", null, target), more > 0 ? ` and ${more} more` : "");
    const act = live ? button("Undo", () => this.undo(edit), { "aria-label": `Undo edit ${number}`, "data-key": `act:${number}` }) :
      button("Redo", () => this.again(edit), { "aria-label": `Redo edit ${number}`, "data-key": `act:${number}` });
    return make("li", { class: live ? "" : "undone", "data-edit": number },
      make("span", { class: "count", "aria-hidden": "true" }, String(number)),
      make("div", null, title, make("p", { class: "soft" }, edit.method, " · ", applied.author, " · ", when(applied.time),
        undone ? [" · undone ", when(undone.time)] : "", applied.reason ? ` · ${applied.reason}` : "")),
      act);
  }

  async undo(edit, remake = false) {
    if (this.undoing.has(edit.number)) { return; }
    this.undoing.add(edit.number);
    this.said(`Edit ${edit.number} is being undone …`);  /* it may wait for an edit that is being made */
    try {
      const done = await call("DELETE", `v1/edits/${edit.number}${remake ? "?remake=true" : ""}`);
      const also = (done.remade || []).length ? ` Made again without it: ${done.remade.map((r) => r.edit).join(", ")}.` :
        (done.on_top || []).length ? ` Made on top of it, and as they were: ${done.on_top.join(", ")}.` : "";
      this.open = true;
      await this.read();
      this.said(`Edit ${edit.number} is undone.${also}`, [button("Redo it", () => this.again(edit))]);
      this.undone(edit);
    } catch (failure) {
      if (failure instanceof Failure && failure.status === 409) {
        await this.read().catch(() => {});
        if (!this.live.some((e) => e.number === edit.number)) {  /* another one was quicker */
          this.said(`Edit ${edit.number} is undone already.`);
          this.undone(edit);
          return;
        }
      }
      const retry = failure instanceof Failure && failure.status === 409 && !remake && failure.message.includes("remake");
      this.trouble(failure, retry ? [button("Undo, and make the later ones again", () => this.undo(edit, true))] : []);
    } finally {
      this.undoing.delete(edit.number);
    }
  }
}

function words({ verb, details }) {
  const numbers = [details.edit, ...(details.edits || [])].filter(Number.isInteger);
  return numbers.length ? `${verb} edit${numbers.length > 1 ? "s" : ""} ${numbers.join(", ")}` : verb;
}
