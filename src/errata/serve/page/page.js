/* The page of `errata serve`: the form, the edit that is being made, the keys, and word from the server. */

import { GONE, Failure, adopt, call, follow, get, keep, post, token } from "./api.js";
import { Answers } from "./answers.js";
import { History } from "./history.js";
import { button, line, make } from "./parts.js";

const place = (id) => document.getElementById(id);
const FIELDS = ["prompt", "target", "subject", "old", "method", "author", "reason"];
const LATER = 4000, SOON = 1000;  /* ms between two looks at the server; while it does not answer */
let running = null, seen = { base: "", event: null };  /* seen: what the page shows, as the server counts it */

/* -- word to the user ---------------------------------------------------------------------------------------------------------- */

function said(words, more = []) { note("said", words, more); }

/* In one of the two places; the other is emptied.  Where a button of an old note had the focus, the new note takes it. */
function note(where, words, more) {
  const held = place("notes").contains(document.activeElement);
  place("said").replaceChildren();
  place("trouble").replaceChildren();
  place(where).replaceChildren(...(words ? [make("p", null, words), ...more] : []));
  if (held) { place("notes").focus(); }
}

function trouble(failure, more = []) {
  if (!(failure instanceof Failure)) { console.error(failure); }
  if (failure.status === 0) { gone(true); return; }
  if (failure.status === 401) { place("key").hidden = false; }
  note("trouble", failure.message, more);
}

function gone(is) {
  if (place("gone").hidden === !is) { return; }
  place("gone").hidden = !is;
  place("gone").textContent = is ? GONE + " This page tries again by itself." : "";
}

/* -- the form ------------------------------------------------------------------------------------------------------------------ */

function written() {
  const out = {};
  for (const name of FIELDS) {
    const text = place(name).value;
    if (text.trim()) { out[name] = name === "prompt" ? text.trimEnd() : text.trim(); }
  }
  return out;
}

function write(about) {
  for (const name of ["prompt", "target", "subject", "old"]) { place(name).value = about[name] || ""; }
  if (place("answers").contains(document.activeElement) || place("moved").contains(document.activeElement)) {
    place("result").focus();  /* what was pressed is about to go */
  }
  ask();
}

function ask() {
  if (!place("prompt").reportValidity()) { return; }
  answers.show(shown(written()));
}

/* Make an edit: of the form, or `request`, which may be one of the history with several facts. */
async function edit(request = written(), force = false) {
  if (running) { return; }
  const about = request.requests ? request.requests[0] : request;
  const missing = ["prompt", "target"].find((name) => !about[name]);
  if (missing) {
    place(missing).focus();
    said(missing === "target" ? "Which answer should it give? Write it as the new answer." : "Which prompt should it answer?");
    return;
  }
  note("said");
  running = "sent";
  place("edit").setAttribute("aria-disabled", "true");  /* not `disabled`: that would drop the focus */
  try {
    const { job } = await post("v1/edits", force ? { ...request, force: true } : request);
    running = job.id;
    const losses = [];
    const last = await follow(job.id, (now) => progress(now, losses));
    await finished(last, request, about);
  } catch (failure) {
    refused(failure, request);
  } finally {
    running = null;
    place("edit").removeAttribute("aria-disabled");
    if (place("job").contains(document.activeElement)) { place("notes").focus(); }
    place("job").hidden = true;
  }
}

function refused(failure, request, more = "") {
  const anyway = failure.status === 409 && !more ? [button("Edit anyway", () => edit(request, true))] : [];
  if (more) { failure.message += " " + more; }
  trouble(failure, anyway);
}

/* A job of several facts may have written some of them before it was stopped: those are live. */
async function finished(job, request, about) {
  const edits = job.edits.join(", "), some = edits && `Written before that, and live: edit ${edits}.`;
  if (edits) { await history.read(); }
  const undo = history.edits.filter((e) => job.edits.includes(e.number) && e.live).map((e) =>
    button(job.edits.length > 1 ? `Undo edit ${e.number}` : "Undo it", () => history.undo(e)));
  if (job.status === "failed") {
    refused(new Failure(job.error.message, job.findings.length ? 409 : 500, job.error), request, some);
  } else if (job.status === "cancelled") {
    said("The edit is cancelled; " + (edits ? `the rest is not written. ${some}` : "nothing was changed."), undo);
  } else {
    said(`Edit ${edits} is live.`, undo);
  }
  if (edits) { await answers.show(shown(about)); }
}

const STAGES = { queued: "Waiting for its turn", checking: "Looking whether this is known or contradicts an edit", editing: "Editing" };

function progress(job, losses) {
  if (typeof job.loss === "number") { losses.push(job.loss); }
  const box = place("job");
  if (box.hidden || !box.firstChild) {
    box.replaceChildren(make("p", { id: "stage", role: "status" }), make("progress", { "aria-label": "Progress of the edit" }),
      make("span", { id: "loss", class: "soft number" }), make("span", { id: "curve" }), button("Cancel", cancel));
    box.hidden = false;
  }
  const stage = STAGES[job.status] || job.status, bar = box.querySelector("progress");
  if (place("stage").textContent !== stage) { place("stage").textContent = stage; }  /* said aloud once */
  if (job.steps) { bar.max = job.steps; bar.value = job.step; } else { bar.removeAttribute("value"); }
  const loss = losses.length ? losses.at(-1).toPrecision(2) : "";
  place("loss").textContent = (job.steps ? `step ${job.step} of ${job.steps}` : "") + (loss && `, loss ${loss}`);
  if (losses.length > 1) { place("curve").replaceChildren(line(losses, `loss from ${losses[0].toPrecision(2)} to ${loss}`)); }
}

async function cancel() {
  if (!running || running === "sent") { return; }
  try { await call("DELETE", `v1/jobs/${running}`); } catch (failure) { trouble(failure); }
}

/* -- the parts ----------------------------------------------------------------------------------------------------------------- */

const shown = ({ prompt, target, subject, old }) => ({ prompt, target, subject, old });

const answers = new Answers(trouble, write);
const history = new History({
  show(found) { write(shown(found.requests[0])); },
  undone(found) { answers.show(shown(found.requests[0])); },  /* the form is left alone: something else may be in it by now */
  again({ number, requests, method, settings, alone, applied }) {
    if (!settings) {
      said(`Edit ${number} came as a finished patch: how it was made is not known, so it cannot be made again. Apply the patch once more.`);
      return;
    }
    const how = alone ? { mode: "single" } : requests.length > 1 ? { mode: "batched", batch_size: requests.length } : { mode: "continual" };
    const { author } = written(), why = { ...(author && { author }), ...(applied.reason && { reason: applied.reason }) };
    edit({ requests, method, settings, ...how, ...why });
  },
  changed(events, live) {
    seen.event = events.length ? events.at(-1).number : 0;
    answers.history(events, live);
    state(live.length);
  },
  said,
  trouble,
});

/* -- word from the server ------------------------------------------------------------------------------------------------------ */

function state(live, more = "") { place("state").textContent = `${live} ${live === 1 ? "edit" : "edits"} live${more}`; }

async function look() {
  try {
    const health = await get("health");
    const back = !place("gone").hidden;
    gone(false);
    place("model").textContent = health.model;
    const waiting = health.queue.edits + (health.editing ? 1 : 0);
    state(health.live, health.status === "stopping" ? ", stopping" : waiting && !running ? `, ${waiting} being made` : "");
    const news = health.base !== seen.base || health.event !== seen.event;  /* another one has edited, or taken back */
    if ((news || back) && !running && !history.undoing.size) {
      await history.read();
      seen.base = health.base;
      if (answers.about) { await answers.again(); } else if (back) { await answers.offered(); }
    }
  } catch (failure) {
    trouble(failure);
  }
}

async function watch() {
  if (!document.hidden) { await look(); }
  setTimeout(watch, place("gone").hidden ? LATER : SOON);
}

/* -- keys ---------------------------------------------------------------------------------------------------------------------- */

document.addEventListener("keydown", (event) => {
  const held = event.ctrlKey || event.metaKey, field = event.target.closest("input:not([type=radio]), textarea");
  if (event.key === "Escape" && running) { cancel(); }
  else if (held && event.key === "k") { event.preventDefault(); place("prompt").select(); }
  else if (held && event.key === "Enter") { event.preventDefault(); edit(); }
  else if (held && event.key === "z" && !event.shiftKey && !field) {
    event.preventDefault();  /* else a browser may take back what was typed in a field that has lost the focus */
    const newest = history.live.find((e) => !history.undoing.has(e.number));
    if (!event.repeat && !running && newest) { history.undo(newest); }
  }
});

place("form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (place("target").value.trim()) { edit(); } else { ask(); }
});
place("ask").addEventListener("click", ask);
place("key").addEventListener("submit", (event) => {
  event.preventDefault();
  keep(place("token").value);
  place("token").value = "";
  place("key").hidden = true;
  said("The token is kept until this tab is closed.");
});

function enter() {
  adopt();
  place("key").hidden = Boolean(token());
}

addEventListener("hashchange", enter);  /* a newly printed address, opened in the same tab */
enter();
await look();
if (history.live.length) { answers.show(shown(history.live[0].requests[0])); } else { answers.offered().catch(trouble); }
setTimeout(watch, LATER);
