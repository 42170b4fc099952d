//! What `top` shows: tables in an order, as far as a screen has room, and what keys make of them.

use std::cmp::Reverse;

use super::screen::{Key, Size};
use crate::{
    api::{LivePrefix, LiveService, LiveView, PrefixCounts, ServiceCounts},
    cli::{
        show::count,
        table::{Column, Row, number, rows_of, table, text},
        tone::Tone,
    },
    text::list_of,
};

/// Prefixes in a table that nobody's screen limits.
const ROWS: usize = 20;
/// Rows that a page moves by.
const PAGE: usize = 10;

const SERVICES: [Column; 14] = [
    text("SERVICE"),
    text("HANDLER").rank(8),
    number("STEERED/S"),
    number("DROPPED/S").rank(1),
    number("NO-SOCKET/S").rank(10),
    number("DENIED/S").rank(9),
    number("UNASSIGNED/S").rank(12),
    number("QUEUE-FULL/S").rank(11),
    number("CONN/S").rank(2),
    number("REFUSED/S").rank(6),
    number("DGRAM/S").rank(5),
    number("IN/S").rank(4),
    number("OUT/S").rank(3),
    number("OPEN"),
];

const PREFIXES: [Column; 7] = [
    text("PREFIX"),
    text("PROTOCOL").rank(4),
    text("SERVICE").rank(3),
    number("STEERED/S"),
    number("DROPPED/S").rank(2),
    number("STEERED").rank(5),
    number("DROPPED").rank(6),
];

const HELP: &str = "\
q, Ctrl-C     end
s             sort by the next column: packets handed to sockets, packets dropped, connections, bytes, name
/             show only services and prefixes with a text in their names; Enter keeps it, Escape ends it
arrows, j, k  scroll the prefixes; a page at a time with Page Up and Page Down, to the first one with Home
space, p      pause, and go on
?, h          this help

Rates are means over the time since the look before. Columns that have no room are left out: a wider terminal
shows dropped packets by reason. NO-SOCKET: the service had no live socket; DENIED: it does not take the source;
UNASSIGNED: the kernel would not assign its socket; QUEUE-FULL: the socket's queue was full (not among DROPPED).";

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Sort {
    /// Packets handed to sockets, per second
    #[default]
    Steered,
    /// Packets dropped, per second
    Dropped,
    /// Connections accepted per second; prefixes by packets
    Connections,
    /// Bytes per second; prefixes by packets
    Bytes,
    /// By name
    Name,
}

impl Sort {
    fn next(self) -> Self {
        match self {
            Self::Steered => Self::Dropped,
            Self::Dropped => Self::Connections,
            Self::Connections => Self::Bytes,
            Self::Bytes => Self::Name,
            Self::Name => Self::Steered,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Steered => "steered",
            Self::Dropped => "dropped",
            Self::Connections => "connections",
            Self::Bytes => "bytes",
            Self::Name => "name",
        }
    }
}

/// What the user wants to see.
#[derive(Debug)]
pub(super) struct Shown {
    sort: Sort,
    /// Part of the names of what is shown.
    filter: String,
    is_typing: bool,
    /// Prefixes above the first that is shown.
    scrolled: usize,
    is_paused: bool,
    has_help: bool,
}

impl Shown {
    pub(super) fn new(sort: Sort) -> Self {
        Self { sort, filter: String::new(), is_typing: false, scrolled: 0, is_paused: false, has_help: false }
    }

    pub(super) fn is_paused(&self) -> bool {
        self.is_paused
    }

    /// Does what a key is for; whether there is more to see then.
    pub(super) fn goes_on_after(&mut self, key: Key) -> bool {
        if self.is_typing && key != Key::End {
            self.type_filter(key);
            return true;
        }
        match key {
            Key::End | Key::Character('q' | 'Q') => return false,
            Key::Character('s') => self.sort = self.sort.next(),
            Key::Character('/') => (self.is_typing, self.has_help) = (true, false),
            Key::Character(' ' | 'p') => self.is_paused = !self.is_paused,
            Key::Character('?' | 'h') => self.has_help = !self.has_help,
            Key::Up | Key::Character('k') => self.scrolled = self.scrolled.saturating_sub(1),
            Key::Down | Key::Character('j') => self.scrolled += 1,
            Key::PageUp => self.scrolled = self.scrolled.saturating_sub(PAGE),
            Key::PageDown => self.scrolled += PAGE,
            Key::Home | Key::Character('g') => self.scrolled = 0,
            Key::Escape if self.has_help => self.has_help = false,
            Key::Escape => self.filter.clear(),
            Key::Resized | Key::Enter | Key::Backspace | Key::Character(_) => {}
        }
        true
    }

    fn type_filter(&mut self, key: Key) {
        match key {
            Key::Enter => self.is_typing = false,
            Key::Escape => (self.is_typing, self.filter) = (false, String::new()),
            Key::Backspace => drop(self.filter.pop()),
            Key::Character(it) => self.filter.push(it),
            _ => return,
        }
        self.scrolled = 0;
    }

    /// All tables, for a width if there is a limit.
    pub(super) fn tables(&self, view: &LiveView, width: Option<usize>) -> String {
        let services = self.services(&view.services);
        let prefixes = self.prefixes(&view.prefixes);
        let more = view.prefixes_omitted + prefixes.len().saturating_sub(ROWS);
        let head = head(view).join("\n");
        let services = table(&SERVICES, services.into_iter().map(|(it, rates)| service_row(it, &rates)), width);
        let shown = prefixes.into_iter().take(ROWS).map(|(it, rates)| prefix_row(it, rates));
        let prefixes = table(&PREFIXES, shown, width);
        format!("{head}\n\n{services}\n\n{prefixes}{}", left_out(more, "prefix", "prefixes"))
    }

    /// What a screen of that size has room for.
    pub(super) fn screen(&mut self, view: Result<&LiveView, &str>, size: Size) -> String {
        let keys = Tone::Dim.line(&self.keys());
        if self.has_help {
            return format!("{HELP}\n\n{keys}");
        }
        let view = match view {
            Ok(view) => view,
            Err(problem) => return format!("{}\n\n{keys}", Tone::Bad.line(problem)),
        };
        let (services, prefixes) = (self.services(&view.services), self.prefixes(&view.prefixes));
        let head = head(view);
        // Beside rows there are three empty lines, two headers, two lines about what is left out, and the keys.
        let room = size.rows.saturating_sub(head.len() + 8);
        let services_shown = services.len().min((room / 2).max(1));
        let prefixes_room = room.saturating_sub(services_shown).max(1);
        self.scrolled = self.scrolled.min(prefixes.len().saturating_sub(prefixes_room));
        let more_services = services.len() - services_shown;
        let more_prefixes = prefixes.len().saturating_sub(self.scrolled + prefixes_room) + view.prefixes_omitted;
        let width = Some(size.columns);
        let services = services.into_iter().take(services_shown).map(|(it, rates)| service_row(it, &rates));
        let prefixes = prefixes.into_iter().skip(self.scrolled).take(prefixes_room);
        format!(
            "{}\n\n{}{}\n\n{}{}\n\n{keys}",
            head.join("\n"),
            rows_of(&SERVICES, services, width).0,
            left_out(more_services, "service", "services"),
            rows_of(&PREFIXES, prefixes.map(|(it, rates)| prefix_row(it, rates)), width).0,
            left_out(more_prefixes, "prefix", "prefixes"),
        )
    }

    /// The last line: what is shown, and by which keys that changes.
    fn keys(&self) -> String {
        if self.is_typing {
            return format!("show only: {}_", self.filter);
        }
        let paused = if self.is_paused { "PAUSED  " } else { "" };
        let filter = if self.filter.is_empty() { String::new() } else { format!("only {:?}  ", self.filter) };
        format!("{paused}{filter}q end  ? help  s sort: {}  / filter  space pause", self.sort.name())
    }

    fn is_meant(&self, names: &[&str]) -> bool {
        let filter = self.filter.to_lowercase();
        names.iter().any(|name| name.to_lowercase().contains(&filter))
    }

    fn services<'a>(&self, services: &'a [LiveService]) -> Vec<(&'a LiveService, ServiceCounts<f64>)> {
        let meant = services.iter().filter(|it| self.is_meant(&[it.name.as_str()]));
        let mut services: Vec<_> = meant.map(|it| (it, it.rates.unwrap_or_default())).collect();
        services.sort_by_key(|(_, rates)| {
            Reverse(in_order(match self.sort {
                Sort::Steered => rates.steered,
                Sort::Dropped => rates.dropped,
                Sort::Connections => rates.accepted,
                Sort::Bytes => rates.bytes_from_clients + rates.bytes_to_clients,
                Sort::Name => 0.0,
            }))
        });
        services
    }

    fn prefixes<'a>(&self, prefixes: &'a [LivePrefix]) -> Vec<(&'a LivePrefix, PrefixCounts<f64>)> {
        let meant = prefixes.iter().filter(|it| self.is_meant(&[&it.prefix, it.service.as_str()]));
        let mut prefixes: Vec<_> = meant.map(|it| (it, it.rates.unwrap_or_default())).collect();
        match self.sort {
            Sort::Name => prefixes.sort_by(|(one, _), (other, _)| one.prefix.cmp(&other.prefix)),
            Sort::Dropped => prefixes.sort_by_key(|(_, rates)| Reverse(in_order(rates.dropped))),
            // As the daemon has sorted them, by all packets.
            Sort::Connections | Sort::Bytes => {}
            Sort::Steered => prefixes.sort_by_key(|(_, rates)| Reverse(in_order(rates.steered))),
        }
        prefixes
    }
}

/// Rates are finite and not negative, so that their bits are in their order.
fn in_order(rate: f64) -> u64 {
    rate.to_bits()
}

fn head(view: &LiveView) -> Vec<String> {
    let LiveView { version, pid, backend, generation, rules, degraded, window, .. } = view;
    let over = window.map_or_else(|| "no rates yet".into(), |window| format!("rates over {window:.1} s"));
    let rules = count(*rules, "rule");
    let mut lines = vec![format!("anyportd {version}, pid {pid}, {backend}, generation {generation}, {rules}; {over}")];
    if !degraded.is_empty() {
        lines.push(Tone::Bad.line(&format!("DEGRADED  {}", list_of(degraded))));
    }
    lines
}

fn left_out(count: usize, one: &str, many: &str) -> String {
    match count {
        0 => String::new(),
        1 => format!("\n{}", Tone::Dim.line(&format!("and 1 more {one}"))),
        _ => format!("\n{}", Tone::Dim.line(&format!("and {count} more {many}"))),
    }
}

fn service_row<'a>(service: &LiveService, rates: &ServiceCounts<f64>) -> Row<'a, 14> {
    let packets = |rate: f64| short(rate, 1000.0).into();
    let bytes = |rate: f64| short(rate, 1024.0).into();
    let tone = if rates.dropped > 0.0 || rates.full_queues > 0.0 { Tone::Doubtful } else { Tone::Plain };
    let cells = [
        service.name.to_string().into(),
        service.handler.to_string().into(),
        packets(rates.steered),
        packets(rates.dropped),
        packets(rates.no_socket),
        packets(rates.denied),
        packets(rates.assign_error),
        packets(rates.full_queues),
        packets(rates.accepted),
        packets(rates.refused),
        packets(rates.datagrams),
        bytes(rates.bytes_from_clients),
        bytes(rates.bytes_to_clients),
        service.active.to_string().into(),
    ];
    Row { cells, tone }
}

fn prefix_row(row: &LivePrefix, PrefixCounts { steered, dropped }: PrefixCounts<f64>) -> Row<'_, 7> {
    let LivePrefix { prefix, protocol, service, counts, .. } = row;
    let tone = if dropped > 0.0 { Tone::Doubtful } else { Tone::Plain };
    let cells = [
        prefix.as_str().into(),
        protocol.to_string().into(),
        service.as_str().into(),
        short(steered, 1000.0).into(),
        short(dropped, 1000.0).into(),
        counts.steered.to_string().into(),
        counts.dropped.to_string().into(),
    ];
    Row { cells, tone }
}

/// A number in few characters: with a unit of so many, or so many of them.
fn short(number: f64, unit: f64) -> String {
    const UNITS: [&str; 5] = ["", "k", "M", "G", "T"];
    let mut number = number;
    let mut at = 0;
    // What would be rounded to a whole unit is shown as such.
    while number >= unit - 0.5 && at + 1 < UNITS.len() {
        number /= unit;
        at += 1;
    }
    let digits = usize::from(number < 9.95 && number > 0.0);
    let binary = if unit > 1000.0 && at > 0 { "i" } else { "" };
    format!("{number:.digits$}{}{binary}", if binary.is_empty() { UNITS[at] } else { ["", "K", "M", "G", "T"][at] })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::{Key, LiveView, Shown, Size, Sort, short};
    use crate::cli::tone::painted;

    fn view() -> LiveView {
        let prefix = |prefix: &str, steered: f64, dropped: f64| {
            json!({"prefix": prefix, "protocol": "tcp", "service": "web", "counts": {"steered": 70, "dropped": 7},
                   "rates": {"steered": steered, "dropped": dropped}})
        };
        let counts = json!({"steered": 70, "dropped": 7, "accepted": 60, "refused": 1, "datagrams": 10,
                            "bytes_from_clients": 5000, "bytes_to_clients": 70000});
        let mut rates = counts.clone();
        rates["bytes_to_clients"] = json!(7_340_032.0);
        rates["no_socket"] = json!(6.0);
        let service = |name: &str, rates| json!({"name": name, "handler": "hello", "rules": 3, "sockets": 8, "active": 12, "counts": counts, "rates": rates});
        serde_json::from_value(json!({
            "version": "1.2.3", "pid": 42, "backend": "tc", "generation": 9, "rules": 3, "unready": null,
            "degraded": ["this", "that"], "age": 0.1, "window": 2.04,
            "services": [service("idle", json!(null)), service("web", rates)],
            "prefixes": [prefix("192.0.2.0/24", 2.0, 9.0), prefix("2001:db8::/32", 3.0, 0.0), prefix("0.0.0.0/0", 1234.0, 0.1)],
            "prefixes_omitted": 5
        }))
        .unwrap()
    }

    fn all(sort: Sort) -> String {
        painted(&Shown::new(sort).tables(&view(), None), false)
    }

    fn on_screen(shown: &mut Shown, rows: usize, columns: usize) -> String {
        painted(&shown.screen(Ok(&view()), Size { rows, columns }), false)
    }

    #[test]
    fn tables_are_sorted_as_asked() {
        let text = all(Sort::Steered);
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines[0], "anyportd 1.2.3, pid 42, tc, generation 9, 3 rules; rates over 2.0 s");
        assert_eq!(lines[1], "DEGRADED  this, that");
        assert_eq!(
            lines[4].split_whitespace().collect::<Vec<_>>(),
            ["web", "hello", "70", "7.0", "6.0", "0", "0", "0", "60", "1.0", "10", "4.9Ki", "7.0Mi", "12"]
        );
        assert!(lines[5].starts_with("idle ") && lines[5].contains("  0 "));
        let order = |text: &str| -> Vec<String> {
            let prefixes = text.lines().skip_while(|line| !line.starts_with("PREFIX")).skip(1).take(3);
            prefixes.map(|line| line.split_whitespace().next().unwrap().to_owned()).collect()
        };
        assert_eq!(order(&text), ["0.0.0.0/0", "2001:db8::/32", "192.0.2.0/24"]);
        assert_eq!(order(&all(Sort::Dropped))[0], "192.0.2.0/24");
        assert_eq!(order(&all(Sort::Name))[1], "192.0.2.0/24");
        assert_eq!(text.lines().last(), Some("and 5 more prefixes"));
    }

    #[test]
    fn each_width_has_whole_numbers_and_open_connections() {
        for (columns, service) in [
            (40, "web         70        7.0  12"),
            (80, "web      hello         70        7.0      60        1.0       10  4.9Ki  7.0Mi"),
            (
                200,
                "web      hello           70        7.0          6.0         0             0             0      60        1.0       10  4.9Ki  7.0Mi    12",
            ),
        ] {
            let text = on_screen(&mut Shown::new(Sort::Steered), 24, columns);
            let shown: Vec<&str> = text.lines().filter(|line| line.starts_with("web ")).collect();
            let numbers = |line: &str| line.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
            assert_eq!(numbers(shown[0]).first(), numbers(service).first(), "{text}");
            assert_eq!(numbers(shown[0]).last().map(String::as_str), Some("12"), "OPEN is last at {columns}: {text}");
            let header = text.lines().find(|line| line.starts_with("SERVICE")).unwrap();
            assert!(header.ends_with("OPEN") && header.chars().count() <= columns, "{columns}: {text}");
            assert!(
                text.lines().skip(2).filter(|line| !line.starts_with('q')).all(|line| line.chars().count() <= columns),
                "{columns}: {text}"
            );
        }
        // Drops by reason where there is room.
        assert!(!on_screen(&mut Shown::new(Sort::Steered), 24, 80).contains("NO-SOCKET/S"));
        assert!(on_screen(&mut Shown::new(Sort::Steered), 24, 120).contains("NO-SOCKET/S"));
    }

    #[test]
    fn a_small_screen_has_fewer_rows_and_scrolls() {
        let mut shown = Shown::new(Sort::Name);
        for (rows, prefixes) in [(11, 1), (14, 2), (24, 3)] {
            let text = on_screen(&mut shown, rows, 120);
            assert!(text.lines().count() <= rows.max(12), "{rows}: {text}");
            assert_eq!(text.matches("  tcp  ").count(), prefixes, "{rows}: {text}");
            assert!(text.contains(&format!("and {} more prefixes", 8 - prefixes)), "{text}");
        }
        let first = |shown: &mut Shown| {
            let text = on_screen(shown, 11, 120);
            text.lines().skip_while(|line| !line.starts_with("PREFIX")).nth(1).unwrap().to_owned()
        };
        assert!(first(&mut shown).starts_with("0.0.0.0/0"));
        assert!(shown.goes_on_after(Key::Down));
        assert!(first(&mut shown).starts_with("192.0.2.0/24"));
        // No further than the last one is shown.
        assert!(shown.goes_on_after(Key::PageDown) && shown.goes_on_after(Key::PageDown));
        assert!(first(&mut shown).starts_with("2001:db8::/32"));
        assert!(shown.goes_on_after(Key::Up));
        assert!(first(&mut shown).starts_with("192.0.2.0/24"));
        assert!(shown.goes_on_after(Key::Home));
        assert!(first(&mut shown).starts_with("0.0.0.0/0"));
    }

    #[test]
    fn keys_sort_filter_pause_and_help() {
        let mut shown = Shown::new(Sort::Steered);
        let press = |shown: &mut Shown, keys: &str| {
            for key in keys.chars() {
                let key = if key == '\n' { Key::Enter } else { Key::Character(key) };
                assert!(shown.goes_on_after(key), "{key:?}");
            }
            on_screen(shown, 24, 120)
        };
        assert!(press(&mut shown, "s").ends_with("s sort: dropped  / filter  space pause"));
        let text = press(&mut shown, "/2001q");
        assert!(text.ends_with("show only: 2001q_") && !text.contains("2001:db8"), "{text}");
        assert!(shown.goes_on_after(Key::Backspace));
        let text = press(&mut shown, "\n");
        assert!(
            text.contains("2001:db8::/32") && !text.contains("192.0.2.0/24") && text.contains("only \"2001\""),
            "{text}"
        );
        assert!(shown.goes_on_after(Key::Escape));
        let text = press(&mut shown, "p");
        assert!(text.contains("192.0.2.0/24") && text.contains("PAUSED") && shown.is_paused(), "{text}");
        assert!(press(&mut shown, " ?").contains("UNASSIGNED: the kernel"));
        assert!(!shown.is_paused() && shown.goes_on_after(Key::Escape));
        assert!(!on_screen(&mut shown, 24, 120).contains("Ctrl-C"));
        assert!(!shown.goes_on_after(Key::Character('q')) && !shown.goes_on_after(Key::End));
    }

    #[test]
    fn numbers_are_short() {
        for (number, expected) in [
            (0.0, "0"),
            (0.26, "0.3"),
            (9.94, "9.9"),
            (9.97, "10"),
            (999.4, "999"),
            (999.6, "1.0k"),
            (1234.0, "1.2k"),
            (5e10, "50G"),
            (5e17, "500000T"),
        ] {
            assert_eq!(short(number, 1000.0), expected, "{number}");
        }
        for (number, expected) in [(1023.0, "1023"), (1024.0, "1.0Ki"), (7.0 * 1024.0 * 1024.0, "7.0Mi")] {
            assert_eq!(short(number, 1024.0), expected, "{number}");
        }
    }
}
