const DROPS = [["no live socket", "no_socket"], ["not assigned", "assign_error"], ["denied", "denied"], ["full queues", "full_queues"]];
// Prefixes have no history in the daemon: what the page has seen itself.
const seen = new Map();

const rates = row => row.rates || {};
const keyOf = row => [row.prefix, row.protocol, row.service].join(" ");
const sum = (rows, value) => rows.reduce((sum, row) => sum + (value(row) || 0), 0);

// The highest numbers first in importance: a phone shows these without scrolling.
function tiles(rows, open) {
  const rate = name => row => rates(row)[name], isKnown = rows.some(row => row.rates);
  const all = (name, unit) => isKnown ? short(sum(rows, rate(name)), unit) : "–";
  const bad = name => isKnown && sum(rows, rate(name)) > 0 ? "bad" : "";
  // Less is counted for a prefix than for a service.
  const isCounted = name => rows.some(row => !row.rates || name in row.rates);
  const pairs = [
    ["steered/s", "steered"], ["dropped/s", "dropped", "", true], ["connections/s", "accepted"], ["in/s", "bytes_from_clients", "B"],
    ["out/s", "bytes_to_clients", "B"], ["datagrams/s", "datagrams"], ["refused/s", "refused", "", true],
    ["full queues/s", "full_queues", "", true],
  ];
  const shown = pairs.filter(([, name]) => isCounted(name));
  const made = shown.map(([term, name, unit, isBad]) => [term, all(name, unit), isBad ? bad(name) : ""]);
  if (open !== null) made.splice(3, 0, ["open", short(open)]);
  facts(at("rates"), made);
}

function past(kept) {
  const { times, series } = kept || { times: [], series: {} }, values = name => series[name] || [];
  const dropped = times.map((_, i) => values("steered")[i] == null ? null : sum(DROPS.slice(0, 3), ([, name]) => values(name)[i]));
  chart("packets", "Packets per second", "", times, [["steered", "c0", values("steered")], ["dropped", "c1", dropped]]);
  chart("drops", "Drops per second", "", times, DROPS.map(([title, name], i) => [title, "c" + (i + 1), values(name)]));
  chart("connections", "Connections", "", times,
    [["open", "c0", values("active")], ["accepted/s", "c4", values("accepted")], ["refused/s", "c1", values("refused")]]);
  chart("bytes", "Bytes per second", "B", times,
    [["from clients", "c0", values("bytes_from_clients")], ["to clients", "c4", values("bytes_to_clients")]]);
}

function services(rows, kept) {
  table("services", "Services", [
    linked("service", it => it.name, it => pathOf("service", it.name)),
    rate("steered/s", it => rates(it).steered), alarming(rate("dropped/s", it => rates(it).dropped)),
    rate("connections/s", it => rates(it).accepted), rate("open", it => it.active),
    rate("in/s", it => rates(it).bytes_from_clients, "B"), rate("out/s", it => rates(it).bytes_to_clients, "B"),
    lined("last hour", it => (kept && kept.services[it.name]) || []),
    rate("datagrams/s", it => rates(it).datagrams), alarming(rate("refused/s", it => rates(it).refused)),
    ...DROPS.map(([title, name]) => alarming(rate(title + "/s", it => rates(it)[name]))),
    text("handler", it => it.handler), number("rules", it => it.rules), number("sockets", it => it.sockets),
  ], rows, it => it.name, kept && kept.services_omitted ? kept.services_omitted + " without a history: 64 have one" : "");
}

function upstreams(rows) {
  const all = rows.flatMap(service => (service.upstreams || []).map(it => ({ service: service.name, ...it })));
  table("upstreams", "Upstreams", [
    text("upstream", it => it.address), ["state", "text", it => it.state, (cell, it) => {
      say(cell, it.state);
      cell.classList.toggle("bad", it.state !== "up");
    }],
    number("open", it => it.active), number("connections", it => it.connections), alarming(rate("failures", it => it.failures)),
    linked("service", it => it.service, it => pathOf("service", it.service)), text("why", it => it.why || ""),
  ], all, it => it.service + " " + it.address);
}

function prefixes(rows, omitted) {
  table("prefixes", "Prefixes", [
    linked("prefix", it => it.prefix, it => pathOf("prefix", it.prefix)),
    rate("steered/s", it => rates(it).steered), alarming(rate("dropped/s", it => rates(it).dropped)),
    number("steered", it => it.counts.steered), number("dropped", it => it.counts.dropped),
    text("protocol", it => it.protocol), linked("service", it => it.service, it => pathOf("service", it.service)),
  ], rows, keyOf, omitted ? "the busiest; " + omitted + " more: anyportctl prefixes" : "");
}

function announced(view, isMeant) {
  const { told, all, prefixes } = view.announce || { prefixes: [] };
  table("announced", "Announcements", [
    text("prefix", it => it.prefix), ["state", "text", it => it.state, (cell, it) => {
      say(cell, it.state);
      cell.classList.toggle("bad", it.state !== "announced");
    }],
    text("since", it => it.since), text("why", it => it.why || ""),
  ], prefixes.filter(isMeant), it => it.prefix,
  view.announce ? view.announce.announced + " of " + all + " announced" + (told ? "" : "; the router does not know yet") : "");
}

function drained(view, isMeant) {
  table("drained", "Drains", [
    text("what", it => it.prefix || (it.service ? "service " + it.service : "the whole node")), text("state", it => it.state),
    rate("seconds left", it => it.left), text("why", it => it.why || ""),
  ], (view.drained || []).filter(isMeant), it => (it.prefix || "") + " " + (it.service || ""));
}

function node(view) {
  const { fleet, totals } = view;
  reveal(at("fleet"), fleet);
  if (fleet) {
    facts(at("fleet").lastElementChild, [
      ["ring", fleet.ring], ["node", fleet.node], ["etcd", fleet.connected ? "answers" : "does not answer" + (fleet.error ? ": " + fleet.error : ""),
        fleet.connected ? "" : "bad"],
      ["active set", fleet.set ? fleet.set.slice(0, 12) + ", sequence " + fleet.sequence : "none"], ["highest sequence seen", fleet.seen],
      ["refused", fleet.refused ? fleet.refused.error : "nothing", fleet.refused ? "bad" : ""],
    ]);
  }
  reveal(at("node"), true);
  facts(at("node").lastElementChild, [
    ["rules", view.rules + " of " + view.max_rules], ["generation", view.generation], ["back end", view.backend],
    ["client descriptors", view.client_descriptors_in_use + " of " + view.client_descriptors],
    ["since the start", totals.steered + " packets steered, " + totals.dropped + " dropped, " + totals.unmatched + " unmatched"],
  ]);
}

function remember(rows) {
  const now = Date.now() / 1000;
  for (const row of rows) {
    const kept = seen.get(keyOf(row)) || { times: [], steered: [], dropped: [] };
    for (const [name, value] of [["times", now], ["steered", rates(row).steered], ["dropped", rates(row).dropped]]) {
      kept[name].push(value);
      if (kept[name].length > 1800) kept[name].shift();
    }
    seen.set(keyOf(row), kept);
  }
  const last = kept => kept.times[kept.times.length - 1];
  for (const [key, kept] of seen) if (now - last(kept) > 3600) seen.delete(key);
}

function pastOf(rows) {
  const lines = rows.slice(0, 5).map((row, i) => [row.protocol + " to " + row.service, "c" + i, seen.get(keyOf(row))]);
  const times = lines.length ? lines[0][2].times : [];
  const values = (kept, name) => times.map(time => kept[name][kept.times.indexOf(time)]);
  chart("packets", "Steered per second", "", times, lines.map(([name, cls, kept]) => [name, cls, values(kept, "steered")]));
  chart("drops", "Dropped per second", "", times, lines.map(([name, cls, kept]) => [name, cls, values(kept, "dropped")]));
}
