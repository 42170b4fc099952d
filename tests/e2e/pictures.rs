//! The pictures of the documents, drawn while clients connect: of the page and of `top`. Only with `ANYPORT_WRITE_DOCS=1`.

use std::{
    env, fs,
    io::Write as _,
    process::{Command, Stdio},
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    thread::{scope, sleep, spawn},
    time::{Duration, Instant},
};

use anyport_tests::{
    browser::Browser,
    dial::{expect_tcp_line, tcp, tcp_server, tcp_text, tcp_within, udp},
    netns::Netns,
    screenshot::svg,
    topology::SERVER,
};
use libtest_mimic::Trial;

use crate::{
    cases::{Lab, alone, at},
    top::{after, frames, in_terminal, top},
};

const ADDRESS: &str = "127.0.0.1:9464";
const SCREEN: (u32, u32) = (1280, 900);
/// Rows and columns of the terminal.
const TERMINAL: (usize, usize) = (22, 116);
/// How long clients connect before anything is drawn, so that charts have a past.
const PAST: Duration = Duration::from_mins(4);
const DOCUMENTS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs");

pub(crate) fn trials() -> Vec<Trial> {
    let is_wanted = env::var_os("ANYPORT_WRITE_DOCS").is_some();
    is_wanted.then(|| alone("pictures::the page and top", draw)).into_iter().collect()
}

/// A node with services of several kinds, one of which refuses some of its clients.
fn lab() -> Lab {
    let lab = Lab::with("sk-lookup", |setup| setup.args(["--metrics", ADDRESS]));
    lab.topology.server.enter(|| tcp_server(at(SERVER[0], 8080), "x".repeat(16_384).leak()));
    for command in [
        "add-service web --handler hello",
        "add-service edge --handler forward --upstream 203.0.113.2:8080 --health-check=interval=1s",
        "add-service tunnels --handler echo",
        "add-service dns --handler echo",
        "add-service trap --handler discard --source-deny 198.51.100.0/24",
        "add-prefix 192.0.2.0/24 2001:db8:a::/48 --service web",
        "add-prefix 203.0.113.64/26 --service edge",
        "add-prefix 203.0.113.128/26 --service tunnels",
        "add-prefix 203.0.113.192/27 --protocol udp --service dns",
        "add-prefix 203.0.113.224/27 --service trap",
    ] {
        lab.daemon.ok(command);
    }
    lab
}

/// Does it again and again until `is_over`, so many times a second, now more and now less.
fn again(is_over: &AtomicBool, times: f64, mut what: impl FnMut(u8)) {
    let begin = Instant::now();
    let mut round = 0_u8;
    while !is_over.load(Relaxed) {
        round = round % 30 + 1;
        what(round);
        let now = begin.elapsed().as_secs_f64();
        sleep(Duration::from_secs_f64((1.0 + 0.4 * (now / 25.0).sin()) / times));
    }
}

/// Clients of each service, until `is_over`.
fn connect(client: &Netns, is_over: &AtomicBool) {
    client.enter(|| {
        let mut held: Vec<_> =
            (0..48).map(|number| tcp(at(&format!("203.0.113.{}", 129 + number), 443)).expect("a tunnel")).collect();
        scope(|scope| {
            scope.spawn(|| again(is_over, 150.0, |host| drop(tcp_text(at(&format!("192.0.2.{host}"), 443)))));
            scope.spawn(|| again(is_over, 60.0, |host| drop(tcp_text(at(&format!("2001:db8:a::{host}"), 80)))));
            scope.spawn(|| again(is_over, 80.0, |host| drop(tcp_text(at(&format!("203.0.113.{}", 64 + host), 80)))));
            scope.spawn(|| {
                let mut number = 0_u64;
                again(is_over, 40.0, |host| {
                    number += 1;
                    drop(udp(at(&format!("203.0.113.{}", 192 + host), 53), &number.to_be_bytes()));
                });
            });
            scope.spawn(|| {
                let limit = Duration::from_millis(200);
                again(is_over, 2.0, |host| drop(tcp_within(at(&format!("203.0.113.{}", 224 + host), 23), limit)));
            });
            again(is_over, 100.0, |host| expect_tcp_line(&mut held[usize::from(host)], "something through a tunnel\n"));
        });
    });
}

/// Sends the clients home when it is dropped, also where drawing fails.
struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Relaxed);
    }
}

fn draw() {
    let lab = lab();
    let is_over = AtomicBool::new(false);
    scope(|scope| {
        scope.spawn(|| connect(&lab.topology.client, &is_over));
        let over = Over(&is_over);
        sleep(PAST);
        let page = page(&lab);
        let top = terminal(&lab);
        drop(over);
        assert!(page.len() < 200 << 10, "{} bytes", page.len());
        fs::write(format!("{DOCUMENTS}/page.png"), page).expect("a picture in docs/");
        fs::write(format!("{DOCUMENTS}/top.svg"), top).expect("a picture in docs/");
    });
}

/// The page, as PNG.
fn page(lab: &Lab) -> Vec<u8> {
    let mut browser = Browser::start(&lab.topology.host);
    browser.show(&format!("http://{ADDRESS}/"), SCREEN);
    browser.wait_until("document.querySelectorAll('#services tbody tr').length === 6");
    browser.value("document.querySelector('#spans button').click()");
    browser.wait_until("document.querySelector('#packets polyline.c0')");
    // A look later, after which there is a rate.
    sleep(Duration::from_secs(5));
    decoded(&browser.picture())
}

/// What is written in base64.
fn decoded(text: &str) -> Vec<u8> {
    let mut decode = Command::new("base64");
    let mut decode = decode.arg("--decode").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("base64(1)");
    let (text, mut input) = (text.to_owned(), decode.stdin.take().expect("a pipe"));
    let writer = spawn(move || input.write_all(text.as_bytes()).expect("a program that reads"));
    let output = decode.wait_with_output().expect("its output");
    writer.join().expect("all is written");
    output.stdout
}

/// The screen of `top`, as SVG.
fn terminal(lab: &Lab) -> String {
    let (rows, columns) = TERMINAL;
    let line = format!("stty rows {rows} cols {columns}; {}", top(lab, "--interval 2s --color always"));
    let shown = in_terminal(&line, after(Duration::from_secs(7), "q"));
    let screen = frames(&shown).pop().expect("a screen");
    svg("anyportctl top", columns, &screen)
}
