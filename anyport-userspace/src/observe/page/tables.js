const tables = new Map();

// A table that is there once. A column is [name, class, value of a row by which it sorts, what fills a cell or nothing].
// Rows stay where they were first seen until a column is chosen; then they are sorted by it, until it is chosen for the third time.
function table(id, title, columns, rows, keyOf, note) {
  let it = tables.get(id);
  if (!it) {
    it = { section: at(id), title, columns, places: new Map(), seen: 0, sort: null, rows: new Map() };
    tables.set(id, it);
    build(it);
  }
  Object.assign(it, { columns, note });
  it.latest = new Map(rows.map(row => [keyOf(row), row]));
  refresh(it);
}

function build(it) {
  const heading = make("h2", "", it.title + " "), region = make("div", "scroll"), element = make("table");
  it.note_ = make("span", "dim");
  heading.append(it.note_);
  region.tabIndex = 0;
  region.setAttribute("role", "region");
  region.setAttribute("aria-label", it.title);
  it.head = make("tr");
  it.body = make("tbody");
  const head = make("thead");
  head.append(it.head);
  element.append(head, it.body);
  region.append(element);
  it.section.replaceChildren(heading, region);
  it.columns.forEach(([name, cls], i) => {
    const cell = make("th", cls), button = make("button", "", name);
    cell.scope = "col";
    button.type = "button";
    button.addEventListener("click", () => { choose(it, i); refresh(it); });
    cell.append(button);
    it.head.append(cell);
  });
}

// Numbers begin with the highest, texts with the first.
function choose(it, column) {
  const begins = it.columns[column][1] === "text" ? 1 : -1;
  if (!it.sort || it.sort.column !== column) it.sort = { column, sign: begins };
  else if (it.sort.sign === begins) it.sort.sign = -begins;
  else it.sort = null;
  [...it.head.children].forEach((cell, i) => {
    if (it.sort && it.sort.column === i) cell.setAttribute("aria-sort", it.sort.sign > 0 ? "ascending" : "descending");
    else cell.removeAttribute("aria-sort");
  });
}

function order(it) {
  for (const key of it.places.keys()) if (!it.latest.has(key)) it.places.delete(key);
  for (const key of it.latest.keys()) if (!it.places.has(key)) it.places.set(key, it.seen++);
  const keys = [...it.latest.keys()].sort((a, b) => it.places.get(a) - it.places.get(b));
  if (!it.sort) return keys;
  const value = key => it.columns[it.sort.column][2](it.latest.get(key)) ?? -1;
  const compare = (a, b) => typeof a === "number" ? a - b : String(a).localeCompare(String(b), undefined, { numeric: true });
  return keys.sort((a, b) => it.sort.sign * compare(value(a), value(b)));
}

function refresh(it) {
  const wanted = at("search").value.trim().toLowerCase();
  const isWanted = row => it.columns.some(([, cls, value]) => cls === "text" && String(value(row) ?? "").toLowerCase().includes(wanted));
  const keys = order(it).filter(key => !wanted || isWanted(it.latest.get(key)));
  arrange(it.body, keys.map(key => fill(it, key, it.latest.get(key))));
  for (const key of it.rows.keys()) if (!it.latest.has(key)) it.rows.delete(key);
  say(it.note_, [it.note, wanted && keys.length + " of " + it.latest.size + " found"].filter(Boolean).join("; "));
  reveal(it.section, it.latest.size > 0);
}

function fill(it, key, row) {
  let element = it.rows.get(key);
  if (!element) {
    element = make("tr");
    it.columns.forEach(([, cls], i) => element.append(make(i ? "td" : "th", cls)));
    element.firstChild.scope = "row";
    it.rows.set(key, element);
  }
  it.columns.forEach(([, , value, put], i) => {
    const cell = element.children[i];
    if (put) put(cell, row);
    else say(cell, value(row) ?? "–");
  });
  return element;
}

// Kinds of columns.
const text = (name, value) => [name, "text", value];
const number = (name, value) => [name, "", value];
const rate = (name, value, unit) => [name, "", value, (cell, row) => say(cell, short(value(row), unit))];
const alarming = column => [...column.slice(0, 3), (cell, row) => {
  column[3](cell, row);
  cell.classList.toggle("bad", column[2](row) > 0);
}];
const linked = (name, value, hash) => [name, "text", value, (cell, row) => {
  if (!cell.firstChild) cell.append(link(hash(row), value(row)));
}];
const lined = (name, values) => [name, "text", () => "", (cell, row) => {
  if (!cell.firstChild) cell.append(draw("svg", { width: 120, height: 20, viewBox: "0 0 120 20", "aria-hidden": "true" }));
  sparkline(cell.firstChild, values(row));
}];
at("search").addEventListener("input", () => tables.forEach(it => it.latest && refresh(it)));
