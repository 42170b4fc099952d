//! Tests of the state file, with a disk that loses power at any moment.

pub(crate) mod simulated;

use std::{fmt::Write as _, fs, sync::Arc};

use anyport_common::maps::Counters;

use self::simulated::Simulated;
use super::{FleetState, KeptCounters, KeptFleet, KeptSocket, RuleLine, State, Store};
use crate::rules::{Origin, RuleSpec, RuleText};

#[test]
fn keeps_what_was_saved() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a/b");
    let (mut store, state) = Store::open(&path).unwrap();
    assert_eq!(state, State::default());
    let rule = r#"{"prefix": "192.0.2.0/24", "except": "22", "route": false}"#;
    let rule = |origin| serde_json::from_str::<RuleText>(rule).unwrap().into_rule(origin);
    let mut state = State { rules: vec![rule(Origin::Added)], ..State::default() };
    store.save(&state, None).unwrap();
    assert_eq!(Store::open(&path).unwrap().1, state);
    let applied = rule(Origin::Applied);
    for _ in 0..3 {
        store.save(&state, Some(&RuleLine(&applied.prefix, &applied.terms).to_string())).unwrap();
        state.applied_rules = vec![applied.clone()];
        assert_eq!(Store::open(&path).unwrap().1, state);
        store.save(&state, None).unwrap();
        assert_eq!(Store::open(&path).unwrap().1, state);
        // The state and the previous one, which name the same rules.
        assert_eq!(fs::read_dir(&path).unwrap().count(), 3);
    }
    store.save(&state, Some("")).unwrap();
    // The previous state is whole, too.
    let previous = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(&path).unwrap() {
        let name = entry.unwrap().file_name();
        fs::copy(path.join(&name), previous.path().join(name)).unwrap();
    }
    fs::rename(previous.path().join(super::PREVIOUS), previous.path().join(super::FILE)).unwrap();
    assert_eq!(Store::open(previous.path()).unwrap().1, state);
    state.applied_rules.clear();
    assert_eq!(Store::open(&path).unwrap().1, state);
    store.save(&state, None).unwrap();
    assert_eq!(fs::read_dir(&path).unwrap().count(), 2);
}

#[test]
fn counters_are_kept() {
    let directory = tempfile::tempdir().unwrap();
    let (store, _) = Store::open(directory.path()).unwrap();
    let prefix = "192.0.2.0/24".parse().unwrap();
    let counters = Counters { steered: 7, no_socket: 8, assign_error: 9, denied: 10 };
    let terms = RuleSpec { except: "22".parse().unwrap(), ..RuleSpec::default() };
    let (terms, web) = (Arc::new(terms), "web".parse().unwrap());
    store.save_counters([(prefix, Arc::clone(&terms), counters)].into_iter(), [(&web, &counters)].into_iter()).unwrap();
    let KeptCounters { rules, services } = store.counters();
    assert_eq!((rules, services), (vec![(prefix, terms, counters)], vec![(web, counters)]));
    store.save_counters(std::iter::empty(), std::iter::empty()).unwrap();
    assert!(store.counters().rules.is_empty());
}

#[test]
fn registered_sockets_are_those_of_this_boot() {
    let directory = tempfile::tempdir().unwrap();
    let (store, _) = Store::open(directory.path()).unwrap();
    assert!(store.registered("a").is_empty());
    let (service, local) = ("web".parse().unwrap(), "127.0.0.1:80".parse().unwrap());
    let socket = KeptSocket { service, places: vec![0, 2], cookie: 7, inode: 8, local, pid: 9 };
    store.save_registered("a", vec![socket.clone()]).unwrap();
    assert_eq!(store.registered("a"), [socket]);
    assert!(store.registered("b").is_empty());
    fs::write(directory.path().join(super::REGISTERED), "{").unwrap();
    assert!(store.registered("a").is_empty());
}

#[test]
fn never_drops_what_it_can_not_read() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join(super::FILE);
    for (text, why) in [
        ("", "EOF"),
        ("{\"version\": 1, \"services\": [], \"rul", "EOF"),
        ("{\"version\": 2, \"services\": [], \"rules\": []}", "its version is 2"),
        ("{\"version\": 1, \"services\": [], \"rules\": [], \"x\": 1}", "unknown field"),
    ] {
        fs::write(&file, text).unwrap();
        let error = format!("{:#}", Store::open(directory.path()).unwrap_err());
        assert!(error.contains(why) && error.contains("mv "), "{error}");
        assert_eq!(fs::read_to_string(&file).unwrap(), text);
    }
}

/// A state with rules of both kinds, and what it is saved with.
fn state(numbers: std::ops::Range<u8>) -> (State, String) {
    let mut state = State::default();
    let mut lines = String::new();
    for number in numbers {
        for (origin, block) in [(Origin::Added, "192.0.2"), (Origin::Applied, "198.51.100")] {
            let rule = format!(r#"{{"prefix": "{block}.{number}/32", "except": "22"}}"#);
            let rule = serde_json::from_str::<RuleText>(&rule).unwrap().into_rule(origin);
            if origin == Origin::Applied {
                writeln!(lines, "{}", RuleLine(&rule.prefix, &rule.terms)).unwrap();
                state.applied_rules.push(rule);
            } else {
                state.rules.push(rule);
            }
        }
    }
    (state, lines)
}

/// Whatever a disk or a person does to a file is noticed, or makes no difference.
#[test]
fn spoilt_files_are_told() {
    let directory = tempfile::tempdir().unwrap();
    let (mut store, _) = Store::open(directory.path()).unwrap();
    let (state, lines) = state(0..4);
    store.save(&state, Some(&lines)).unwrap();
    let (fleet, text) = fleet(3);
    store.save_fleet(&fleet.state, Some(&text)).unwrap();
    let state = State { fleet: Some(fleet), ..state };
    for name in [super::FILE, "applied-1.rules", "fleet.json", "fleet-1.set"] {
        let path = directory.path().join(name);
        let whole = fs::read(&path).unwrap();
        let expect_error_or_same = |text: &[u8], what: &str| {
            fs::write(&path, text).unwrap();
            match Store::look(directory.path()) {
                Ok(read) => assert_eq!(read, state, "{name}, {what}"),
                Err(error) => assert!(format!("{error:#}").contains("mv "), "{name}, {what}: {error:#}"),
            }
        };
        for len in 0..whole.len() {
            expect_error_or_same(&whole[..len], &format!("cut at {len}"));
        }
        for at in 0..whole.len() {
            let mut text = whole.clone();
            text[at] ^= 1;
            expect_error_or_same(&text, &format!("spoilt at {at}"));
        }
        fs::remove_file(&path).unwrap();
        assert_eq!(
            Store::look(directory.path()).is_ok(),
            [super::FILE, "fleet.json"].contains(&name),
            "without {name}"
        );
        fs::write(&path, &whole).unwrap();
    }
    // Who repairs it by hand takes the checksum out.
    let path = directory.path().join(super::FILE);
    let text = fs::read_to_string(&path).unwrap().replace("192.0.2.3/32", "192.0.2.77/32");
    fs::write(&path, &text).unwrap();
    assert!(format!("{:#}", Store::look(directory.path()).unwrap_err()).contains("by its checksum"));
    let without = |line: &&str| !line.contains("\"checksum\"");
    let text: Vec<_> = text.lines().filter(without).collect();
    fs::write(&path, text.join("\n").replace("\",\n}", "\"\n}")).unwrap();
    assert_eq!(Store::look(directory.path()).unwrap().rules.len(), 4);
}

/// Of each moment at which the power may fail, and of each disk that may be found then, comes the state before or the
/// new one; once a save has returned, the new one.
#[test]
fn power_may_fail_at_any_moment() {
    let (previous, former_lines) = state(0..2);
    let (next, next_lines) = state(3..6);
    for (lines, what) in [(Some(next_lines.as_str()), "other rules"), (None, "the same rules"), (Some(""), "no rules")]
    {
        let simulated = Simulated::default();
        let (mut store, _) = Store::of(Box::new(simulated.clone())).unwrap();
        store.save(&state(0..1).0, Some(&state(0..1).1)).unwrap();
        store.save(&previous, Some(&former_lines)).unwrap();
        let next = State {
            applied_rules: match lines {
                None => previous.applied_rules.clone(),
                Some("") => Vec::new(),
                Some(_) => next.applied_rules.clone(),
            },
            ..next.clone()
        };
        simulated.record();
        store.save(&next, lines).unwrap();
        let disks = simulated.recorded();
        assert!(disks.len() > 300, "{what}: {} disks", disks.len());
        let mut seen = [0, 0];
        for disk in disks {
            let (_, read) = Store::of(Box::new(Simulated::with(&disk)))
                .unwrap_or_else(|error| panic!("{what}: {error:#}\n{disk:?}"));
            assert!([&previous, &next].contains(&&read), "{what}: a mixture: {read:?}\n{disk:?}");
            seen[usize::from(read == next)] += 1;
        }
        assert!(seen.iter().all(|times| *times > 1), "{what}: {seen:?}");
        for disk in simulated.disks() {
            assert_eq!(Store::of(Box::new(Simulated::with(&disk))).unwrap().1, next, "{what}: after the end");
        }
    }
}

/// What a fleet gave, and the text of its set.
fn fleet(sequence: u8) -> (KeptFleet, String) {
    let rules = format!("[[rule]]\nprefix = \"203.0.113.{sequence}/32\"\nservice = \"edge\"\n");
    let text = format!("[[service]]\nname = \"edge\"\nhandler = \"echo\"\n{rules}");
    let state = FleetState {
        ring: "main".into(),
        sequence: sequence.into(),
        set: Some(format!("{sequence:064}")),
        since: Some("2026-01-31T23:59:59Z".into()),
        seen: sequence.into(),
        seen_set: None,
        key: None,
    };
    let service = serde_json::from_str(r#"{"name": "edge", "handler": "echo"}"#).unwrap();
    let rule = format!(r#"{{"prefix": "203.0.113.{sequence}/32", "service": "edge"}}"#);
    let rule = serde_json::from_str::<RuleText>(&rule).unwrap().into_rule(Origin::Fleet);
    (KeptFleet { state, services: vec![service], rules: vec![rule] }, text)
}

#[test]
fn keeps_what_the_fleet_gave() {
    let directory = tempfile::tempdir().unwrap();
    let read = || Store::open(directory.path()).unwrap();
    let (mut store, state) = read();
    assert_eq!(state.fleet, None);
    let nothing_yet = FleetState { ring: "main".into(), seen: 1, ..FleetState::default() };
    store.save_fleet(&nothing_yet, None).unwrap();
    assert_eq!(read().1.fleet.unwrap(), KeptFleet { state: nothing_yet, ..KeptFleet::default() });
    for sequence in 1..4 {
        let (mut fleet, text) = fleet(sequence);
        store.save_fleet(&fleet.state, Some(&text)).unwrap();
        assert_eq!(read().1.fleet.as_ref(), Some(&fleet));
        // The set stays while more is seen, also of a daemon that has just begun.
        store = read().0;
        fleet.state.seen += 1;
        store.save_fleet(&fleet.state, None).unwrap();
        assert_eq!(read().1.fleet, Some(fleet));
    }
    // The state, the previous one, and the set that both name; nothing of the sets before.
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 3);
    // The rest is saved apart from it, and both are there.
    store.save(&state, None).unwrap();
    assert_eq!(read().1.fleet.unwrap().state.sequence, 3);
}

/// As above, of what the fleet gave.
#[test]
fn power_may_fail_while_a_set_is_kept() {
    let (previous, former_text) = fleet(1);
    let (next, next_text) = fleet(2);
    let seen = KeptFleet { state: FleetState { seen: 7, ..previous.state.clone() }, ..previous.clone() };
    for (next, text) in [(next, Some(next_text.as_str())), (seen, None)] {
        let simulated = Simulated::default();
        let (mut store, _) = Store::of(Box::new(simulated.clone())).unwrap();
        store.save_fleet(&fleet(0).0.state, Some(&fleet(0).1)).unwrap();
        store.save_fleet(&previous.state, Some(&former_text)).unwrap();
        simulated.record();
        store.save_fleet(&next.state, text).unwrap();
        let disks = simulated.recorded();
        let mut times_read = [0, 0];
        for disk in disks {
            let read = Store::of(Box::new(Simulated::with(&disk))).unwrap().1.fleet.unwrap();
            assert!([&previous, &next].contains(&&read), "a mixture: {read:?}\n{disk:?}");
            times_read[usize::from(read == next)] += 1;
        }
        assert!(times_read.iter().all(|times| *times > 1), "{times_read:?}");
    }
}
