const PERIOD = 2000, POINTS = 720;
// By service; of all under "".
const histories = new Map();
let latest = null, asked = 0;

// What the page is about: all, a service or a prefix.
function route() {
  const [kind, name] = location.hash.replace(/^#\/?/, "").split("/").map(part => {
    try { return decodeURIComponent(part); } catch { return part; }
  });
  return (kind === "service" || kind === "prefix") && name ? { kind, name } : { kind: "all", name: "" };
}

async function get(path) {
  const answer = await fetch(path, { cache: "no-store", signal: AbortSignal.timeout(10000) });
  if (answer.status === 404) return null;
  if (!answer.ok) throw new Error((await answer.text()).trim());
  return answer.json();
}

// Asks for the points since the last one that is known.
async function extend(service) {
  const before = histories.get(service), known = before || { times: [], series: {}, services: {} };
  const since = known.times.length ? known.times[known.times.length - 1] : 0;
  const more = await get("history.json?since=" + since + (service ? "&service=" + encodeURIComponent(service) : ""));
  // Another answer may have come first, with the same points.
  if (!more || histories.get(service) !== before) return;
  const join = (before, after) => {
    const joined = {};
    for (const name in after) {
      joined[name] = [...(before[name] || known.times.map(() => null)), ...after[name]].slice(-POINTS);
    }
    return joined;
  };
  histories.set(service, {
    times: [...known.times, ...more.times].slice(-POINTS), series: join(known.series, more.series),
    services: join(known.services, more.services), services_omitted: more.services_omitted,
  });
}

function state(text, isBad) {
  say(at("state"), text);
  at("state").className = isBad ? "state bad" : "state";
}

function head(view) {
  const count = view.degraded.length;
  state(view.unready ? "not ready: " + view.unready : count ? "degraded" : "all is well", view.unready || count);
  say(at("title"), "anyport" + (view.host ? " on " + view.host : ""));
  const title = (count || view.unready ? "⚠ " : "") + (view.host ? view.host + " – " : "") + "anyport";
  if (document.title !== title) document.title = title;
  say(at("facts"), "version " + view.version + ", pid " + view.pid + ", " + view.backend + ", generation " + view.generation +
    ", " + view.rules + " rules; " + (view.window ? "rates over " + view.window.toFixed(1) + " s" : "no rates yet"));
  const list = at("degraded"), advice = view.advice || [];
  reveal(list, count);
  if (list.dataset.shown !== JSON.stringify(view.degraded)) {
    list.dataset.shown = JSON.stringify(view.degraded);
    list.replaceChildren(...view.degraded.map((what, i) => {
      const item = make("li");
      item.append(make("b", "", what));
      if (advice[i]) item.append(make("span", "", "What to do: " + advice[i].action + " (" + advice[i].document + ")"));
      return item;
    }));
  }
  reveal(at("unconfirmed"), view.unconfirmed != null);
  say(at("unconfirmed"), "What was applied is rolled back in " + view.unconfirmed + " s, unless: anyportctl confirm");
}

function subject({ kind, name }, note) {
  const isOne = kind !== "all";
  reveal(at("back"), isOne);
  if (!at("back").firstChild) at("back").append(link("#/", "← all services and prefixes"));
  reveal(at("subject"), isOne);
  say(at("subject"), isOne ? kind + " " + name : "");
  reveal(at("note"), note);
  say(at("note"), note || "");
  reveal(at("finding"), !isOne);
  for (const id of ["connections", "bytes"]) reveal(at(id), kind !== "prefix");
}

function show() {
  const view = latest, wanted = route(), { kind, name } = wanted;
  const isAll = kind === "all", isService = kind === "service";
  const shown = view.services.filter(it => isAll || isService && it.name === name);
  const rows = view.prefixes.filter(it => isAll || (isService ? it.service : it.prefix) === name);
  const note = isAll || isService && shown.length || rows.length ? ""
    : isService ? "There is no service of this name." : "This prefix is not among the 100 that have values here: anyportctl prefixes --within " + name;
  subject(wanted, note);
  head(view);
  tiles(kind === "prefix" ? rows : shown, kind === "prefix" ? null : sum(shown, it => it.active));
  if (kind === "prefix") pastOf(rows);
  else past(histories.get(name));
  const isAbout = it => isAll || (isService ? it.service : it.prefix) === name;
  services(kind === "prefix" ? view.services.filter(it => rows.some(row => row.service === it.name)) : shown, histories.get(""));
  upstreams(shown);
  prefixes(rows, isAll ? view.prefixes_omitted : 0);
  announced(view, isAbout);
  drained(view, it => isAbout(it) || !it.service && !it.prefix);
  node(view);
}

async function look() {
  try {
    if (!document.hidden) {
      const { kind, name } = route();
      const isDue = Date.now() - asked > 4500;
      const view = await get("live.json");
      if (isDue) await extend("");
      const isKept = kind === "service" && name in (histories.get("") || { services: {} }).services;
      if (isKept && (isDue || !histories.has(name))) await extend(name);
      if (isDue) asked = Date.now();
      latest = view;
      remember(view.prefixes);
      document.body.classList.remove("stale");
      show();
    }
  } catch (error) {
    state("no answer: " + error.message, true);
    document.body.classList.add("stale");
  }
}

async function watch() {
  await look();
  setTimeout(watch, PERIOD);
}
addEventListener("hashchange", () => {
  if (latest) show();
  look();
});
offerSpans();
watch();
