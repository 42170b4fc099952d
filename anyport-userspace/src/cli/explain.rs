//! `anyportctl explain`: says what becomes of a packet, and why.

use std::fmt::Write as _;

use clap::ValueEnum as _;

use super::{Output, path};
use crate::{
    api::{
        Client, Endpoint, Explain as Request, Explanation, ListenerView, Problem, ProblemKind, Reason, RuleView,
        SocketView, Verdict,
    },
    host::{self, Owner},
    rules::{InvalidText, Origin, Protocol},
};

/// Asks the kernel what becomes of a new connection or datagram, and says why. Nothing is sent or counted.
#[derive(Debug, clap::Args)]
#[command(override_usage = "anyportctl explain [OPTIONS] [tcp|udp] ADDR:PORT")]
pub(super) struct Explain {
    /// Where the packet goes
    #[arg(
        required = true,
        num_args = 1..=2,
        value_name = "ADDR:PORT",
        help = "Where it goes, such as 192.0.2.7:80, udp 192.0.2.7:53 or [2001:db8::7]:80; tcp unless udp is said"
    )]
    packet: Vec<String>,
    /// Where it comes from; a loopback address if nothing is said
    #[arg(long, value_name = "ADDR:PORT")]
    from: Option<Endpoint>,
    /// The interface by which it comes: tc watches some, and the filter of reverse paths drops packets by them
    #[arg(long, value_name = "INTERFACE")]
    via: Option<String>,
}

impl Explain {
    pub(super) async fn run(self, client: &Client, out: &mut Output<'_>) -> Result<(), Problem> {
        let Self { packet, from, via } = self;
        let (protocol, to) = match packet.as_slice() {
            [protocol, to] => match Protocol::from_str(protocol, false) {
                Ok(protocol) => (protocol, to),
                Err(_) => return Err(Problem::new(ProblemKind::Invalid, format!("{protocol:?}: say tcp or udp"))),
            },
            [to] => (Protocol::Tcp, to),
            _ => return Err(Problem::new(ProblemKind::Invalid, "say ADDR:PORT, with tcp or udp before it")),
        };
        let to: Endpoint = to.parse().map_err(|it: InvalidText| Problem::new(ProblemKind::Invalid, it.0))?;
        let request = Request { protocol, to, from, via };
        request.validate()?;
        let mut answer: Explanation = client.get(&path("/v1/explain", &request)?).await?;
        find_owners(&mut answer);
        out.print(&answer, text)
    }
}

/// The daemon sees only into processes of its own user, who calls this often into others.
fn find_owners(answer: &mut Explanation) {
    let unknown = || answer.listeners.iter().chain(&answer.shadowed).filter(|it| it.pid.is_none());
    let owners = host::owners(&unknown().map(|it| it.inode).collect());
    for listener in answer.listeners.iter_mut().chain(&mut answer.shadowed).filter(|it| it.pid.is_none()) {
        if let Some(Owner { pid, name }) = owners.get(&listener.inode) {
            (listener.pid, listener.process) = (Some(*pid), Some(name.clone()));
        }
    }
}

fn text(answer: &Explanation) -> String {
    let mut lines = vec![sentence(answer)];
    if answer.from_assumed {
        lines.push(format!("It is taken to come from {}; --from names another client.", answer.from));
    }
    lines.push(String::new());
    if let Some(rule) = &answer.rule {
        lines.push(format!("rule        {rule}, {}", origin(rule)));
    }
    if let Some(socket) = &answer.socket {
        lines.push(format!("socket      {}", socket_text(socket)));
        lines.push(format!("owner       {}", owner(socket.pid, socket.process.as_deref())));
    }
    lines.extend(answer.sources.iter().map(|text| format!("sources     {text}")));
    lines.push(format!("route       {}", answer.route.text));
    lines.extend(answer.answer.iter().map(|it| format!("answers     {}", it.text)));
    lines.extend(answer.listeners.iter().take(1).map(|it| format!("receiver    {}", listener(it))));
    lines.extend(answer.listeners.iter().skip(1).map(|it| format!("behind it   {}", listener(it))));
    lines.extend(answer.shadowed.iter().map(|it| format!("shadowed    {}", listener(it))));
    lines.extend(answer.held.iter().map(|text| format!("held        {text}")));
    lines.push(format!("decided by  {}, generation {}", answer.backend, answer.generation));
    lines.extend(answer.notes.iter().map(|note| format!("note        {note}")));
    let mut text = lines.join("\n");
    if !answer.considered.is_empty() {
        text.push_str("\n\nThe rules around this address, the first to be asked first:");
    }
    for considered in &answer.considered {
        // Writing to a string does not fail.
        write!(text, "\n  {}\n      {}", considered.rule, considered.why).ok();
    }
    if answer.left_out > 0 {
        write!(text, "\n  and {} more", answer.left_out).ok();
    }
    text
}

/// The verdict in one sentence, or two where it helps nobody since no packet gets that far.
fn sentence(answer: &Explanation) -> String {
    let what = match answer.protocol {
        Protocol::Udp => "A udp datagram",
        Protocol::Tcp | Protocol::Both => "A new tcp connection",
    };
    let (to, port) = (answer.to, answer.to.0.port());
    let service = answer.service.as_ref().map_or("", |it| it.as_str());
    let becomes = match answer.reason {
        Reason::Steered => format!("is steered to the service {service}"),
        Reason::NoSocket => format!("is refused: the service {service} has no live socket for it"),
        Reason::Denied => format!("is refused: the service {service} does not take {}", answer.from.0.ip()),
        Reason::Excepted => format!("is left to the host: a rule excepts port {port}"),
        Reason::Unwatched => {
            format!("is left to the host: {} does not watch the interface by which it comes", answer.backend)
        }
        Reason::Filtered => {
            "is dropped before anybody sees it: no such source is to come by that interface (rp_filter)".into()
        }
        Reason::Unmatched if answer.considered.is_empty() => {
            "is left to the host: no rule is about that address".into()
        }
        Reason::Unmatched => "is left to the host: no rule matches it".into(),
    };
    let but = match answer.verdict {
        Verdict::Host if answer.route.local && answer.listeners.is_empty() => ", and nobody listens there.",
        Verdict::Steer | Verdict::Drop if !answer.route.local => {
            ". But no packet comes that far: the address is not local here, see route."
        }
        _ => ".",
    };
    format!("{what} to {to} {becomes}{but}")
}

fn origin(rule: &RuleView) -> &'static str {
    match rule.origin {
        Origin::Config => "from the configuration",
        Origin::Fleet => "from the fleet",
        Origin::Applied => "applied from a file",
        Origin::Added => "added by hand",
        Origin::Host => "by which the host keeps an address of its own (own-addresses)",
    }
}

fn socket_text(socket: &SocketView) -> String {
    let SocketView { protocol, local, cookie, group, .. } = socket;
    let local = local.map_or_else(|| "unknown".into(), |it| it.to_string());
    let cookie = cookie.map(|it| format!(", cookie {it}")).unwrap_or_default();
    let group = match group {
        0 | 1 => String::new(),
        more => format!(", or another of the {more} that share this port"),
    };
    format!("{protocol} {local}{cookie}{group}")
}

fn listener(view: &ListenerView) -> String {
    let ListenerView { protocol, local, pid, process, .. } = view;
    format!("{protocol} {local} of {}", owner(*pid, process.as_deref()))
}

fn owner(pid: Option<u32>, name: Option<&str>) -> String {
    match (pid, name) {
        (Some(pid), Some(name)) => format!("{name}, pid {pid}"),
        (Some(pid), None) => format!("pid {pid}"),
        _ => "a process that can't be seen from here".into(),
    }
}
