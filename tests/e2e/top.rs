//! `anyportctl top`: rates in a terminal, and elsewhere.

use std::{
    io::{ErrorKind, Read as _, Write as _},
    process::{Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc::{Receiver, channel},
    },
    thread::{sleep, spawn},
    time::Duration,
};

use anyport_tests::{
    dial::{expect_tcp_hello, udp},
    host::wait_for,
    prerequisites::program,
};
use libtest_mimic::Trial;
use serde_json::Value;

use crate::cases::{Lab, at, on_each_back_end, trial};

pub(crate) fn trials() -> Vec<Trial> {
    let mut trials = vec![
        trial("top::a terminal is drawn on and left as it was", terminal),
        trial("top::a larger or smaller screen is drawn anew", resized),
        trial("top::what can't be is said", wrong),
    ];
    trials.extend(on_each_back_end("top::tables and lines tell rates", printed));
    trials
}

fn printed(backend: &'static str) {
    let lab = Lab::new(backend);
    lab.daemon.ok("add-prefix 192.0.2.0/25 2001:db8:a::/64");
    lab.daemon.ok("add-prefix 192.0.2.128/25 --protocol udp");
    let client = lab.topology.client.clone();
    let is_over = Arc::new(AtomicBool::new(false));
    let stop = Arc::clone(&is_over);
    // Two connections for each datagram, as fast as it goes. Contents differ: one of very many that are the same is not answered.
    let dialling = spawn(move || {
        client.enter(|| {
            for number in 0_u64.. {
                if stop.load(Ordering::Relaxed) {
                    break;
                }
                expect_tcp_hello(at("192.0.2.1", 80));
                expect_tcp_hello(at("192.0.2.2", 80));
                udp(at("192.0.2.200", 53), &number.to_be_bytes()).expect("an answer");
            }
        });
    });
    let table = lab.daemon.ok("top --once --interval 2s");
    assert!(!table.contains('\x1b') && table.contains("rates over "), "{table}");
    let row = |table: &str, name: &str| -> Vec<String> {
        let line = table.lines().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("no {name} in {table}"));
        line.split_whitespace().map(str::to_owned).collect()
    };
    let prefixes: Vec<_> = table.lines().skip_while(|line| !line.starts_with("PREFIX")).skip(1).collect();
    assert!(prefixes.len() == 3 && prefixes[0].starts_with("192.0.2.0/25"), "{table}");
    assert_ne!(row(&table, "default")[8], "0", "connections: {table}");
    assert_eq!(row(&table, "2001:db8:a::/64")[3], "0", "{table}");
    let sorted = lab.daemon.ok("top --count 1 --interval 1s --sort name");
    let names: Vec<_> = sorted.lines().skip_while(|line| !line.starts_with("PREFIX")).skip(1).collect();
    assert!(names[1].starts_with("192.0.2.128/25"), "{sorted}");
    // A sample is good for as long as 20 times what it took, so on a busy machine two looks may see the same one.
    let (lines, views) = wait_for("two samples", Duration::from_secs(40), || {
        let lines = lab.daemon.ok("top --json --count 2 --interval 2s");
        let views: Vec<Value> =
            lines.lines().map(|line| serde_json::from_str(line).expect("an object a line")).collect();
        assert_eq!(views.len(), 2, "{lines}");
        if views[0]["prefixes"] == views[1]["prefixes"] { Err(lines) } else { Ok((lines, views)) }
    });
    is_over.store(true, Ordering::Relaxed);
    dialling.join().expect("a client");
    let rate = |view: &Value, prefix: &str| {
        let rows = view["prefixes"].as_array().expect("prefixes");
        let row = rows.iter().find(|row| row["prefix"] == prefix).expect("its row");
        (row["rates"]["steered"].as_f64().expect("a rate"), row["counts"]["steered"].as_f64().expect("a count"))
    };
    for prefix in ["192.0.2.0/25", "192.0.2.128/25"] {
        let [(_, before), (rate, now)] = [&views[0], &views[1]].map(|view| rate(view, prefix));
        let window = views[1]["window"].as_f64().expect("a time");
        assert!(
            (rate * window - (now - before)).abs() <= 0.01 * window + 0.01,
            "{rate} over {window} s: {before}, {now}"
        );
        assert!(rate > 0.0, "{lines}");
    }
    let service = &views[1]["services"][0]["rates"];
    let of_service = service["steered"].as_f64().expect("a rate");
    let of_prefixes = rate(&views[1], "192.0.2.0/25").0 + rate(&views[1], "192.0.2.128/25").0;
    assert!((of_service - of_prefixes).abs() < 0.01, "{lines}");
    assert!(service["accepted"].as_f64() > service["datagrams"].as_f64(), "{lines}");
}

fn wrong() {
    let mut lab = Lab::new("sk-lookup");
    assert!(lab.daemon.refused("top --interval 100ms", 2).contains("once a second"));
    lab.daemon.refused("top --count 0", 2);
    lab.daemon.refused("top --once --count 2", 2);
    lab.daemon.refused("top --sort colour", 2);
    lab.daemon.stop();
    assert!(lab.daemon.refused("top --once", 3).contains("no anyportd answers"));
}

/// Runs a line of shell in a terminal of its own, to which is typed what `typed` tells; all that it shows.
pub(crate) fn in_terminal(line: &str, typed: Receiver<&'static str>) -> String {
    let mut command = Command::new("script");
    command.args(["--quiet", "--return", "--command", line, "/dev/null"]).env("SHELL", "/bin/sh");
    let mut process = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("script of util-linux");
    let mut keyboard = process.stdin.take().expect("its input");
    spawn(move || {
        for keys in typed {
            match keyboard.write_all(keys.as_bytes()) {
                // The program ended by itself.
                Err(error) if error.kind() == ErrorKind::BrokenPipe => break,
                typed => typed.expect("typing"),
            }
        }
    });
    let mut shown = String::new();
    process.stdout.take().expect("its output").read_to_string(&mut shown).expect("what is shown");
    let status = process.wait().expect("its end");
    assert!(status.success(), "{status}: {shown}");
    shown
}

/// The command line of `top`.
pub(crate) fn top(lab: &Lab, options: &str) -> String {
    let client = program("anyportctl").unwrap_or_else(|missing| panic!("{missing}"));
    format!("{} --socket {} top {options}", client.display(), lab.daemon.socket().display())
}

/// The screens that were drawn one after the other, in lines that begin and end with what orders their colour.
pub(crate) fn frames(shown: &str) -> Vec<Vec<String>> {
    let lines = |frame: &str| {
        let text = frame.split("\x1b[J").next().unwrap_or_default().replace("\x1b[K", "");
        text.lines().map(|line| line.trim_end().to_owned()).collect()
    };
    shown.split("\x1b[H").skip(1).map(lines).collect()
}

/// Types this after a while.
pub(crate) fn after(delay: Duration, keys: &'static str) -> Receiver<&'static str> {
    let (sender, receiver) = channel();
    spawn(move || {
        sleep(delay);
        // It stays open, unless the program ended by itself.
        if sender.send(keys).is_ok() {
            sleep(Duration::from_secs(5));
        }
    });
    receiver
}

fn terminal() {
    let lab = Lab::new("sk-lookup");
    lab.daemon.ok("add-prefix 192.0.2.0/24");
    for keys in ["q", "\x03"] {
        // What the terminal is like is shown before and after.
        let line = format!("trap : INT; stty -a; {}; stty -a", top(&lab, "--interval 1s"));
        let shown = in_terminal(&line, after(Duration::from_secs(3), keys));
        let (before, rest) = shown.split_once("\x1b[?1049h").unwrap_or_else(|| panic!("nothing is drawn: {shown:?}"));
        let (drawn, after) = rest.rsplit_once("\x1b[?1049l").unwrap_or_else(|| panic!("not put back: {shown:?}"));
        assert_eq!(before.trim(), after.trim(), "the terminal is as it was");
        assert!(drawn.contains("192.0.2.0/24"), "{drawn:?}");
        assert!(drawn.matches("\x1b[H").count() >= 2, "drawn again: {drawn:?}");
    }
    // It ends by itself.
    let shown = in_terminal(&top(&lab, "--interval 1s --count 2"), after(Duration::from_secs(30), "q"));
    assert!(shown.contains("\x1b[?1049l"), "{shown:?}");
}

fn resized() {
    let lab = Lab::new("sk-lookup");
    for number in 0..30 {
        lab.daemon.ok(&format!("add-prefix 192.0.2.{number}"));
    }
    // Long before the next look.
    let line =
        format!("stty rows 40 cols 132; (sleep 2; stty rows 12 cols 30 < /dev/tty) & {}", top(&lab, "--interval 1h"));
    let shown = in_terminal(&line, after(Duration::from_secs(4), "q"));
    let frames = frames(&shown);
    assert!(frames.len() >= 2, "{shown:?}");
    let lines = |frame: &[String]| -> Vec<String> {
        let plain = |line: &String| {
            ["\x1b[1m", "\x1b[2m", "\x1b[0m"].iter().fold(line.clone(), |it, tone| it.replace(tone, ""))
        };
        frame.iter().map(plain).collect()
    };
    let (first, last) = (lines(&frames[0]), lines(&frames[frames.len() - 1]));
    assert!(first.iter().any(|line| line.contains("192.0.2.25/32")) && first.iter().any(|line| line.len() > 60));
    assert!(last.len() <= 12 && last.iter().all(|line| line.len() <= 30), "{last:?}");
    assert!(last.iter().any(|line| line.starts_with("and 28 more")), "{last:?}");
    assert!(last.last().is_some_and(|line| line.starts_with("q end")), "{last:?}");
}
