const HEIGHT = 150, LEFT = 52, RIGHT = 8, TOP = 8, BOTTOM = 20;
const SPANS = [["10 min", 600], ["1 hour", 3600]];
const charts = new Map();
let span = 3600;

// The step of an axis that reaches this in four steps at most.
function stepOf(top, unit) {
  const base = unit === "B" ? 1024 : 1000;
  const scale = base ** Math.max(0, Math.floor(Math.log(top) / Math.log(base)));
  const rough = top / scale / 4, power = 10 ** Math.floor(Math.log10(rough));
  return scale * power * [1, 2, 5, 10].find(it => it * power >= rough * .999);
}

// A chart that is there once; what it shows is replaced: lines of [name, class, values] over times in seconds since 1970.
function chart(id, title, unit, times, lines) {
  let it = charts.get(id);
  if (!it) {
    const figure = at(id), caption = make("figcaption"), svg = draw("svg", { class: "chart", role: "img" });
    figure.replaceChildren(caption, svg);
    it = { id, caption, svg, pointed: null };
    charts.set(id, it);
    svg.addEventListener("pointermove", event => { it.pointed = event.clientX - svg.getBoundingClientRect().left; paint(it); });
    svg.addEventListener("pointerleave", () => { it.pointed = null; paint(it); });
  }
  Object.assign(it, { title, unit, times, lines });
  paint(it);
}

function paint(it) {
  const width = it.svg.clientWidth || 600;
  const end = it.times.length ? it.times[it.times.length - 1] : Date.now() / 1000, begin = end - span;
  const first = Math.max(0, it.times.findIndex(time => time >= begin));
  const x = time => LEFT + (width - LEFT - RIGHT) * (time - begin) / span;
  const high = Math.max(1, ...it.lines.flatMap(([, , values]) => values.slice(first)).map(value => value || 0));
  const step = stepOf(high, it.unit), top = Math.ceil(high / step - .001) * step;
  const y = value => HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * value / top;
  const parts = axes(width, begin, end, x, y, top, step, it.unit);
  for (const [, cls, values] of it.lines) parts.push(...strokes(it.times, values, first, cls, x, y));
  let chosen = it.times.length - 1;
  if (it.pointed !== null && chosen >= 0) {
    const distance = i => Math.abs(x(it.times[i]) - it.pointed);
    for (let i = first; i < it.times.length; i++) if (distance(i) < distance(chosen)) chosen = i;
    const place = x(it.times[chosen]);
    parts.push(draw("line", { class: "cursor", x1: place, x2: place, y1: TOP, y2: HEIGHT - BOTTOM }));
  }
  it.svg.setAttribute("viewBox", "0 0 " + width + " " + HEIGHT);
  it.svg.replaceChildren(...parts);
  legend(it, chosen);
}

function axes(width, begin, end, x, y, top, step, unit) {
  const parts = [];
  for (let value = 0; value <= top * 1.001; value += step) {
    parts.push(draw("line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: y(value), y2: y(value) }));
    parts.push(draw("text", { x: LEFT - 6, y: y(value) + 4, "text-anchor": "end" }, short(value, unit)));
  }
  const room = Math.max(2, Math.floor((width - LEFT) / 70));
  const every = [60, 120, 300, 600, 900, 1200, 1800].find(it => span / it <= room) || 3600;
  for (let time = Math.ceil(begin / every) * every; time <= end; time += every) {
    parts.push(draw("line", { class: "grid", x1: x(time), x2: x(time), y1: HEIGHT - BOTTOM, y2: HEIGHT - BOTTOM + 4 }));
    const anchor = x(time) > width - 24 ? "end" : x(time) < LEFT + 10 ? "start" : "middle";
    parts.push(draw("text", { x: x(time), y: HEIGHT - 4, "text-anchor": anchor }, clock(time)));
  }
  return parts;
}

// A line ends where nothing was counted, and another one begins.
function strokes(times, values, first, cls, x, y) {
  const runs = [[]];
  for (let i = first; i < times.length; i++) {
    const isGap = i > first + 1 && times[i] - times[i - 1] > 4 * Math.max(5, times[i - 1] - times[i - 2]);
    if (values[i] == null || isGap) runs.push([]);
    if (values[i] != null) runs[runs.length - 1].push([x(times[i]), y(values[i])]);
  }
  return runs.filter(run => run.length).map(run => run.length > 1
    ? draw("polyline", { class: cls, points: run.map(point => point.map(it => it.toFixed(1)).join(",")).join(" ") })
    : draw("circle", { class: cls, cx: run[0][0], cy: run[0][1], r: 1.5 }));
}

function legend(it, chosen) {
  const parts = it.lines.map(([name, cls, values]) => name + " " + short(values[chosen], it.unit));
  if (it.caption.children.length !== parts.length + 2) {
    it.caption.replaceChildren(make("b", "", it.title), ...it.lines.map(line => make("span", "key " + line[1])), make("span", "dim"));
  }
  say(it.caption.firstChild, it.title);
  parts.forEach((text, i) => say(it.caption.children[i + 1], text));
  say(it.caption.lastChild, it.pointed !== null && chosen >= 0 ? "at " + clock(it.times[chosen], true) : "");
  it.svg.setAttribute("aria-label", it.title + ", " + (it.times.length ? "now " + parts.join(", ") : "nothing yet"));
}

function sparkline(svg, values) {
  const top = Math.max(1, ...values.map(value => value || 0));
  const step = 120 / Math.max(1, values.length - 1);
  const points = values.map((value, i) => (i * step).toFixed(1) + "," + (19 - 18 * (value || 0) / top).toFixed(1));
  svg.replaceChildren(draw("polyline", { class: "c0", points: points.join(" ") }));
}

function offerSpans() {
  at("spans").replaceChildren(...SPANS.map(([name, seconds]) => {
    const button = make("button", "", name);
    button.type = "button";
    button.setAttribute("aria-pressed", span === seconds);
    button.addEventListener("click", () => {
      span = seconds;
      for (const other of at("spans").children) other.setAttribute("aria-pressed", other === button);
      charts.forEach(paint);
    });
    return button;
  }));
}
addEventListener("resize", () => charts.forEach(paint));
