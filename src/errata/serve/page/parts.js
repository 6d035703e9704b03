/* Pieces that the page is drawn from. Whatever came from a model or a user goes in as text, never as markup. */

export function make(tag, more, ...inside) {
  const out = document.createElement(tag);
  for (const [name, value] of Object.entries(more || {})) {
    if (name.startsWith("on")) { out.addEventListener(name.slice(2), value); }
    else if (value === true) { out.setAttribute(name, ""); }
    else if (value !== false && value !== null && value !== undefined) { out.setAttribute(name, value); }
  }
  out.append(...inside.flat().filter((x) => x !== null && x !== undefined && x !== ""));
  return out;
}

export function button(text, act, more) { return make("button", { type: "button", onclick: act, ...more }, text); }

export function draw(tag, more, ...inside) {
  const out = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(more)) { out.setAttribute(name, value); }
  out.append(...inside);
  return out;
}

/* -- numbers and times ------------------------------------------------------------------------------------------------------- */

export function percent(p) {
  if (p > 0 && p < 0.0005) { return "< 0.1\u00a0%"; }
  return p < 1 && p >= 0.9995 ? "> 99.9\u00a0%" : (100 * p).toFixed(1) + "\u00a0%";
}

/* The same in a sentence. */
export const spoken = (p) => percent(p).replace("< ", "less than ").replace("> ", "more than ");

export function when(seconds) {
  const at = new Date(typeof seconds === "number" ? seconds * 1000 : seconds);
  if (isNaN(at)) { return make("span", null, String(seconds)); }
  const today = at.toDateString() === new Date().toDateString();
  const how = today ? { hour: "2-digit", minute: "2-digit" } : { year: "numeric", month: "short", day: "numeric" };
  return make("time", { datetime: at.toISOString(), title: at.toLocaleString() }, at.toLocaleString([], how));
}

/* -- what changed between two texts, word by word ----------------------------------------------------------------------------- */

function common(a, b) {
  const best = Array.from({ length: a.length + 1 }, () => new Array(b.length + 1).fill(0));
  for (let i = a.length - 1; i >= 0; i -= 1) {
    for (let j = b.length - 1; j >= 0; j -= 1) {
      best[i][j] = a[i] === b[j] ? best[i + 1][j + 1] + 1 : Math.max(best[i + 1][j], best[i][j + 1]);
    }
  }
  return best;
}

/* Two lists of [words, whether the other text has them too]. */
export function difference(before, after) {
  const a = before.split(/\s+/).filter(Boolean), b = after.split(/\s+/).filter(Boolean), best = common(a, b);
  const left = [], right = [];
  const put = (list, word, same) => {
    const last = list[list.length - 1];
    if (last && last[1] === same) { last[0] += " " + word; } else { list.push([word, same]); }
  };
  let i = 0, j = 0;
  while (i < a.length || j < b.length) {
    if (i < a.length && j < b.length && a[i] === b[j]) { put(left, a[i], true); put(right, b[j], true); i += 1; j += 1; }
    else if (j >= b.length || (i < a.length && best[i + 1][j] >= best[i][j + 1])) { put(left, a[i], false); i += 1; }
    else { put(right, b[j], false); j += 1; }
  }
  return [left, right];
}

/* The words, those that the other side lacks in a `tag` (del or ins). */
export function marked(parts, tag) {
  if (!parts.length) { return [make("span", { class: "soft" }, "(nothing)")]; }
  return parts.flatMap(([text, same], i) => [i ? " " : "", same ? text : make(tag, null, text)]);
}

/* -- drawings ----------------------------------------------------------------------------------------------------------------- */

export function bar(share, kind) {
  const out = make("span", { class: "bar " + (kind || ""), "aria-hidden": "true" });
  out.style.setProperty("--w", (100 * Math.min(1, Math.max(0, share))).toFixed(1) + "%");
  return out;
}

/* A line of the values so far, from the highest at the top to 0 or the lowest. */
export function line(values, spoken) {
  const wide = 160, high = 36, top = Math.max(...values), low = Math.min(0, ...values), span = top - low || 1;
  const points = values.map((v, i) => {
    const x = values.length > 1 ? (wide * i) / (values.length - 1) : 0;
    return `${x.toFixed(1)},${(2 + (high - 4) * (1 - (v - low) / span)).toFixed(1)}`;
  });
  return draw("svg", { viewBox: `0 0 ${wide} ${high}`, class: "line", role: "img", "aria-label": spoken, preserveAspectRatio: "none" },
    draw("polyline", { points: points.join(" "), fill: "none" }));
}

/* tokens × blocks; the colour goes from `low` (nothing is brought back) to the highest cell. */
export function heat(tokens, span, rows, low, title) {
  const blocks = rows[0].length, top = Math.max(...rows.flat(), low + 1e-9), few = blocks <= 16;
  const label = (b) => (few || b % 4 === 0 ? String(b) : make("span", { class: "spoken" }, String(b)));
  const head = make("tr", null, make("th", { scope: "col" }, "token"), rows[0].map((_, b) => make("th", { scope: "col" }, label(b))));
  const body = rows.map((row, t) => {
    const subject = span && t >= span[0] && t < span[1];
    const name = make("th", { scope: "row", class: subject ? "subject" : null }, tokens[t].trim() || "␣");
    if (subject) { name.append(make("span", { class: "spoken" }, " (subject)")); }
    return make("tr", null, name, row.map((p, b) => {
      const number = few ? (100 * p).toFixed(0) : make("span", { class: "spoken" }, percent(p));
      const cell = make("td", { title: `${tokens[t].trim()}, block ${b}: ${percent(p)}` }, number);
      cell.style.setProperty("--h", (100 * Math.max(0, (p - low) / (top - low))).toFixed(1) + "%");
      return cell;
    }));
  });
  return make("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": title },
    make("table", { class: few ? "heat" : "heat many" }, make("caption", null, title), make("thead", null, head), make("tbody", null, body)));
}
