const SVG = "http://www.w3.org/2000/svg";
const at = id => document.getElementById(id);

function make(name, cls, text) {
  const element = document.createElement(name);
  if (cls) element.className = cls;
  if (text !== undefined) element.textContent = text;
  return element;
}

function draw(name, attributes, text) {
  const element = document.createElementNS(SVG, name);
  for (const key in attributes) element.setAttribute(key, attributes[key]);
  if (text !== undefined) element.textContent = text;
  return element;
}

function link(hash, text) {
  const element = make("a", "", text);
  element.setAttribute("href", hash);
  return element;
}

const pathOf = (...parts) => "#/" + parts.map(encodeURIComponent).join("/");

// Nothing is touched that stays as it is: readers of screens, selections and focus are not disturbed.
function say(element, text) {
  if (element.textContent !== String(text)) element.textContent = text;
}

function reveal(element, isShown) {
  element.hidden = !isShown;
}

function short(number, unit) {
  if (number == null) return "–";
  if (number > 0 && number < .05) return "< 0.1" + (unit ? " " + unit : "");
  const base = unit === "B" ? 1024 : 1000, units = ["", "k", "M", "G", "T"];
  let step = 0;
  while (number >= base - .5 && step < 4) { number /= base; step++; }
  const digits = number > 0 && number < 9.95 && !Number.isInteger(number) ? number.toFixed(1) : String(Math.round(number));
  return digits + (step || unit ? " " : "") + units[step] + (unit || "");
}

function clock(seconds, withSeconds) {
  const options = { hour: "2-digit", minute: "2-digit", hourCycle: "h23" };
  if (withSeconds) options.second = "2-digit";
  return new Date(seconds * 1000).toLocaleTimeString([], options);
}

// Pairs of a term and its text in a list of definitions; a third value is the class.
function facts(list, pairs) {
  const known = new Map([...list.children].map(it => [it.firstChild.textContent, it]));
  const rows = pairs.map(([term, text, cls]) => {
    const row = known.get(term) || make("div");
    if (!row.firstChild) row.append(make("dt", "", term), make("dd"));
    say(row.lastChild, text);
    row.lastChild.className = cls || "";
    return row;
  });
  arrange(list, rows);
}

// Makes these the children, in this order, and moves only those that are elsewhere.
function arrange(parent, children) {
  children.forEach((child, i) => {
    if (parent.children[i] !== child) parent.insertBefore(child, parent.children[i] || null);
  });
  while (parent.children.length > children.length) parent.lastElementChild.remove();
}
