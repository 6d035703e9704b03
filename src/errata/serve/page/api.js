/* Talks to the server. Every failure becomes a Failure, whose message is a sentence to show. */

const KEY = "errata-token";
export const GONE = "The server does not answer: it was stopped, or the network to it is down.";

export class Failure extends Error {
  constructor(message, status, more) {
    super(message);
    this.status = status;  /* 0: no answer came */
    this.more = more || {};
  }
}

/* The token of the address is kept for this tab and taken out of the address, so that it is in no bookmark and no picture. */
export function adopt() {
  const given = new URLSearchParams(location.hash.slice(1)).get("token");
  if (given) {
    keep(given);
    history.replaceState(null, "", location.pathname + location.search);
  }
}

export function keep(token) { sessionStorage.setItem(KEY, token.trim()); }
export function token() { return sessionStorage.getItem(KEY); }

function headers(body) {
  const out = {};
  if (body !== undefined) { out["Content-Type"] = "application/json"; }
  if (token()) { out.Authorization = "Bearer " + token(); }
  return out;
}

export async function call(method, path, body) {
  let answer, text;
  try {
    answer = await fetch(path, { method, headers: headers(body), body: body && JSON.stringify(body), cache: "no-store" });
    text = await answer.text();
  } catch {
    throw new Failure(GONE, 0);
  }
  let found;
  try { found = JSON.parse(text); } catch { found = null; }
  if (answer.ok && found !== null) { return found; }
  const error = (found && found.error) || {};
  throw new Failure(error.message || `The server answered ${answer.status} to ${method} ${path}.`, answer.status, error);
}

export const get = (path) => call("GET", path);
export const post = (path, body) => call("POST", path, body);

const ENDED = ["done", "failed", "cancelled"];
export const ended = (job) => ENDED.includes(job.status);

/* Calls seen(job) at each change until the job ends; then resolves with its last document. */
export function follow(id, seen) {
  const address = `v1/jobs/${id}`;
  return new Promise((resolve, reject) => {
    const source = new EventSource(address + "/events");
    function take(job) {
      seen(job);
      if (ended(job)) { source.close(); resolve(job); }
    }
    source.onmessage = (event) => take(JSON.parse(event.data));
    source.onerror = async () => {  /* the browser tries again by itself, unless the server refused: then one question decides */
      if (source.readyState !== EventSource.CLOSED) { return; }
      try {
        const job = await get(address);
        take(job);
        if (!ended(job)) { setTimeout(() => resolve(follow(id, seen)), 500); }
      } catch (failure) {
        reject(failure);
      }
    };
  });
}
