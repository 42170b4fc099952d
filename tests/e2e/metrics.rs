//! Metrics, health, the page, and `top`.

use std::{
    collections::BTreeSet,
    fs,
    io::{ErrorKind, Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::unix::fs::chown,
    thread::sleep,
    time::{Duration, Instant},
};

use anyport::observe::all_metrics;
use anyport_tests::{
    daemon::Setup,
    dial::{expect_tcp_echo, expect_tcp_hello, expect_udp_hello, tcp, tcp_text},
    exposition::Scrape,
    host::wait_for,
    owners::Owner,
    prerequisites::{GROUP, USER, program, scratch},
    topology::Topology,
};
use libtest_mimic::Trial;
use nix::sys::signal::{Signal, kill};
use serde_json::Value;

use crate::cases::{Lab, at, on_each_back_end, trial};

/// Where metrics are served in these tests.
const ADDRESS: &str = "127.0.0.1:9464";

pub(crate) fn trials() -> Vec<Trial> {
    let mut trials = vec![
        trial("metrics::dashboard and alerts speak of what there is", documents),
        trial("metrics::many rules cost no more than they may", many),
        trial("metrics::readiness has reasons", readiness),
        trial("metrics::what no longer steers is not ready", detached),
        trial("metrics::what was put back is counted", repaired),
        trial("metrics::what drops all packets is not well", dropping),
        trial("metrics::nobody but readers is answered, and nobody waits for slow ones", clients),
        trial("metrics::the page runs nothing but its own", page),
        trial("metrics::an address that is taken is waited for at the first start", taken),
        trial("metrics::an address that is taken later is waited for", taken_later),
        trial("metrics::a rule that takes their address is told", shadowed),
    ];
    trials.extend(on_each_back_end("metrics::they tell what has happened", counted));
    trials.extend(on_each_back_end("metrics::no counter falls, whatever goes", unfallen));
    trials.extend(on_each_back_end("metrics::a successor goes on with them", succeeded));
    trials
}

fn lab(backend: &str) -> Lab {
    Lab::with(backend, |setup| setup.args(["--metrics", ADDRESS]))
}

fn address() -> SocketAddr {
    ADDRESS.parse().expect("an address")
}

/// The status, the head and the body of what is answered to `request`.
fn exchange(lab: &Lab, request: &str) -> (u16, String, String) {
    let answer = lab.topology.host.enter(|| {
        let mut stream = TcpStream::connect(address()).expect("a connection");
        stream.set_read_timeout(Some(Duration::from_secs(20))).expect("a time limit");
        stream.write_all(request.as_bytes()).expect("sending");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("an answer");
        answer
    });
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no HTTP: {answer:?}"));
    let status = head.split(' ').nth(1).and_then(|code| code.parse().ok()).expect("a status");
    (status, head.to_ascii_lowercase(), body.to_owned())
}

fn get(lab: &Lab, path: &str) -> (u16, String, String) {
    exchange(lab, &format!("GET {path} HTTP/1.1\r\nHost: {ADDRESS}\r\n\r\n"))
}

fn scrape(lab: &Lab) -> Scrape {
    let (status, head, body) = get(lab, "/metrics");
    assert_eq!(status, 200, "{head}\n{body}");
    assert!(head.contains("content-type: text/plain; version=0.0.4; charset=utf-8"), "{head}");
    Scrape::parse(&body)
}

/// Waits until the values are there.
fn wait_for_values(lab: &Lab, expected: &[(&str, f64)]) -> Scrape {
    wait_for("metrics", Duration::from_secs(10), || {
        let scrape = scrape(lab);
        let wrong: Vec<_> = expected.iter().filter(|(series, value)| scrape.get(series) != Some(*value)).collect();
        let found: Vec<_> = wrong.iter().map(|(series, _)| scrape.get(series)).collect();
        if wrong.is_empty() { Ok(scrape) } else { Err(format!("{wrong:?}, but {found:?}")) }
    })
}

/// What was counted, to be compared with what comes later.
struct Counts {
    scrape: Scrape,
    totals: Value,
}

impl Counts {
    /// Those of the rules that are active now.
    fn of(lab: &Lab) -> Self {
        let status = lab.daemon.json("status");
        let generation = status["generation"].as_f64();
        let scrape = wait_for("a sample of these rules", Duration::from_secs(10), || {
            let scrape = scrape(lab);
            let found = scrape.get("anyport_generation");
            if found >= generation { Ok(scrape) } else { Err(format!("generation {found:?}, not {generation:?}")) }
        });
        Self { scrape, totals: status["totals"].clone() }
    }

    /// No series falls that is still there, and no total falls at all.
    fn expect_no_fall(&self, before: &Self, why: &str) {
        for (series, count) in before.scrape.rising() {
            let now = self.scrape.get(series).unwrap_or(count);
            assert!(now >= count, "{why}: {series} falls from {count} to {now}");
        }
        for (name, count) in before.totals.as_object().expect("totals").iter().filter(|(name, _)| *name != "active") {
            let now = &self.totals[name];
            assert!(now.as_u64() >= count.as_u64(), "{why}: {name} falls from {count} to {now}");
        }
    }
}

/// Rules are removed, replaced and moved to another service, and services are replaced, removed and opened again.
fn unfallen(backend: &'static str) {
    let mut lab = lab(backend);
    let directory = scratch();
    let apply = |name: &str, service: &str, banner: &str, ports: &str| {
        let text = format!(
            "[[service]]\nname = \"web\"\nhandler = \"discard\"\nbanner = \"{banner}\"\n\
             [[rule]]\nprefix = \"203.0.113.128/25\"\nports = \"{ports}\"\nservice = \"{service}\"\n"
        );
        let file = directory.path().join(name);
        fs::write(&file, text).expect("writing the rules");
        format!("apply --force {}", file.display())
    };
    lab.daemon.ok("add-prefix 192.0.2.0/24 --ports 80");
    lab.daemon.ok("add-prefix 192.0.2.0/24 --ports 443");
    lab.daemon.ok("add-prefix 192.0.2.128/25 2001:db8:a::/64 --protocol both");
    lab.daemon.ok(&apply("first", "web", "one", "80,443"));
    // So many of one kind that tproxy has a set of them.
    let many = (190..210).map(|number| format!(" 203.0.113.{number}")).collect::<Vec<_>>().concat();
    let commands = [
        format!("add-prefix {many} --protocol both"),
        "remove-prefix 203.0.113.200".to_owned(),
        format!("remove-prefix {}", many.replace(" 203.0.113.200", "")),
        "remove-prefix 192.0.2.0/24 --ports 443".to_owned(),
        "add-prefix 192.0.2.0/24 --ports 443".to_owned(),
        "remove-prefix 192.0.2.0/24".to_owned(),
        "remove-prefix 192.0.2.128/25".to_owned(),
        apply("ports", "web", "one", "1-1000"),
        apply("settings", "web", "two", "1-1000"),
        apply("moved", "default", "two", "1-1000"),
        format!("{} --confirm 1s", apply("unconfirmed", "web", "three", "1-1000")),
        "status".to_owned(),
        "remove-prefix 2001:db8:a::/64".to_owned(),
        "add-service late --handler discard".to_owned(),
        "remove-service late".to_owned(),
    ];
    for command in &commands {
        lab.topology.client.enter(|| {
            for to in [at("192.0.2.7", 80), at("192.0.2.7", 443), at("203.0.113.200", 80), at("2001:db8:a::7", 53)] {
                drop(tcp(to));
            }
            let socket = UdpSocket::bind("0.0.0.0:0").expect("a UDP socket");
            socket.send_to(b"?", at("192.0.2.200", 53)).expect("sending");
        });
        // The next sample has these.
        sleep(Duration::from_secs(1));
        let before = Counts::of(&lab);
        if command == "status" {
            // What was not confirmed is taken back.
            wait_for("the rules before", Duration::from_secs(10), || {
                let status = lab.daemon.json("status");
                if status["unconfirmed"].is_null() { Ok(()) } else { Err(status.to_string()) }
            });
        } else {
            lab.daemon.ok(command);
        }
        Counts::of(&lab).expect_no_fall(&before, command);
    }
    let before = Counts::of(&lab);
    let steered = |counts: &Counts| counts.totals["steered"].as_u64();
    assert!(steered(&before) > Some(20), "{:?}", before.totals);
    // Also what rules counted that are gone is there after a restart.
    lab.daemon.stop();
    lab.daemon.restart();
    let after = Counts::of(&lab);
    assert!(steered(&after) >= steered(&before), "{:?}, and after a restart {:?}", before.totals, after.totals);
}

fn counted(backend: &'static str) {
    let lab = lab(backend);
    let client = &lab.topology.client;
    lab.daemon.ok("add-service echo --handler echo");
    lab.daemon.ok("add-service gone --handler registered");
    lab.daemon.ok("add-prefix 192.0.2.0/24 2001:db8:a::/48 --protocol both");
    lab.daemon.ok("add-prefix 192.0.2.128/25 --service echo");
    lab.daemon.ok("add-prefix 203.0.113.128/25 --service gone");
    client.enter(|| {
        for port in 1..=7 {
            expect_tcp_hello(at("192.0.2.7", port));
        }
        expect_tcp_hello(at("2001:db8:a::7", 80));
        expect_udp_hello(at("192.0.2.9", 53));
        expect_tcp_echo(tcp(at("192.0.2.200", 80)).expect("a connection"), &vec![7; 3_000_000]);
        tcp(at("203.0.113.200", 80)).expect_err("nobody is there");
    });
    let _open = client.enter(|| tcp(at("192.0.2.201", 80)).expect("a connection"));
    let scrape = wait_for_values(
        &lab,
        &[
            ("anyport_service_connections_accepted_total{service=\"default\"}", 8.0),
            ("anyport_service_connections_active{service=\"default\"}", 0.0),
            ("anyport_service_connections_active{service=\"echo\"}", 1.0),
            ("anyport_service_connection_duration_seconds_count{service=\"default\"}", 8.0),
            ("anyport_service_connection_duration_seconds_count{service=\"echo\"}", 1.0),
            ("anyport_service_datagrams_total{service=\"default\"}", 1.0),
            ("anyport_service_datagrams_answered_total{service=\"default\"}", 1.0),
            ("anyport_service_received_bytes_total{service=\"echo\"}", 3e6),
            ("anyport_service_sent_bytes_total{service=\"echo\"}", 3e6),
            ("anyport_service_steered_packets_total{service=\"default\"}", 9.0),
            ("anyport_service_steered_packets_total{service=\"echo\"}", 2.0),
            (
                "anyport_prefix_steered_packets_total{prefix=\"192.0.2.0/24\",protocol=\"both\",service=\"default\"}",
                8.0,
            ),
            ("anyport_prefix_steered_packets_total{prefix=\"192.0.2.128/25\",protocol=\"tcp\",service=\"echo\"}", 2.0),
            ("anyport_prefixes", 4.0),
            ("anyport_prefixes_omitted", 0.0),
            ("anyport_rules", 4.0),
            ("anyport_services", 3.0),
            ("anyport_ready", 1.0),
            ("anyport_server_starts_total", 1.0),
            ("anyport_server_crashes_total", 0.0),
        ],
    );
    let no_socket = "anyport_service_dropped_packets_total{service=\"gone\",reason=\"no_socket\"}";
    assert!(scrape.get(no_socket) >= Some(1.0), "{no_socket}");
    assert_eq!(scrape.get("anyport_degraded"), Some(1.0), "gone has no socket");
    assert_eq!(scrape.get(&format!("anyport_back_end_info{{back_end=\"{backend}\"}}")), Some(1.0));
    // Few come, so each is asked about, but for those that came in the same moment; those stand for one another.
    let waits = scrape.get("anyport_service_accept_wait_seconds_count{service=\"default\"}");
    assert!((4.0..=8.0).contains(&waits.expect("a histogram")), "{waits:?}");
    assert!(scrape.get("process_open_fds") > Some(10.0) && scrape.get("process_resident_memory_bytes") > Some(1e6));
    let told: BTreeSet<_> = scrape.families().collect();
    let known: BTreeSet<_> = all_metrics().map(|metric| (metric.name, metric.kind.as_str())).collect();
    assert_eq!(told, known, "every metric is there, and no other");
}

fn many() {
    const RULES: u32 = 20_000;
    let lab = lab("sk-lookup");
    let rules: Vec<String> = (0..RULES).map(|at| format!("2001:db8:b::{at:x}")).collect();
    let directory = scratch();
    let file = directory.path().join("rules");
    fs::write(&file, rules.join("\n")).expect("a file of rules");
    lab.daemon.ok(&format!("apply {}", file.display()));
    // The last one in order of precedence.
    lab.topology.client.enter(|| expect_tcp_hello(at("2001:db8:b::4e1f", 80)));
    let last =
        "anyport_prefix_steered_packets_total{prefix=\"2001:db8:b::4e1f/128\",protocol=\"tcp\",service=\"default\"}";
    let scrape = wait_for_values(&lab, &[("anyport_prefixes", RULES.into()), (last, 1.0)]);
    assert_eq!(scrape.get("anyport_prefixes_omitted"), Some(f64::from(RULES) - 100.0));
    let rows = scrape.series().filter(|(series, _)| series.starts_with("anyport_prefix_steered_packets_total{"));
    assert_eq!(rows.count(), 100);
    let (_, _, body) = get(&lab, "/metrics");
    assert!(body.len() < 64 << 10, "{} bytes", body.len());
    let live = live(&lab);
    assert_eq!(
        (live["prefixes"].as_array().map(Vec::len), live["prefixes_omitted"].as_u64()),
        (Some(100), Some(19_900))
    );
    // Numbers are read again no sooner than after twenty times what it takes.
    let took = scrape.get("anyport_sample_duration_seconds").expect("a duration");
    let begin = Instant::now();
    let fresh = wait_for("fresh numbers", Duration::from_secs(20), || {
        let later = self::scrape(&lab);
        let age = later.get("anyport_sample_age_seconds").expect("an age");
        if age < begin.elapsed().as_secs_f64() - 0.5 { Ok(begin.elapsed()) } else { Err(format!("{age} s old")) }
    });
    assert!(fresh.as_secs_f64() > (20.0 * took).min(0.9) - 0.5, "{fresh:?} after {took} s");
}

fn live(lab: &Lab) -> Value {
    let (status, head, body) = get(lab, "/live.json");
    assert!(status == 200 && head.contains("content-type: application/json"), "{head}");
    serde_json::from_str(&body).expect("JSON")
}

fn readiness() {
    let lab = lab("sk-lookup");
    let ready = |status: u16, reason: &str| wait_for_readiness(&lab, status, reason);
    ready(200, "ready");
    lab.daemon.ok("add-service gone --handler registered");
    lab.daemon.ok("add-service dead --handler forward --upstream 203.0.113.3:9 --health-check=interval=100ms,fall=1");
    ready(200, "ready");
    lab.daemon.ok("add-prefix 192.0.2.0/25 --service gone");
    ready(503, "service gone has no live socket");
    lab.daemon.ok("add-prefix 192.0.2.128/25 --service dead");
    ready(503, "service dead has no upstream that is up");
    assert_eq!(scrape(&lab).get("anyport_ready"), Some(0.0));
    lab.daemon.ok("add-prefix 203.0.113.128/25");
    ready(200, "ready");
    assert_eq!(get(&lab, "/healthz").0, 200);
    lab.daemon.pause();
    let silent = lab.topology.host.enter(|| {
        let mut stream = TcpStream::connect(address()).expect("the kernel accepts");
        stream.set_read_timeout(Some(Duration::from_millis(500))).expect("a time limit");
        stream.write_all(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n").expect("sending");
        stream.read(&mut [0; 100])
    });
    assert!(silent.is_err(), "a process that does not run answers nothing");
    lab.daemon.resume();
    assert_eq!(get(&lab, "/healthz").2, "ok\n");
    // A part of the node is not the node.
    lab.daemon.ok("drain 192.0.2.0/25 --wait 0s");
    wait_for_values(&lab, &[("anyport_ready", 1.0), ("anyport_node_drained", 0.0)]);
    lab.daemon.ok("drain --wait 0s");
    wait_for_values(&lab, &[("anyport_ready", 0.0), ("anyport_node_drained", 1.0)]);
    lab.daemon.ok("undrain");
    wait_for_values(&lab, &[("anyport_ready", 1.0), ("anyport_node_drained", 0.0)]);
}

/// Waits until `/readyz` answers so.
fn wait_for_readiness(lab: &Lab, status: u16, reason: &str) {
    wait_for("readiness", Duration::from_secs(20), || {
        let (answered, _, body) = get(lab, "/readyz");
        if answered == status && body.contains(reason) { Ok(()) } else { Err(format!("{answered}: {body}")) }
    });
}

fn detached() {
    let lab = Lab::with("sk-lookup", |setup| setup.args(["--metrics", ADDRESS, "--mend", "false"]));
    lab.daemon.ok("add-prefix 192.0.2.0/24");
    wait_for_readiness(&lab, 200, "ready");
    let pin = lab.daemon.bpffs().join("link-sk-lookup").display().to_string();
    lab.topology.host.run("bpftool", ["link", "detach", "pinned", &pin]);
    wait_for_readiness(&lab, 503, "the link of the sk_lookup program to the network namespace is gone");
    assert_eq!(scrape(&lab).get("anyport_repairs_total"), Some(0.0));
}

fn repaired() {
    let lab = lab("sk-lookup");
    lab.daemon.ok("add-prefix 192.0.2.0/24");
    wait_for_values(&lab, &[("anyport_repairs_total", 0.0)]);
    let pin = lab.daemon.bpffs().join("link-sk-lookup").display().to_string();
    lab.topology.host.run("bpftool", ["link", "detach", "pinned", &pin]);
    wait_for_values(&lab, &[("anyport_repairs_total", 1.0), ("anyport_ready", 1.0)]);
}

/// A registered socket that others take out of the kernel's map can't be put back without its owner.
fn dropping() {
    let lab = lab("sk-lookup");
    let owner = Owner::greeter(&lab.topology.host, "web", "127.0.0.1", 0);
    let register = format!("register web --pid {} --fd {}", owner.pid(), owner.descriptor());
    lab.daemon.ok("add-service web --handler registered");
    lab.daemon.ok(&register);
    lab.daemon.ok("add-prefix 192.0.2.0/24 --service web");
    let dial = || lab.topology.client.enter(|| tcp_text(at("192.0.2.3", 80)));
    assert_eq!(dial().expect("a greeting").split(' ').next(), Some("web"));
    wait_for_readiness(&lab, 200, "ready");
    let pins = lab.daemon.bpffs().display().to_string();
    let line = format!(
        "for place in $(seq 4 64); do bpftool map delete pinned {pins}/sockets key $place 0 0 0; done 2>/dev/null || true"
    );
    lab.topology.host.run("sh", ["-c", &line]);
    // What stands so far is looked at, and then what comes.
    sleep(Duration::from_secs(3));
    for _ in 0..10 {
        dial().expect_err("a connection without a socket");
    }
    wait_for_readiness(&lab, 503, "service web gets nothing: the last 10 packets");
    let status = lab.daemon.json("status")["degraded"].to_string();
    assert!(status.contains("(no_socket)"), "{status}");
    let doctor = lab.daemon.ctl(&["doctor"]);
    assert!(doctor.status == 1 && doctor.stdout.contains("service web gets nothing"), "{doctor}");
    // Its owner puts it back, and the next who comes is the proof.
    lab.daemon.ok(&register);
    assert_eq!(dial().expect("a greeting").split(' ').next(), Some("web"));
    wait_for_readiness(&lab, 200, "ready");
    assert_eq!(lab.daemon.json("status")["degraded"], serde_json::json!([]));
    // Drops that are meant are none of that.
    drop(owner);
    for _ in 0..20 {
        dial().expect_err("a connection without an owner");
    }
    sleep(Duration::from_secs(5));
    let status = lab.daemon.json("status")["degraded"].to_string();
    assert!(status.contains("no live socket") && !status.contains("gets nothing"), "{status}");
}

fn clients() {
    let lab = lab("sk-lookup");
    for (request, status) in [
        ("POST /metrics HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n", 405),
        ("DELETE / HTTP/1.1\r\nHost: localhost\r\n\r\n", 405),
        ("GET /other HTTP/1.1\r\nHost: localhost\r\n\r\n", 404),
        ("nonsense\r\n\r\n", 400),
        (&format!("GET / HTTP/1.1\r\nHost: localhost\r\nX: {}\r\n\r\n", "y".repeat(20_000)), 431),
    ] {
        let (answered, head, _) = exchange(&lab, request);
        assert_eq!(answered, status, "{request:.40}: {head}");
        assert!(status != 405 || head.contains("allow: get, head"), "{head}");
    }
    for path in ["/", "/metrics", "/live.json", "/history.json", "/healthz", "/readyz"] {
        let (status, head, body) = exchange(&lab, &format!("HEAD {path} HTTP/1.1\r\nHost: localhost\r\n\r\n"));
        assert!(status == 200 && body.is_empty() && head.contains("content-length: "), "{path}: {head}\n{body}");
    }
    // Those who ask slowly, or not at all.
    let begin = Instant::now();
    let mut slow: Vec<TcpStream> = lab.topology.host.enter(|| {
        let dial = |at: u8| {
            let mut stream = TcpStream::connect(address()).expect("a connection");
            if at.is_multiple_of(2) {
                stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: ").expect("sending");
            }
            stream
        };
        (0..100).map(dial).collect()
    });
    lab.daemon.ok("status");
    lab.daemon.ok("add-prefix 192.0.2.0/24");
    lab.topology.client.enter(|| expect_tcp_hello(at("192.0.2.1", 80)));
    assert!(begin.elapsed() < Duration::from_secs(4), "control and traffic do not wait: {:?}", begin.elapsed());
    assert_eq!(get(&lab, "/metrics").0, 200, "they are sent away before long");
    for stream in &mut slow {
        stream.set_read_timeout(Some(Duration::from_secs(20))).expect("a time limit");
        // Sent away with an answer, or without; with a reset where what it has said was not read.
        if let Err(error) = stream.read_to_end(&mut Vec::new()) {
            assert_eq!(error.kind(), ErrorKind::ConnectionReset, "its end");
        }
    }
}

fn page() {
    let lab = lab("sk-lookup");
    let (_, head, body) = get(&lab, "/");
    let nonce = |head: &str| {
        let policy = head.lines().find_map(|line| line.strip_prefix("content-security-policy: ")).expect("a policy");
        let (_, nonce) = policy.split_once("script-src 'nonce-").expect("a nonce");
        let nonce = nonce.split_once('\'').expect("its end").0.to_owned();
        let rest = policy.replace(&nonce, "N");
        assert_eq!(
            rest,
            "default-src 'none'; script-src 'nonce-n'; style-src 'nonce-n'; connect-src 'self'; base-uri 'none'; \
             form-action 'none'; frame-ancestors 'none'"
                .replace("nonce-n", "nonce-N")
        );
        nonce
    };
    let first = nonce(&head);
    assert!(first.len() == 32 && first != nonce(&get(&lab, "/").1), "a new one each time");
    assert!(head.contains("x-content-type-options: nosniff") && head.contains("cache-control: no-store"), "{head}");
    assert!(body.matches(&format!("<script nonce=\"{first}\">")).count() == 1 && !body.contains("{nonce}"), "{body}");
    assert!(body.matches(&format!("<style nonce=\"{first}\">")).count() == 1, "{body}");
    let tags = |tag: &str| body.matches(tag).count();
    assert_eq!((tags("<script"), tags("<style")), (1, 1));
    // Nothing from elsewhere, nothing that takes texts for markup, and no attributes that the policy forbids.
    for bad in
        ["http:", "https:", "src=", "href=", "innerHTML", "outerHTML", "insertAdjacent", "eval(", "onclick=", " style="]
    {
        assert!(
            !body.contains(bad)
                || bad == "http:" && body.matches(bad).count() == body.matches("http://www.w3.org/2000/svg").count(),
            "{bad}"
        );
    }
    assert!(body.len() < 40 << 10, "{} bytes", body.len());
}

fn taken() {
    let topology = Topology::new();
    let holder = topology.host.enter(|| TcpListener::bind(address()).expect("a socket"));
    let setup = Setup::new(&topology.host, "sk-lookup").args(["--metrics", ADDRESS]);
    let lab = Lab { daemon: setup.start(), topology };
    lab.daemon.ok("add-prefix 192.0.2.0/24");
    lab.topology.client.enter(|| expect_tcp_hello(at("192.0.2.7", 80)));
    let complaints = || lab.daemon.json("status")["degraded"].to_string();
    let expected = "the metrics are not served, which is tried again each second: listen at 127.0.0.1:9464 for metrics";
    assert!(complaints().contains(expected), "{}", complaints());
    drop(holder);
    wait_for("metrics", Duration::from_secs(10), || match complaints().as_str() {
        "[]" => Ok(()),
        complaints => Err(complaints.to_owned()),
    });
    assert_eq!(get(&lab, "/healthz").0, 200);
    assert_eq!(lab.daemon.log().matches(expected).count(), 1, "{}", lab.daemon.log());
    let outcome = Setup::new(&lab.topology.server, "sk-lookup").args(["--metrics", "nowhere"]).run_to_end();
    assert_eq!(outcome.status, 2, "{outcome}");
}

/// Steering matters more.
fn taken_later() {
    let other: SocketAddr = "127.0.0.1:9465".parse().expect("an address");
    let directory = scratch();
    let file = directory.path().join("anyport.toml");
    let write = |address: SocketAddr| fs::write(&file, format!("[daemon]\nmetrics = \"{address}\"\n")).expect("a file");
    write(address());
    let lab = Lab::with("sk-lookup", |setup| setup.config(&file));
    lab.daemon.ok("add-prefix 192.0.2.0/24");
    assert_eq!(get(&lab, "/healthz").0, 200);
    write(other);
    let holder = lab.topology.host.enter(|| TcpListener::bind(other).expect("a socket"));
    let before = lab.daemon.pid();
    let outcome = lab.daemon.take_over(&program("anyportd").expect("a daemon"));
    assert_eq!(outcome.status, 0, "{outcome}\n{}", lab.daemon.log());
    lab.daemon.wait_for_successor(before);
    lab.topology.client.enter(|| expect_tcp_hello(at("192.0.2.7", 80)));
    let log = lab.daemon.log();
    assert!(log.contains("listen at 127.0.0.1:9465 for metrics") && log.contains("trying again"), "{log}");
    lab.topology.host.enter(|| tcp(address()).expect_err("the previous address is closed"));
    drop(holder);
    wait_for("metrics", Duration::from_secs(10), || {
        lab.topology.host.enter(|| tcp(other)).map(drop).map_err(|error| error.to_string())
    });
}

fn shadowed() {
    let lab = Lab::with("sk-lookup", |setup| setup.env("ANYPORT_METRICS", ADDRESS));
    let complaint = lab.daemon.refused("add-prefix 127.0.0.1", 5);
    assert!(complaint.contains("anyportd") || complaint.contains("127.0.0.1"), "{complaint}");
    lab.daemon.ok("add-prefix 127.0.0.1 --force");
    let status = lab.daemon.ok("status");
    assert!(status.contains("the metrics at 127.0.0.1:9464 are out of reach"), "{status}");
    lab.daemon.ok("remove-prefix 127.0.0.1");
    lab.daemon.ok("add-prefix 127.0.0.1 --force --except 9464");
    assert!(lab.daemon.ok("status").contains("all is well"));
    assert_eq!(get(&lab, "/healthz").0, 200);
}

fn succeeded(backend: &'static str) {
    let lab = lab(backend);
    lab.daemon.ok("add-prefix 192.0.2.0/24");
    lab.topology.client.enter(|| expect_tcp_hello(at("192.0.2.7", 80)));
    let steered = "anyport_prefix_steered_packets_total{prefix=\"192.0.2.0/24\",protocol=\"tcp\",service=\"default\"}";
    wait_for_values(&lab, &[(steered, 1.0)]);
    // A client watches during the takeover, and a connection stays with the previous process.
    let idle = lab.topology.host.enter(|| TcpStream::connect(address()).expect("a connection"));
    let before = lab.daemon.pid();
    let outcome = lab.daemon.take_over(&program("anyportd").expect("a daemon"));
    assert_eq!(outcome.status, 0, "{outcome}\n{}", lab.daemon.log());
    lab.daemon.wait_for_successor(before);
    let scrape = wait_for_values(&lab, &[("anyport_server_starts_total", 2.0), ("anyport_server_crashes_total", 0.0)]);
    assert_eq!(scrape.get(steered), Some(1.0), "rules count on");
    drop(idle);
    let before = lab.daemon.pid();
    kill(before, Signal::SIGKILL).expect("a kill");
    lab.daemon.wait_for_successor(before);
    wait_for_values(&lab, &[("anyport_server_starts_total", 3.0), ("anyport_server_crashes_total", 1.0)]);
    // Rates are new, and never below zero.
    let live = live(&lab);
    for row in
        live["prefixes"].as_array().expect("prefixes").iter().chain(live["services"].as_array().expect("services"))
    {
        let rates = row["rates"].as_object();
        assert!(rates.is_none_or(|it| it.values().all(|rate| rate.as_f64() >= Some(0.0))), "{row}");
    }
}

fn documents() {
    let directory = scratch();
    chown(directory.path(), Some(USER), Some(GROUP)).expect("a directory of the daemon's own");
    let config = directory.path().join("anyport.toml");
    let list = directory.path().join("list").display().to_string();
    let announce = format!("[announce]\nprefixes = [\"192.0.2.0/24\"]\nfile = {list:?}\nformat = \"list\"\n");
    fs::write(&config, announce).expect("a configuration");
    let lab = Lab::with("sk-lookup", |setup| setup.args(["--metrics", ADDRESS]).config(config));
    lab.daemon.ok("add-service edge --handler forward --upstream 203.0.113.2:80");
    lab.daemon.ok("add-prefix 192.0.2.0/24 --service edge");
    let scrape = wait_for_values(&lab, &[("anyport_prefixes", 1.0)]);
    let root = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/");
    let read =
        |name: &str| fs::read_to_string(format!("{root}{name}")).unwrap_or_else(|error| panic!("{name}: {error}"));
    let dashboard: Value = serde_json::from_str(&read("grafana.json")).expect("JSON");
    let mut shown = Vec::new();
    collect(&dashboard, &mut shown);
    assert!(shown.len() > 30, "{} expressions", shown.len());
    let alerts = read("alerts.yml");
    let alerted = alerts.lines().filter_map(|line| line.trim().strip_prefix("expr: "));
    let mut used = BTreeSet::new();
    // Those of a fleet are there where the node belongs to one.
    let labels_of_metric = |name: &str| {
        let known = all_metrics()
            .find(|metric| name.strip_prefix(metric.name).is_some_and(|rest| ["", "_bucket"].contains(&rest)));
        known.map(|metric| metric.labels)
    };
    for expression in shown.iter().map(String::as_str).chain(alerted) {
        let names = metrics_of(expression);
        assert!(!names.is_empty() || expression.contains("up{"), "{expression:?} speaks of no metric");
        for name in &names {
            assert!(labels_of_metric(name).is_some(), "{expression:?}: there is no {name}");
        }
        for label in labels_of(expression) {
            let has_it = |name: &String| labels_of_metric(name).is_some_and(|it| it.contains(&label.as_str()));
            let is_known = names.iter().any(has_it) || ["instance", "job", "le"].contains(&label.as_str());
            assert!(is_known, "{expression:?}: no metric has the label {label}");
        }
        used.extend(names);
    }
    assert!(used.len() > 30, "{} metrics are shown", used.len());
    let of_edge: Vec<_> = scrape.series().map(|it| it.0).filter(|it| it.contains("service=\"edge\"")).collect();
    let count = |is_meant: &dyn Fn(&str) -> bool| of_edge.iter().filter(|series| is_meant(series)).count();
    let is_histogram = |series: &str| ["_wait_", "_duration_"].iter().any(|part| series.contains(part));
    let sentence = format!(
        "For each service {} series and {} of histograms, for each upstream {}",
        count(&|it| it.starts_with("anyport_service_") && !is_histogram(it)),
        count(&is_histogram),
        count(&|it| it.starts_with("anyport_upstream_")),
    );
    assert!(read("metrics.md").contains(&sentence), "docs/metrics.md has to say: {sentence}");
    let labels: BTreeSet<_> = scrape.names().flat_map(|name| scrape.labels(name)).map(String::as_str).collect();
    for text in [&dashboard.to_string(), &alerts] {
        for shown in text.split("{{").skip(1).filter_map(|it| it.split_once("}}")).map(|(inside, _)| inside.trim()) {
            let label = shown.strip_prefix("$labels.").unwrap_or(shown);
            assert!(labels.contains(label) || label == "instance" || label.starts_with("$value"), "{shown:?}");
        }
    }
}

/// All expressions of a dashboard.
fn collect(value: &Value, found: &mut Vec<String>) {
    match value {
        Value::Object(fields) => {
            for (name, value) in fields {
                match value.as_str() {
                    Some(text) if name == "expr" || name == "definition" => found.push(text.to_owned()),
                    _ => collect(value, found),
                }
            }
        }
        Value::Array(values) => values.iter().for_each(|value| collect(value, found)),
        _ => {}
    }
}

/// The metrics in an expression of `PromQL`.
fn metrics_of(expression: &str) -> BTreeSet<String> {
    let words = expression.split(|it: char| !it.is_ascii_alphanumeric() && it != '_');
    words.filter(|word| word.starts_with("anyport_") || word.starts_with("process_")).map(str::to_owned).collect()
}

/// The labels in an expression: in selectors, behind `by`, and what `label_values` asks for. `le` is one of histograms.
fn labels_of(expression: &str) -> BTreeSet<String> {
    let inside = |begin: &'static str, end: char| {
        let parts = expression.split(begin).skip(1).filter_map(move |it| Some(it.split_once(end)?.0));
        parts.flat_map(|it| it.split(',')).map(|it| it.split(['=', '!']).next().unwrap_or_default().trim().to_owned())
    };
    let mut labels: BTreeSet<String> = inside("{", '}').chain(inside("by (", ')')).collect();
    if let Some(asked) = expression.strip_prefix("label_values(") {
        labels.extend(asked.trim_end_matches(')').rsplit(',').next().map(|it| it.trim().to_owned()));
    }
    labels
}
