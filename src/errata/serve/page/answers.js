/* What the model says before and after: the prompt's own answers with their likelihoods, what else moved, and where the fact is. */

import { get, post } from "./api.js";
import { bar, button, difference, heat, make, marked, percent, spoken } from "./parts.js";

const TOKENS = 12, NEAR = 16, OTHERS = 28, KINDS = { block: "whole blocks", mlp: "MLPs", attention: "attention" };
const place = (id) => document.getElementById(id);
const brief = (text) => text.split(/[.\n]/)[0].trim();

export class Answers {
  /* trouble(failure): shows it.  write(about): puts a fact into the form. */
  constructor(trouble, write) {
    this.trouble = trouble;
    this.write = write;
    this.turn = 0;
    this.states = { before: "base", after: "live" };
    this.events = [];
    this.live = [];  /* edits */
    this.about = null;  /* {prompt, target, old, subject} */
  }

  /* The states that can be chosen, as [name, words]. */
  names() {
    const past = this.events.map((e) => ["event:" + e.number, `after event ${e.number}: ${e.said}`]).reverse();
    return [["base", "the base"], ["live", `now, ${this.live.length} ${this.live.length === 1 ? "edit" : "edits"}`], ...past];
  }

  history(events, live) {
    this.events = events;
    this.live = live;
    for (const select of document.querySelectorAll("#answers select")) { this.fill(select, this.states[select.name]); }
  }

  /* Show a prompt, all of it.  A later call ends an earlier one. */
  async show(about) {
    this.about = about;
    const turn = this.turn += 1, late = () => turn !== this.turn;
    place("result").setAttribute("aria-busy", "true");
    try {
      const row = await this.compared(about);
      if (late()) { return; }
      this.drawn(about, row);
      this.traceable(about);
      await Promise.all([this.others(about, late), this.verdict(about, late)]);
    } catch (failure) {
      if (!late()) { this.trouble(failure); }
    } finally {
      if (!late()) { place("result").removeAttribute("aria-busy"); }
    }
  }

  again() { return this.about ? this.show(this.about) : this.offered(); }

  async ask(prompts, answers) {
    const body = { prompts, before: this.states.before, after: this.states.after, max_tokens: TOKENS };
    return (await post("v1/compare", answers ? { ...body, answers } : body)).answers;
  }

  /* The row of a prompt, with the likelihoods of the old and the new answer: those given, else what the two sides say. */
  async compared(about) {
    let [row] = await this.ask([about.prompt]);
    const before = brief(row.before.text), after = brief(row.after.text);
    const old = about.old || before, fresh = about.target || after || before;
    if (old && fresh) { [row] = await this.ask([about.prompt], [{ old, new: fresh }]); }
    return { ...row, old, fresh };
  }

  drawn(about, row) {
    const [left, right] = difference(row.before.text.trim(), row.after.text.trim());
    const held = document.activeElement.closest("#answers select");
    place("answers").replaceChildren(
      make("p", { class: "sentence" }, about.prompt, " …"),
      make("div", { class: "sides" }, this.side("before", row, marked(left, "del")), this.side("after", row, marked(right, "ins"))),
      make("p", { class: "soft", id: "verdict" }, row.changed ? "" : "Both give the same answer. ",
        `The distribution of the next word moved by ${spoken(row.moved)}.`));
    if (held) { document.querySelector(`#answers select[name=${held.name}]`).focus(); }  /* drawn again under the keyboard */
  }

  side(name, row, said) {
    const select = make("select", { name, "aria-label": name === "before" ? "Left side" : "Right side", onchange: () => {
      this.states[name] = select.value;
      this.again();
    } });
    this.fill(select, this.states[name]);
    const odds = make("dl", { class: "odds" });
    const answers = row.old === row.fresh ? [["old", row.old]] : [["old", row.old], ["new", row.fresh]];
    for (const [which, text] of row.likelihood ? answers : []) {
      const p = row.likelihood[which][name];
      odds.append(make("dt", null, text), make("dd", null, bar(p, which), make("span", { class: "number" }, percent(p))));
    }
    return make("div", { class: "side " + name, role: "group", "aria-label": name === "before" ? "Before" : "After" },
      select, make("p", { class: "said" }, said), odds);
  }

  fill(select, chosen) {
    select.replaceChildren(...this.names().map(([value, said]) => make("option", { value }, said)));
    select.value = chosen;
    if (select.selectedIndex < 0) { select.value = this.states[select.name] = select.name === "before" ? "base" : "live"; }
  }

  /* Which edit is behind the answer, in the ledger's words. */
  async verdict(about, late) {
    if (!this.live.length || this.states.after !== "live") { return; }
    const blame = await post("v1/blame", { prompt: about.prompt });
    if (!late()) { place("verdict").append(" " + blame.verdict); }
  }

  /* -- what else moved ------------------------------------------------------------------------------------------------------- */

  async others(about, late) {
    const { prompt, subject } = about, known = subject && prompt.includes(subject);
    const asked = known ? post("v1/neighbours", { prompt, subject, target: about.target || null, count: NEAR })
      : { prompts: [], questions: [], paragraphs: [] };
    const [near, watched] = await Promise.all([asked, get("v1/watch")]);
    const own = new Set([prompt]), fresh = (p) => !own.has(p) && own.add(p);
    const edited = this.live.flatMap((e) => e.requests.map((r) => r.prompt)).filter(fresh).slice(0, NEAR);
    const same = near.prompts.filter(fresh), rest = watched.prompts.filter(fresh).slice(0, OTHERS - same.length);
    const questions = near.questions.filter(fresh), free = near.paragraphs.filter(fresh);
    const groups = [["The same, asked of others", same], ["As a question", questions], ["A free paragraph", free],
      ["Other facts", rest], ["Written by other edits", edited]];
    const prompts = groups.flatMap(([, list]) => list);
    const rows = prompts.length ? await this.ask(prompts) : [];
    if (late()) { return; }
    const held = place("moved").contains(document.activeElement) && document.activeElement.textContent;
    place("others").hidden = !rows.length;
    if (rows.length) { this.table(groups, rows, rows.slice(0, rows.length - edited.length)); }
    if (held) {  /* drawn again under the keyboard */
      ([...place("moved").querySelectorAll("button")].find((b) => rows.length && b.textContent === held) || place("result")).focus();
    }
  }

  /* counted: the rows of groups that no edit was to change; those that did change stand above all others. */
  table(groups, rows, counted) {
    const changed = counted.filter((r) => r.changed), most = Math.max(0, ...counted.map((r) => r.moved));
    const head = ["prompt", "before", "after", "moved"].map((n) => make("th", { scope: "col", class: n === "moved" ? "number" : null }, n));
    const table = make("table", { class: "moved" }, make("thead", null, make("tr", null, head)));
    const of = new Map(rows.map((r) => [r.prompt, r])), rest = (list) => list.map((p) => of.get(p)).filter((r) => !changed.includes(r));
    for (const [title, part] of [["Changed", changed], ...groups.map(([title, list]) => [title, rest(list)])].filter((g) => g[1].length)) {
      table.append(make("tbody", null, make("tr", { class: "group" }, make("th", { scope: "rowgroup", colspan: 4 }, title)),
        part.sort((a, b) => b.moved - a.moved).map((row) => this.row(row))));
    }
    const many = `of ${counted.length} other answers changed; the next word moved by ${spoken(most)} at most.`;
    place("moved").replaceChildren(make("p", { class: changed.length ? "warn" : "fine" }, `${changed.length || "None"} ${many}`), table);
  }

  row(row) {
    const [left, right] = difference(row.before.text.trim(), row.after.text.trim());
    const open = button(row.prompt, () => this.write({ prompt: row.prompt }), { class: "link", title: "Ask this" });
    return make("tr", { class: row.changed ? "changed" : null }, make("th", { scope: "row" }, open),
      make("td", null, make("span", { class: "label" }, "before "), marked(left, "del")),
      make("td", null, make("span", { class: "label" }, "after "),
        row.changed ? marked(right, "ins") : make("span", { class: "soft" }, "the same")),
      make("td", { class: "number" }, bar(row.moved, "much"), make("span", null, percent(row.moved))));
  }

  /* Prompts to begin with, before anything was asked. */
  async offered() {
    const { prompts } = await get("v1/watch");
    const offers = prompts.slice(0, 5).map((p) => button(p + " …", () => this.write({ prompt: p })));
    place("answers").replaceChildren(make("p", { class: "sentence soft" }, "Ask something, or write a new answer."),
      make("p", { class: "offered" }, offers));
  }

  /* -- where the fact is ------------------------------------------------------------------------------------------------------ */

  traceable(about) {
    const ready = about.subject && about.prompt.includes(about.subject);
    place("where").hidden = !ready;
    if (!ready || (this.offer && this.offer.prompt === about.prompt && this.offer.subject === about.subject)) { return; }
    this.offer = about;  /* edits do not change what is traced: the base */
    place("trace").replaceChildren(
      make("p", { class: "soft" }, `“${about.subject}” is blurred with noise, and one state of the base model at a time put back: ` +
        "where the answer returns, the fact passes."),
      button("Trace it", (event) => this.trace(about, event.target), { id: "trace-it" }));
  }

  async trace(about, pressed) {
    if (pressed.getAttribute("aria-disabled")) { return; }
    pressed.setAttribute("aria-disabled", "true");
    pressed.textContent = "Tracing …";
    try {
      const found = await post("v1/trace", { prompt: about.prompt, subject: about.subject });
      if (this.offer !== about) { return; }
      this.map(found, Object.keys(found.kinds)[0], true);
    } catch (failure) {
      pressed.removeAttribute("aria-disabled");
      pressed.textContent = "Trace it";
      this.trouble(failure);
    }
  }

  map(found, kind, focus) {
    const kinds = Object.keys(found.kinds).map((name) => {
      const draw = () => this.map(found, name, true);
      const box = make("input", { type: "radio", name: "kind", value: name, checked: name === kind, onchange: draw });
      return make("label", null, box, KINDS[name] || name);
    });
    const answer = found.answer ? `“${found.answer.trim()}”` : "the answer";
    place("trace").replaceChildren(
      make("p", { class: "soft" }, `The probability of ${answer} falls from ${spoken(found.high)} to ${spoken(found.low)} when the ` +
        "subject is blurred; each cell is what it is with the state of that token at that block put back."),
      make("fieldset", { class: "kinds" }, make("legend", { class: "spoken" }, "Which states"), kinds),
      heat(found.tokens, found.span, found.kinds[kind], found.low, `Percent, ${KINDS[kind] || kind}; token by block`));
    if (focus) { document.querySelector("#trace input:checked").focus(); }
  }
}
