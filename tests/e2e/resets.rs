//! `forward`: what either side had said arrives before its reset, and ends are passed on as what they were.

use std::{
    fs,
    io::{self, Read as _, Write as _},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    thread::{self, sleep},
    time::{Duration, Instant},
};

use anyport::sys;
use anyport_tests::{
    dial::{PATIENCE, tcp},
    host::wait_for,
    netns::Netns,
    prerequisites::scratch,
    random::Random,
    servers::Server,
    topology::{HOST, SECOND, SERVER},
};
use libtest_mimic::Trial;
use socket2::{Domain, SockRef, Socket, Type};

use crate::cases::{Family, Lab, at, trial};

/// Steered prefixes.
const PREFIX: [&str; 2] = ["192.0.2.0/24", "2001:db8:0:a::/64"];
/// Addresses in them.
const ONE: [&str; 2] = ["192.0.2.77", "2001:db8:0:a::77"];
/// Where the upstream does as the client's plan says, and where it begins by itself.
const PORTS: [u16; 2] = [7_070, 7_071];
/// Random connections of each kind of forwarding, and how many at a time.
const CONNECTIONS: usize = 5_000;
const AT_ONCE: usize = 8;
/// Bytes of an upload that is cut off.
const UPLOAD: usize = 20 << 20;
const UPLOADS: usize = 20;

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial("resets::10,000 random connections are as direct ones", || {
            random_connections("");
            random_connections("--proxy-protocol v2");
        }),
        trial("resets::an answer to an upload that is cut off", early_answers),
        trial("resets::a time limit is no end", time_limits),
        trial("resets::a reset behind an end", behind_an_end),
        trial("resets::a closed port leads nowhere else by source-hash", affinity),
        trial("resets::on-down closes connections", on_down),
    ]
}

/// How one side closes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Close {
    /// By FIN, and waits for the other side's.
    End,
    /// By RST.
    Reset,
    /// With words of the other side unread, which makes the kernel reset the connection.
    Unread,
}

/// What both sides of a connection do.
#[derive(Clone, Copy, Debug)]
struct Plan {
    /// Bytes of the client and of the server.
    lengths: [u32; 2],
    /// Whether the server is who closes.
    is_servers: bool,
    close: Close,
    /// Before the other side begins to read, in milliseconds.
    pause: u8,
}

impl Plan {
    const LENGTH: usize = 16;

    fn random(random: &mut Random) -> Self {
        let close = *random.pick(&[Close::End, Close::Reset, Close::Unread]);
        let is_servers = random.below(2) == 0;
        let mut length = || {
            let limit = *random.pick(&[1, 2, 1_460, 1_461, 20_000, 100_000]);
            let limit = if random.below(25) == 0 { 2 << 20 } else { limit };
            u32::try_from(random.below(limit)).expect("a length")
        };
        let mut lengths = [length(), length()];
        let other = &mut lengths[usize::from(!is_servers)];
        match close {
            Close::End => {}
            // Nobody reads it, so it has to fit into what lies between.
            Close::Reset => *other = (*other).min(10_000),
            Close::Unread => *other = (*other).clamp(1, 10_000),
        }
        Self { lengths, is_servers, close, pause: *random.pick(&[0, 0, 0, 5, 20]) }
    }

    fn to_bytes(self) -> [u8; Self::LENGTH] {
        let mut bytes = [0; Self::LENGTH];
        bytes[..4].copy_from_slice(&self.lengths[0].to_be_bytes());
        bytes[4..8].copy_from_slice(&self.lengths[1].to_be_bytes());
        bytes[8..11].copy_from_slice(&[u8::from(self.is_servers), self.close as u8, self.pause]);
        bytes
    }

    fn from_bytes(bytes: [u8; Self::LENGTH]) -> Self {
        let length = |from: usize| u32::from_be_bytes(bytes[from..from + 4].try_into().expect("four bytes"));
        let close = [Close::End, Close::Reset, Close::Unread][usize::from(bytes[9])];
        Self { lengths: [length(0), length(4)], is_servers: bytes[8] == 1, close, pause: bytes[10] }
    }

    /// Does what this side has to do. What it got, if it is not the one who closes first.
    fn carry_out(self, mut stream: TcpStream, is_server: bool) -> Result<(), String> {
        let [own, other] = if is_server { [1, 0] } else { [0, 1] };
        let words = pattern(self.lengths[own] as usize);
        stream.set_read_timeout(Some(PATIENCE)).expect("a time limit");
        if self.is_servers != is_server {
            sleep(Duration::from_millis(self.pause.into()));
            // It may be reset while this is written.
            let writer = stream.try_clone().expect("a copy");
            let writing = thread::spawn(move || (&writer).write_all(&words).err());
            let heard = heard(&mut stream);
            let broken = writing.join().expect("no panic");
            drop(stream);
            let (got, is_reset) = heard.map_err(|error| format!("{self:?}: {error}"))?;
            let is_reset = is_reset || broken.is_some();
            let expected = pattern(self.lengths[other] as usize);
            if got != expected {
                return Err(format!("{self:?}: {} of {} bytes arrived", got.len(), expected.len()));
            }
            if is_reset != (self.close != Close::End) {
                return Err(format!("{self:?}: it ended by {}", if is_reset { "RST" } else { "FIN" }));
            }
            return Ok(());
        }
        if self.close == Close::End {
            let writer = stream.try_clone().expect("a copy");
            let writing = thread::spawn(move || {
                (&writer).write_all(&words)?;
                writer.shutdown(Shutdown::Write)
            });
            let heard = heard(&mut stream);
            writing.join().expect("no panic").map_err(|error| format!("{self:?}: writing: {error}"))?;
            let (got, is_reset) = heard.map_err(|error| format!("{self:?}: {error}"))?;
            return if got == pattern(self.lengths[other] as usize) && !is_reset {
                Ok(())
            } else {
                Err(format!("{self:?}: {} bytes came back, reset: {is_reset}", got.len()))
            };
        }
        stream.write_all(&words).map_err(|error| format!("{self:?}: writing: {error}"))?;
        wait_until_taken(&stream);
        if self.close == Close::Reset {
            reset(&stream);
        } else if stream.peek(&mut [0]).map_err(|error| format!("{self:?}: {error}"))? == 0 {
            return Err(format!("{self:?}: nothing to leave unread"));
        }
        Ok(())
    }
}

/// Bytes in which each place can be told from others nearby.
fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|at| (at ^ (at >> 8) ^ (at >> 16)).to_le_bytes()[0]).collect()
}

/// All that comes, and whether a reset ends it.
fn heard(stream: &mut TcpStream) -> io::Result<(Vec<u8>, bool)> {
    let mut bytes = Vec::new();
    match stream.read_to_end(&mut bytes) {
        Ok(_) => Ok((bytes, false)),
        Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Ok((bytes, true)),
        Err(error) => Err(error),
    }
}

/// Until the next host has all of it: what a kernel has not sent when it resets a connection is lost there already.
fn wait_until_taken(stream: &TcpStream) {
    let start = Instant::now();
    while sys::unacknowledged(stream).expect("a connection") > 0 {
        assert!(start.elapsed() < PATIENCE, "the peer acknowledges nothing");
        sleep(Duration::from_micros(100));
    }
}

/// Has the kernel reset the connection when it is closed.
fn reset(stream: &TcpStream) {
    SockRef::from(stream).set_linger(Some(Duration::ZERO)).expect("a reset at the end");
}

/// Serves each connection on a thread of its own, for as long as the test runs. Complaints are collected.
fn serve(namespace: &Netns, address: SocketAddr, complaints: &Complaints, serve: fn(TcpStream) -> Result<(), String>) {
    let listener = namespace.enter(|| TcpListener::bind(address)).expect("a listening socket");
    let complaints = complaints.clone();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let complaints = complaints.clone();
            thread::spawn(move || complaints.take(serve(stream.expect("a connection"))));
        }
    });
}

#[derive(Clone, Default)]
struct Complaints(Arc<Mutex<Vec<String>>>);

impl Complaints {
    fn take(&self, outcome: Result<(), String>) {
        if let Err(complaint) = outcome {
            self.0.lock().expect("no panic").push(complaint);
        }
    }

    fn expect_none(&self) {
        let complaints = self.0.lock().expect("no panic");
        assert!(
            complaints.is_empty(),
            "{} complaints:\n{}",
            complaints.len(),
            complaints[..complaints.len().min(20)].join("\n")
        );
    }
}

/// Reads the header of the PROXY protocol, version 2, if there is one, and the plan.
fn read_plan(stream: &mut TcpStream) -> io::Result<Plan> {
    let mut bytes = [0; Plan::LENGTH];
    stream.read_exact(&mut bytes)?;
    if bytes.starts_with(b"\r\n\r\n\0\r\nQUIT\n") {
        let mut rest = vec![0; usize::from(u16::from_be_bytes([bytes[14], bytes[15]]))];
        stream.read_exact(&mut rest)?;
        stream.read_exact(&mut bytes)?;
    }
    Ok(Plan::from_bytes(bytes))
}

/// Of an upstream that speaks first: so many bytes, and a reset.
const EAGER: usize = 3_000;

fn random_connections(options: &str) {
    let lab = Lab::new("sk-lookup");
    let complaints = Complaints::default();
    for (family, server) in Family::ALL.into_iter().zip(SERVER) {
        let server = if server.contains(':') { format!("[{server}]") } else { server.to_owned() };
        lab.daemon.ok(&format!("add-service up{family} --handler forward --upstream {server}:* {options}"));
        lab.daemon.ok(&format!("add-prefix {} --service up{family}", family.of(PREFIX)));
        serve(&lab.topology.server, at(family.of(SERVER), PORTS[0]), &complaints, |mut stream| {
            stream.set_read_timeout(Some(PATIENCE)).expect("a time limit");
            let plan = read_plan(&mut stream).map_err(|error| format!("no plan: {error}"))?;
            plan.carry_out(stream, true)
        });
        serve(&lab.topology.server, at(family.of(SERVER), PORTS[1]), &complaints, |mut stream| {
            stream.write_all(&pattern(EAGER)).map_err(|error| format!("eager: {error}"))?;
            wait_until_taken(&stream);
            reset(&stream);
            Ok(())
        });
    }
    let left = AtomicUsize::new(CONNECTIONS);
    lab.topology.client.enter(|| {
        thread::scope(|scope| {
            for number in 0..AT_ONCE {
                let (left, complaints) = (&left, &complaints);
                scope.spawn(move || {
                    let mut random = Random::new(&format!("resets {options} {number}"));
                    while left.fetch_update(Relaxed, Relaxed, |left| left.checked_sub(1)).is_ok() {
                        complaints.take(connect(&mut random));
                    }
                });
            }
        });
    });
    // Those that end at the server's side may still be judged there.
    wait_for("end of all connections", PATIENCE, || {
        let services = lab.daemon.json("services");
        let active: u64 = services.as_array().expect("services").iter().filter_map(|it| it["active"].as_u64()).sum();
        if active == 0 { Ok(()) } else { Err(format!("{active} are open")) }
    });
    sleep(Duration::from_millis(100));
    complaints.expect_none();
}

fn connect(random: &mut Random) -> Result<(), String> {
    let family = *random.pick(&Family::ALL);
    let address = random.address(family.of(PREFIX));
    if random.below(10) == 0 {
        return dial_eager((address, PORTS[1]).into());
    }
    let plan = Plan::random(random);
    let mut stream = tcp((address, PORTS[0]).into()).map_err(|error| format!("dial {address}: {error}"))?;
    stream.write_all(&plan.to_bytes()).map_err(|error| format!("{plan:?}: {error}"))?;
    plan.carry_out(stream, false)
}

/// The upstream speaks first, and has reset the connection when the client looks at it.
fn dial_eager(to: SocketAddr) -> Result<(), String> {
    let attempt = |error| format!("eager, {to}: {error}");
    let socket = Socket::new(Domain::for_address(to), Type::STREAM, None).map_err(attempt)?;
    // It may be reset before this returns, with the words there to be read.
    let is_reset_at_once = match socket.connect(&to.into()) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionReset => true,
        connected => connected.map(|()| false).map_err(attempt)?,
    };
    let mut stream = TcpStream::from(socket);
    stream.set_read_timeout(Some(PATIENCE)).map_err(attempt)?;
    let (got, is_reset) = heard(&mut stream).map_err(attempt)?;
    let is_right = got == pattern(EAGER) && (is_reset || is_reset_at_once);
    if is_right { Ok(()) } else { Err(format!("eager: {} bytes, reset: {is_reset}", got.len())) }
}

/// Answers after some of an upload, and closes though more comes: the kernel resets the connection behind the answer.
fn answer_early(mut stream: TcpStream) -> Result<(), String> {
    let mut buffer = [0; 1_000];
    stream.read_exact(&mut buffer).map_err(|error| format!("no upload: {error}"))?;
    stream.write_all(&pattern(buffer.len())).map_err(|error| format!("no answer: {error}"))?;
    wait_until_taken(&stream);
    Ok(())
}

/// Uploads until that fails, and reads what came, as curl does.
fn upload(to: SocketAddr) -> Result<Vec<u8>, String> {
    let mut stream = tcp(to).map_err(|error| format!("dial {to}: {error}"))?;
    stream.set_read_timeout(Some(PATIENCE)).expect("a time limit");
    let mut writer = stream.try_clone().expect("a copy");
    let writing = thread::spawn(move || drop(writer.write_all(&vec![0; UPLOAD])));
    let heard = heard(&mut stream);
    writing.join().expect("no panic");
    heard.map(|(bytes, _)| bytes).map_err(|error| error.to_string())
}

/// Beside HAProxy, which passes an end on behind the answer.
fn early_answers() {
    let lab = Lab::new("sk-lookup");
    let complaints = Complaints::default();
    let upstream = at(SERVER[0], PORTS[0]);
    serve(&lab.topology.server, upstream, &complaints, answer_early);
    let config = format!("listen l\n  mode tcp\n  bind {}:8089\n  server s {upstream}\n", HOST[0]);
    let _haproxy = Server::haproxy(&lab.topology.host, &config);
    lab.daemon.ok(&format!("add-service edge --handler forward --upstream {upstream}"));
    lab.daemon.ok(&format!("add-prefix {} --service edge", PREFIX[0]));
    let count = |to: SocketAddr| {
        let answers = (0..UPLOADS).map(|_| lab.topology.client.enter(|| upload(to)));
        answers.filter(|answer| answer.as_ref().is_ok_and(|answer| *answer == pattern(1_000))).count()
    };
    let haproxy = wait_for("HAProxy", PATIENCE, || match count(at(HOST[0], 8_089)) {
        0 => Err("no answer".to_owned()),
        count => Ok(count),
    });
    let ours = count(at(ONE[0], 80));
    eprintln!("answers to {UPLOADS} uploads: {ours}, by HAProxy {haproxy}");
    assert_eq!(ours, UPLOADS);
    complaints.expect_none();
}

/// Says something again and again for as long as it goes.
#[expect(clippy::unnecessary_wraps, reason = "one of the servers, of which others may complain")]
fn drip(mut stream: TcpStream) -> Result<(), String> {
    while stream.write_all(b"drop ").is_ok() {
        sleep(Duration::from_millis(50));
    }
    Ok(())
}

fn silence(mut stream: TcpStream) -> Result<(), String> {
    // It ends by the time limit.
    heard(&mut stream).map(drop).map_err(|error| error.to_string())
}

/// Nobody takes a part for the whole.
fn time_limits() {
    let lab = Lab::new("sk-lookup");
    let complaints = Complaints::default();
    for (port, server, option, address) in [
        (PORTS[0], drip as fn(TcpStream) -> _, "--max-duration 500ms", "192.0.2.1"),
        (PORTS[1], silence, "--idle-timeout 500ms", "192.0.2.2"),
    ] {
        serve(&lab.topology.server, at(SERVER[0], port), &complaints, server);
        lab.daemon.ok(&format!("add-service s{port} --handler forward --upstream {}:{port} {option}", SERVER[0]));
        lab.daemon.ok(&format!("add-prefix {address} --service s{port}"));
        let (_, is_reset) = lab.topology.client.enter(|| {
            let mut stream = tcp(at(address, 80)).expect("a connection");
            stream.set_read_timeout(Some(PATIENCE)).expect("a time limit");
            heard(&mut stream).expect("an end")
        });
        assert!(is_reset, "{option}");
    }
}

/// A client that has ended its words resets the connection before the answer comes.
fn behind_an_end() {
    let lab = Lab::new("sk-lookup");
    let complaints = Complaints::default();
    serve(&lab.topology.server, at(SERVER[0], PORTS[0]), &complaints, |mut stream| {
        let (words, is_reset) = heard(&mut stream).map_err(|error| error.to_string())?;
        if words != b"question" || is_reset {
            return Err(format!("{words:?}, reset: {is_reset}"));
        }
        let start = Instant::now();
        while stream.take_error().is_ok_and(|error| error.is_none()) {
            if start.elapsed() > PATIENCE {
                return Err("the reset does not come".to_owned());
            }
            sleep(Duration::from_millis(1));
        }
        Ok(())
    });
    lab.daemon.ok(&format!("add-service edge --handler forward --upstream {}:{}", SERVER[0], PORTS[0]));
    lab.daemon.ok(&format!("add-prefix {} --service edge", PREFIX[0]));
    lab.topology.client.enter(|| {
        for _ in 0..10 {
            let mut stream = tcp(at(ONE[0], 80)).expect("a connection");
            stream.write_all(b"question").expect("a question");
            stream.shutdown(Shutdown::Write).expect("its end");
            // The server has it by then.
            sleep(Duration::from_millis(50));
            reset(&stream);
        }
    });
    wait_for("end of all connections", PATIENCE, || match lab.daemon.json("services")[1]["active"].as_u64() {
        Some(0) => Ok(()),
        active => Err(format!("{active:?} are open")),
    });
    sleep(Duration::from_millis(100));
    complaints.expect_none();
}

/// Clients dial ports of which each of two servers has one open.
fn affinity() {
    let lab = Lab::new("sk-lookup");
    let complaints = Complaints::default();
    for (server, port) in [(SERVER[0], PORTS[0]), (SECOND[0], PORTS[1])] {
        serve(&lab.topology.server, at(server, port), &complaints, |mut stream| {
            stream.write_all(b"data").map_err(|error| error.to_string())
        });
    }
    let upstreams = format!("--upstream {}:* --upstream {}:*", SERVER[0], SECOND[0]);
    lab.daemon.ok(&format!("add-service edge --handler forward --balance source-hash {upstreams}"));
    lab.daemon.ok(&format!("add-prefix {} --service edge", PREFIX[0]));
    let served = |port| {
        lab.topology.client.enter(|| {
            let outcome = tcp(at(ONE[0], port)).and_then(|mut stream| heard(&mut stream));
            outcome.is_ok_and(|(words, _)| words == b"data")
        })
    };
    let own = served(PORTS[0]);
    assert_ne!(own, served(PORTS[1]), "one of the ports is open at the client's server");
    for _ in 0..10 {
        // However often the closed one was dialled.
        assert_eq!([served(PORTS[0]), served(PORTS[1])], [own, !own]);
    }
}

/// An upstream is taken out by a change of its service.
fn on_down() {
    for (option, is_closed) in [("keep", false), ("close", true)] {
        let directory = scratch();
        let file = directory.path().join("anyport.toml");
        let write = |upstream: &str| {
            let text = format!(
                "[[service]]\nname = \"edge\"\nhandler = \"forward\"\nupstreams = [\"{upstream}:{}\"]\n\
                 on-down = \"{option}\"\n[[rule]]\nprefix = \"{}\"\nservice = \"edge\"\n",
                PORTS[0], PREFIX[0]
            );
            fs::write(&file, text).expect("a configuration");
        };
        write(SERVER[0]);
        let lab = Lab::with("sk-lookup", |setup| setup.config(&file));
        let complaints = Complaints::default();
        serve(&lab.topology.server, at(SERVER[0], PORTS[0]), &complaints, silence);
        let mut stream = lab.topology.client.enter(|| tcp(at(ONE[0], 80))).expect("a connection");
        let shown = || lab.daemon.json("services")[1]["upstreams"].clone();
        wait_for("connection", PATIENCE, || match shown()[0]["active"].as_u64() {
            Some(1) => Ok(()),
            active => Err(format!("{active:?} are open")),
        });
        write(SECOND[0]);
        lab.daemon.ok("reload");
        stream.set_read_timeout(Some(Duration::from_secs(3))).expect("a time limit");
        if is_closed {
            assert!(heard(&mut stream).expect("an end").1, "it is reset");
        } else {
            let upstreams = shown();
            assert_eq!((&upstreams[1]["state"], &upstreams[1]["active"]), (&"gone".into(), &1.into()), "{upstreams}");
            assert!(heard(&mut stream).is_err(), "it goes on");
            drop(stream);
            wait_for("end", PATIENCE, || match shown().as_array().map(Vec::len) {
                Some(1) => Ok(()),
                count => Err(format!("{count:?} upstreams are shown")),
            });
        }
        complaints.expect_none();
    }
}
