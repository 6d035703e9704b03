/* The page of `errata serve`: the form, the edit that is being made, the keys, and word from the server. */

import { GONE, Failure, adopt, call, follow, get, keep, post, token } from "./api.js";
import { Answers } from "./answers.js";
import { History } from "./history.js";
import { button, line, make } from "./parts.js";

const place = (id) => document.getElementById(id);
const FIELDS = ["prompt", "target", "subject", "old", "method", "author", "reason"];
const LATER = 4000, SOON = 1000;  /* ms between two looks at the server; while it does not answer */
let running = null, shape = "";

/* -- word to the user ---------------------------------------------------------------------------------------------------------- */

function said(words, more = []) {
  place("trouble").replaceChildren();
  place("said").replaceChildren(make("p", null, words), ...more);
}

function trouble(failure, more = []) {
  if (!(failure instanceof Failure)) { console.error(failure); }
  if (failure.status === 0) { gone(true); return; }
  if (failure.status === 401 || failure.status === 403) { place("key").hidden = false; }
  place("said").replaceChildren();
  place("trouble").replaceChildren(make("p", null, failure.message), ...more);
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
  place("said").replaceChildren();
  place("trouble").replaceChildren();
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
    place("job").hidden = true;
  }
}

function refused(failure, request) {
  const anyway = failure.status === 409 ? [button("Edit anyway", () => edit(request, true))] : [];
  trouble(failure, anyway);
}

async function finished(job, request, about) {
  if (job.status === "failed") { refused(new Failure(job.error.message, job.findings.length ? 409 : 500, job.error), request); return; }
  if (job.status === "cancelled") { said("The edit is cancelled; nothing was changed."); return; }
  await history.read();
  const made = history.edits.filter((e) => job.edits.includes(e.number));
  said(`Edit ${job.edits.join(", ")} is live.`, made.map((e) => button("Undo it", () => history.undo(e))));
  await answers.show(shown(about));
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
  again({ requests, method, settings, alone }) {
    edit({ requests, method, settings: settings || {}, mode: alone ? "single" : "continual" });
  },
  changed(events, live) {
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
    const now = `${health.base} ${health.live}`;
    if (now !== shape || back) {  /* another one has edited */
      shape = now;
      if (!running) { await history.read(); }
      if (back) { await answers.again(); }
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
  const held = event.ctrlKey || event.metaKey, field = event.target.closest("input, select, textarea");
  if (event.key === "Escape" && running) { cancel(); }
  else if (held && event.key === "k") { event.preventDefault(); place("prompt").select(); }
  else if (held && event.key === "Enter") { event.preventDefault(); edit(); }
  else if (held && event.key === "z" && !field && !running && history.live.length) {
    event.preventDefault();
    history.undo(history.live[0]);
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

adopt();
place("key").hidden = Boolean(token());
await look();
if (history.live.length) { answers.show(shown(history.live[0].requests[0])); } else { answers.offered().catch(trouble); }
setTimeout(watch, LATER);
