//! Lists of prefixes as others publish them.

use std::{
    io::Write as _,
    process::{Command, Stdio},
};

use anyport_tests::{host::Outcome, prerequisites::scratch};
use libtest_mimic::Trial;

use crate::{
    cases::{Lab, trial},
    control::contains,
};

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial("published::lists of all kinds", kinds),
        trial("published::a list on standard input", piped),
        trial("published::what can't be read has a place, stays short and changes nothing", wrong),
    ]
}

fn kinds() {
    let lab = Lab::new("sk-lookup");
    let files = scratch();
    let rules = || {
        let mut rules: Vec<String> = lab.daemon.rules();
        rules.sort();
        rules.join("\n")
    };
    let apply = |name: &str, content: &[u8], options: &str| {
        let file = files.path().join(name);
        std::fs::write(&file, content).expect("a list");
        lab.daemon.ok(&format!("apply {} {options}", file.display()))
    };
    apply("lines", b"192.0.2.0/25\n192.0.2.128/25\n", "");
    let wanted = rules();
    let zip = |text: &[u8]| {
        let mut gzip = Command::new("gzip").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("gzip");
        gzip.stdin.take().expect("its input").write_all(text).expect("a list to compress");
        gzip.wait_with_output().expect("its output").stdout
    };
    let ipset: &[u8] = b"create x hash:net family inet\nadd x 192.0.2.0/25\nadd x 192.0.2.128/25 timeout 0\n";
    let cloud: &[u8] =
        br#"{"prefixes": [{"ip_prefix": "192.0.2.0/25", "region": "a"}, {"ip_prefix": "192.0.2.128/25", "region": "a"},
        {"ip_prefix": "203.0.113.128/25", "region": "b"}]}"#;
    for (name, content, options, said) in [
        ("ranges", &b"192.0.2.0 - 192.0.2.127\n192.0.2.128-192.0.2.255\n"[..], "", ""),
        ("masks", b"\xef\xbb\xbf192.0.2.0 255.255.255.128\r\n192.0.2.128 255.255.255.128\r\n", "", ""),
        ("drop", b"; Spamhaus DROP List\n192.0.2.0/25 ; SBL1\n192.0.2.128/25 ; SBL2\n", "", ""),
        ("ipset", ipset, "", "was read as what ipset save writes, with 2 prefixes"),
        ("ipset.gz", &zip(ipset), "", "was read as what ipset save writes"),
        (
            "nft",
            b"table ip t {\n set s {\n  elements = { 192.0.2.0/25,\n   192.0.2.128/25 }\n }\n}\n",
            "",
            "a set of nft",
        ),
        (
            "routes",
            b"default via 198.51.100.1\n192.0.2.0/25 dev x\nblackhole 192.0.2.128/25\n",
            "",
            "1 routes were left out",
        ),
        ("json", br#"["192.0.2.0/25", "192.0.2.128/25"]"#, "", "was read as JSON"),
        ("cloud", cloud, "--select region=a", "was read as JSON, with 2 prefixes"),
    ] {
        apply("none", b"198.51.100.128/25\n", "");
        let out = apply(name, content, options);
        contains(&out, &[said]);
        assert_eq!(rules(), wanted, "{name}: {out}");
    }
}

/// On standard input.
fn piped() {
    let lab = Lab::new("sk-lookup");
    let add = |list: &str| {
        let mut command = lab.daemon.ctl_command(&[], &["add-prefix", "-", "203.0.113.128/25", "--protocol", "both"]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut process = lab.topology.host.spawn(command);
        process.stdin.take().expect("its input").write_all(list.as_bytes()).expect("a list");
        Outcome::from(process.wait_with_output().expect("its output"))
    };
    let outcome = add("add x 192.0.2.0/25\nadd x 192.0.2.200\n");
    assert_eq!(outcome.status, 0, "{outcome}");
    contains(&outcome.stdout, &["192.0.2.0/25", "203.0.113.128/25"]);
    assert_eq!(lab.daemon.rules().len(), 3);
    let outcome = add("198.51.100.128/25 tcp 80\n");
    assert_eq!(outcome.status, 2, "{outcome}");
    contains(&outcome.stderr, &["-: line 1, column 1", "anyportctl apply"]);
    assert_eq!(lab.daemon.rules().len(), 3);
}

fn wrong() {
    let lab = Lab::new("sk-lookup");
    let files = scratch();
    lab.daemon.ok("add-prefix 192.0.2.0/24");
    let long = "x".repeat(500_000);
    for (content, options, words) in [
        ("192.0.2.0/25\n192.0.2.9 - 192.0.2.1\n".to_owned(), "", &["line 2, column 1", "ends before it begins"][..]),
        ("fe80::1%eth0\n".to_owned(), "", &["line 1, column 1", "leave the zone"]),
        (format!("192.0.2.0/25\n{long}-{long}\n"), "", &["line 2, column 1", "more bytes"]),
        (format!("[\"{long}"), "", &["line 1", "EOF"]),
        ("add x 192.0.2.0/25 nomatch\n".to_owned(), "", &["line 1, column 7", "--except"]),
        ("{\"a\": [1]}".to_owned(), "", &["no prefixes in it"]),
        ("192.0.2.0/25\n".to_owned(), "--format json", &["line 1"]),
        ("192.0.2.0/25\n".to_owned(), "--select a", &["KEY=VALUE"]),
    ] {
        let file = files.path().join("list");
        std::fs::write(&file, &content).expect("a list");
        let file = file.display().to_string();
        let arguments: Vec<&str> = ["apply", &file].into_iter().chain(options.split_whitespace()).collect();
        let outcome: Outcome = lab.daemon.ctl(&arguments);
        assert_eq!(outcome.status, 2, "{outcome}");
        contains(&outcome.stderr, words);
        assert!(outcome.stderr.len() < 1_500, "{} bytes", outcome.stderr.len());
    }
    assert_eq!(lab.daemon.rules().len(), 1);
}
