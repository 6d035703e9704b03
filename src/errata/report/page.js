(function () {
  "use strict";
  var PAGE = 25;

  function make(tag, name, text) {
    var out = document.createElement(tag);
    if (name) { out.className = name; }
    if (text !== undefined) { out.textContent = text; }
    return out;
  }

  /* -- tables that sort: by the number a cell begins with, else by its words; what has none stays below ------------------------- */

  function value(row, column) {
    var text = row.cells[column].textContent.trim(), number = parseFloat(text.replace("\u2212", "-"));
    return isNaN(number) ? (text === "\u2013" ? null : text.toLowerCase()) : number;
  }

  function compare(a, b) {
    return typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), undefined, { numeric: true });
  }

  function sort(table, column, falling) {
    var body = table.tBodies[0], sign = falling ? -1 : 1;
    var rows = Array.from(body.rows).filter(function (row) { return !row.classList.contains("first"); });
    var keyed = rows.map(function (row, i) { return { row: row, key: value(row, column), at: i }; });
    keyed.sort(function (a, b) {
      if (a.key === null || b.key === null) { return (a.key === null) - (b.key === null) || a.at - b.at; }
      return sign * compare(a.key, b.key) || a.at - b.at;
    });
    keyed.forEach(function (k) { body.appendChild(k.row); });
    Array.from(table.tHead.rows[0].cells).forEach(function (cell, i) {
      if (i !== column) { cell.removeAttribute("aria-sort"); return; }
      cell.setAttribute("aria-sort", falling ? "descending" : "ascending");
    });
  }

  document.querySelectorAll("table.scores").forEach(function (table) {
    if (table.tBodies[0].rows.length < 2) { return; }
    Array.from(table.tHead.rows[0].cells).forEach(function (cell, column) {
      var button = make("button", "", cell.textContent);
      button.type = "button";
      button.title = "Sort by this column";
      cell.replaceChildren(button);
      button.addEventListener("click", function () {
        var first = cell.classList.contains("number") ? "descending" : "ascending", now = cell.getAttribute("aria-sort");
        sort(table, column, now ? now === "ascending" : first === "descending");
      });
    });
  });

  /* -- cases: a list that is drawn a page at a time, a case's table when it is opened -------------------------------------------- */

  var island = document.getElementById("cases-data");
  if (!island) { return; }
  var data = JSON.parse(island.textContent), texts = data.texts;
  var stays = new Set(data.stays);

  function said(index) { return index === -2 ? "\u2013" : texts[index] || "(nothing)"; }
  function kind(name) { return data.kinds[name] || name; }

  function Browser(place, section) {
    var self = this;
    this.section = section;
    this.place = place;
    this.page = 0;
    this.columns = section.columns.map(function (_, i) { return i; });
    this.words = null;
    this.place.replaceChildren(this.controls(), this.count = make("p", "count"), this.list = make("div"), this.pager());
    this.count.setAttribute("aria-live", "polite");
    this.filter();
    this.place.addEventListener("toggle", function (event) {
      if (event.target.open && event.target.fill) { event.target.fill(); }
    }, true);
  }

  Browser.prototype.select = function (into, label, options) {
    var out = make("select"), wrap = make("label", "", label), self = this;
    options.forEach(function (option) { out.add(new Option(option[1], option[0])); });
    out.addEventListener("change", function () { self.page = 0; self.filter(); });
    wrap.appendChild(out);
    into.appendChild(wrap);
    return out;
  };

  Browser.prototype.controls = function () {
    var self = this, out = make("div", "controls"), wrap = make("label", "grow", "Search prompts and answers");
    var found = new Set(), whens = [], names = [];
    this.section.cases.forEach(function (c) { c[2].forEach(function (p) { found.add(p[0]); }); });
    this.section.columns.forEach(function (c) {
      if (whens.indexOf(c[1]) < 0) { whens.push(c[1]); }
      if (names.indexOf(c[0]) < 0) { names.push(c[0]); }
    });
    this.box = make("input");
    this.box.type = "search";
    this.box.addEventListener("input", function () {
      clearTimeout(self.waiting);
      self.waiting = setTimeout(function () { self.page = 0; self.filter(); }, 120);
    });
    wrap.appendChild(this.box);
    out.appendChild(wrap);
    var kinds = Object.keys(data.kinds).concat(Array.from(found)).filter(function (k, i, all) {
      return found.has(k) && all.indexOf(k) === i;
    });
    this.kind = this.select(out, "Probes", [["", "every kind"]].concat(kinds.map(function (k) { return [k, kind(k)]; })));
    this.what = this.select(out, "Cases", [["", "all"], ["edit", "the edit does not hold"], ["stay", "something that should stay changed"],
      ["wrong", "any probe not as wanted"], ["differ", "methods differ"], ["right", "everything as wanted"]]);
    this.when = whens.length > 1 ? this.select(out, "Asked", whens.map(function (w) { return [w, w]; }).concat([["", "both"]])) : null;
    this.boxes = names.length > 1 ? this.methods(out, names) : null;
    return out;
  };

  Browser.prototype.methods = function (into, names) {
    var self = this, set = make("fieldset");
    set.appendChild(make("legend", "", "Methods"));
    into.appendChild(set);
    return names.map(function (name) {
      var wrap = make("label"), box = make("input");
      box.type = "checkbox";
      box.checked = true;
      box.value = name;
      box.addEventListener("change", function () { self.filter(); });
      wrap.append(box, name);
      set.appendChild(wrap);
      return box;
    });
  };

  Browser.prototype.pager = function () {
    var self = this, out = make("div", "pager");
    function button(text, step) {
      var one = make("button", "", text);
      one.type = "button";
      one.addEventListener("click", function () { self.page += step; self.draw(); self.place.scrollIntoView({ block: "start" }); });
      out.appendChild(one);
      return one;
    }
    this.back = button("\u2190 Previous", -1);
    this.where = out.appendChild(make("span"));
    this.next = button("Next \u2192", 1);
    return out;
  };

  Browser.prototype.text = function (i) {
    if (!this.words) { this.words = []; }
    if (this.words[i] === undefined) {
      var c = this.section.cases[i], used = new Set([c[0], c[1]]);
      c[2].forEach(function (p) { used.add(p[1]).add(p[2]).add(p[3]); p[5].forEach(function (a) { used.add(a); }); });
      this.words[i] = Array.from(used).map(function (t) { return t < 0 ? "" : texts[t]; }).join("\n").toLowerCase();
    }
    return this.words[i];
  };

  Browser.prototype.keep = function (c) {
    var what = this.what.value, only = this.kind.value, columns = this.columns, wrong = false, differ = false;
    var probes = c[2].filter(function (p) {
      return (!only || p[0] === only) && (what !== "edit" || p[0] === "rewrite") && (what !== "stay" || stays.has(p[0]));
    });
    if (!probes.length) { return !what && !only; }
    probes.forEach(function (p) {
      var marks = columns.map(function (k) { return p[4][k + 1]; });
      wrong = wrong || marks.indexOf("n") >= 0;
      differ = differ || (marks.indexOf("n") >= 0 && marks.indexOf("y") >= 0);
    });
    return !what || (what === "differ" ? differ : what === "right" ? !wrong : wrong);
  };

  Browser.prototype.filter = function () {
    var self = this, words = this.box.value.toLowerCase().split(/\s+/).filter(Boolean);
    var names = this.boxes && this.boxes.filter(function (b) { return b.checked; }).map(function (b) { return b.value; });
    this.columns = this.section.columns.map(function (_, i) { return i; }).filter(function (i) {
      var c = self.section.columns[i];
      return (!names || names.indexOf(c[0]) >= 0) && (!self.when || !self.when.value || c[1] === self.when.value);
    });
    if (names && self.when && !self.when.value) {  /* both: those of a method side by side */
      this.columns.sort(function (a, b) {
        return names.indexOf(self.section.columns[a][0]) - names.indexOf(self.section.columns[b][0]) || a - b;
      });
    }
    this.found = this.section.cases.map(function (_, i) { return i; }).filter(function (i) {
      return self.keep(self.section.cases[i]) && words.every(function (w) { return self.text(i).indexOf(w) >= 0; });
    });
    this.draw();
  };

  Browser.prototype.draw = function () {
    var self = this, pages = Math.max(1, Math.ceil(this.found.length / PAGE));
    this.page = Math.min(Math.max(this.page, 0), pages - 1);
    var here = this.found.slice(this.page * PAGE, (this.page + 1) * PAGE);
    this.list.replaceChildren.apply(this.list, here.map(function (i) { return self.item(i); }));
    this.count.textContent = this.found.length + " of " + this.section.cases.length + " cases" +
      (this.section.left_out ? " (" + this.section.left_out + " more are in the records, not in this page)" : "");
    this.where.textContent = "page " + (this.page + 1) + " of " + pages;
    this.back.disabled = this.page === 0;
    this.next.disabled = this.page === pages - 1;
    this.where.parentNode.hidden = pages === 1;
    if (this.found.length === 1 || (this.found.length && !this.opened)) { this.opened = this.list.firstChild.open = true; }
  };

  Browser.prototype.item = function (i) {
    var self = this, c = this.section.cases[i], out = make("details", "case"), head = make("summary"), chips = make("span", "chips");
    head.append(make("span", "", texts[c[0]]), " ");
    if (c[1] >= 0) { head.append(make("span", "new", texts[c[1]])); }
    this.columns.forEach(function (k) { chips.appendChild(self.chip(c, k)); });
    head.appendChild(chips);
    out.appendChild(head);
    out.fill = function () { out.fill = null; out.appendChild(self.table(c)); };
    return out;
  };

  Browser.prototype.label = function (k) {
    var c = this.section.columns[k];
    return this.when && !this.when.value ? [c[0], c[1]] : [c[0], ""];
  };

  Browser.prototype.chip = function (c, k) {
    var asked = 0, right = 0, edit = "", name = this.label(k);
    c[2].forEach(function (p) {
      var mark = p[4][k + 1];
      if (mark === "y" || mark === "n") { asked += 1; right += mark === "y"; }
      if (p[0] === "rewrite" && !edit) { edit = mark; }
    });
    var out = make("span", edit === "y" ? "yes" : edit === "n" ? "no" : "");
    out.textContent = name.filter(Boolean).join(", ") + " " + right + "/" + asked;
    out.title = (edit === "y" ? "The edit holds; " : edit === "n" ? "The edit does not hold; " : "") +
      right + " of " + asked + " probes as wanted";
    return out;
  };

  Browser.prototype.table = function (c) {
    var self = this, only = this.kind.value, wrap = make("div", "scroll"), table = make("table"), head = table.createTHead().insertRow();
    var body = table.createTBody();
    wrap.tabIndex = 0;
    wrap.setAttribute("role", "group");
    wrap.setAttribute("aria-label", "Probes of the case");
    ["probe", "question", "wanted", "before"].concat(this.columns).forEach(function (name) {
      var cell = make("th"), label = typeof name === "number" ? self.label(name) : [name, ""];
      cell.scope = "col";
      cell.append(label[0]);
      if (label[1]) { cell.appendChild(make("span", "when", label[1])); }
      head.appendChild(cell);
    });
    c[2].forEach(function (p) {
      if (only && p[0] !== only) { return; }
      var row = body.insertRow();
      row.append(make("td", "kind", kind(p[0])), make("td", "question", texts[p[1]]));
      row.append(self.answer("wanted", p[2] === -1 ? "as before" : said(p[2]), "-", -1), self.answer("before", said(p[3]), p[4][0], -1));
      self.columns.forEach(function (k) {
        row.append(self.answer(self.label(k).filter(Boolean).join(", "), p[5][k] === -1 ? "\u2013" : said(p[5][k]), p[4][k + 1], p[6][k]));
      });
    });
    wrap.appendChild(table);
    return wrap;
  };

  Browser.prototype.answer = function (who, text, mark, fed) {
    var out = make("td", mark === "y" ? "yes" : mark === "n" ? "no" : "");
    out.append(make("span", "label", who + ": "), text);
    if (mark === "y" || mark === "n") { out.appendChild(make("span", "spoken", mark === "y" ? " (as wanted)" : " (not as wanted)")); }
    if (fed >= 0 && mark === "n") { out.appendChild(make("span", "fed", "fed: " + fed + " %")); }
    return out;
  };

  document.querySelectorAll("[data-cases]").forEach(function (place) {
    new Browser(place, data.sections[Number(place.dataset.cases)]);
  });
})();
