//! The types of `GET /v1/explain`: the flow that is asked about, and what becomes of its first packet.

use std::{fmt, net::SocketAddr, str::FromStr};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Problem, ProblemKind};
use crate::{
    as_text::as_text,
    back_end::BackEnd,
    rules::{InvalidText, Origin, PortSet, Prefix, Protocol, RuleRef, RuleSpec, ServiceName},
    service::{Family, Mark},
};

/// An address and a port as they stand in packets: no port 0, and IPv4 addresses as such.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Endpoint(pub SocketAddr);

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for Endpoint {
    type Err = InvalidText;

    fn from_str(text: &str) -> Result<Self, InvalidText> {
        let invalid = |why: &str| InvalidText(format!("{text:?}: {why}"));
        let endpoint: SocketAddr = text.parse().map_err(|_| {
            invalid("not an address and a port; write ADDRESS:PORT, such as 192.0.2.7:80 or [2001:db8::7]:80")
        })?;
        if endpoint.port() == 0 {
            return Err(invalid("ports are numbers from 1 to 65535"));
        }
        match endpoint {
            SocketAddr::V6(v6) if v6.ip().to_ipv4_mapped().is_some() => {
                Err(invalid("IPv4-mapped addresses never stand in a packet; write the IPv4 address"))
            }
            SocketAddr::V6(v6) if v6.scope_id() != 0 => Err(invalid("rules know no interfaces; leave the % away")),
            _ => Ok(Self(endpoint)),
        }
    }
}

as_text!(Endpoint, such as "192.0.2.7:80");

/// Query of `GET /v1/explain`: the first packet of a connection, or a datagram.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Explain {
    /// Its transport, `tcp` or `udp`.
    #[serde(default)]
    #[schemars(extend("enum" = ["tcp", "udp"]))]
    pub protocol: Protocol,
    /// Where it goes.
    pub to: Endpoint,
    /// Where it comes from; a loopback address if nothing is given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<Endpoint>,
    /// The interface by which it comes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub via: Option<String>,
}

impl Explain {
    /// Checks what the types leave open.
    ///
    /// # Errors
    /// No packet can be so.
    pub fn validate(&self) -> Result<(), Problem> {
        if self.protocol == Protocol::Both {
            return Err(Problem::new(ProblemKind::Invalid, "a packet is tcp or udp, not both"));
        }
        match self.from {
            Some(from) if from.0.is_ipv4() != self.to.0.is_ipv4() => Err(Problem::new(
                ProblemKind::Invalid,
                format!("no packet goes from {from} to {}: the two must be of the same IP version", self.to),
            )),
            _ => Ok(()),
        }
    }
}

/// Answer of `GET /v1/explain`.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct Explanation {
    /// What becomes of the packet, as the kernel decides.
    pub verdict: Verdict,
    /// Why.
    pub reason: Reason,
    /// The packet's transport.
    pub protocol: Protocol,
    /// Where it goes.
    pub to: Endpoint,
    /// Where it comes from.
    pub from: Endpoint,
    /// Whether the request left open where it comes from.
    pub from_assumed: bool,
    /// The rule that decides; nothing if no rule matches.
    pub rule: Option<RuleView>,
    /// The service that the rule steers to.
    pub service: Option<ServiceName>,
    /// What the service's lists of sources say of the packet's, if it has any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sources: Option<String>,
    /// The socket that gets the packet.
    pub socket: Option<SocketView>,
    /// The rules around the address, in order of precedence.
    pub considered: Vec<Considered>,
    /// How many more there are, which `considered` leaves out.
    pub left_out: usize,
    /// Whether packets to this address arrive at the host's sockets at all.
    pub route: RouteView,
    /// How answers leave, if it is known where the packet comes from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub answer: Option<AnswerView>,
    /// The host's own sockets that get no such packet because of the rule, but would without it; the first one before
    /// the others.
    pub shadowed: Vec<ListenerView>,
    /// What is held at steered addresses at this port, which a server of the host would meet there; for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub held: Option<String>,
    /// The host's own sockets that such a packet is left to; the first one before the others.
    pub listeners: Vec<ListenerView>,
    /// The back end that was asked.
    pub backend: BackEnd,
    /// The generation that decides.
    pub generation: u64,
    /// What else one should know.
    pub notes: Vec<String>,
}

/// What becomes of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// It goes to a service.
    Steer,
    /// It is left to the host.
    Host,
    /// It is dropped, and TCP clients are refused where the back end can do that.
    Drop,
}

/// Why that becomes of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Reason {
    /// A rule steers it.
    Steered,
    /// The port is among a rule's exceptions.
    Excepted,
    /// No rule matches.
    Unmatched,
    /// A rule steers it to a service that has no live socket for it.
    NoSocket,
    /// A rule steers it to a service that does not take its source.
    Denied,
    /// The back end does not watch the interface by which it comes.
    Unwatched,
    /// The filter of reverse paths drops it before anybody sees it.
    Filtered,
}

/// A rule without its counters.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct RuleView {
    /// The prefix.
    pub prefix: Prefix,
    /// The transports.
    pub protocol: Protocol,
    /// Steered ports.
    pub ports: PortSet,
    /// Ports left to the host.
    pub except: PortSet,
    /// The clients that are steered; all of them if there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<Prefix>,
    /// Who receives.
    pub service: ServiceName,
    /// Whether anyport keeps a local route for the prefix.
    pub route: bool,
    /// Where the rule came from.
    pub origin: Origin,
}

impl From<&RuleRef<'_>> for RuleView {
    fn from(rule: &RuleRef<'_>) -> Self {
        let RuleSpec { protocol, ports, except, source, service, route } = RuleSpec::clone(rule.terms);
        Self { prefix: rule.prefix, protocol, ports, except, source, service, route, origin: rule.origins.first() }
    }
}

impl fmt::Display for RuleView {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { prefix, protocol, ports, except, source, service, route, origin: _ } = self.clone();
        write!(f, "{prefix} {}", RuleSpec { protocol, ports, except, source, service, route })
    }
}

/// A rule around the address.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct Considered {
    /// The rule.
    #[serde(flatten)]
    pub rule: RuleView,
    /// Why it decides, or why it does not.
    pub why: String,
}

/// The socket that a packet is steered to.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct SocketView {
    /// Its address family.
    pub family: Family,
    /// Its transport.
    pub protocol: Protocol,
    /// Where it is bound; nothing if it is none of the service's.
    pub local: Option<SocketAddr>,
    /// The kernel's name for it, as `ss --extended` shows it.
    pub cookie: Option<u64>,
    /// How many sockets share its port. The kernel chooses one of them by the packet's addresses and ports.
    pub group: usize,
    /// The process that serves it.
    pub pid: Option<u32>,
    /// That process's name.
    pub process: Option<String>,
}

/// Whether packets to an address arrive at the host's sockets.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct RouteView {
    /// Whether the address is local.
    pub local: bool,
    /// The prefix of the route that decides about it.
    pub block: Option<Prefix>,
    /// Who made that route: 165 is anyport, 2 the kernel, others are in `/etc/iproute2/rt_protos`.
    pub protocol: Option<u8>,
    /// The same for people, and what to do.
    pub text: String,
}

/// The way of an answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct AnswerView {
    /// The interface by which it leaves; nothing if it does not leave.
    pub interface: Option<String>,
    /// The mark of the service, if it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mark: Option<Mark>,
    /// The same for people, and what stops it.
    pub text: String,
}

/// A socket of the host that waits for strangers.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct ListenerView {
    /// Its transport.
    pub protocol: Protocol,
    /// Where it is bound.
    pub local: SocketAddr,
    /// Its inode, by which the process is found that holds it.
    #[serde(default)]
    pub inode: u64,
    /// The process that holds it, as far as that can be seen: `anyportctl` looks by itself where the daemon may not.
    pub pid: Option<u32>,
    /// That process's name.
    pub process: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::{Endpoint, Explain};
    use crate::{as_text::expect_same_json, rules::Protocol};

    #[test]
    fn json_of_endpoints() {
        expect_same_json::<Endpoint>(&["192.0.2.7:80", "[2001:db8::7]:65535"]);
    }

    #[test]
    fn refuses_what_stands_in_no_packet_and_says_why() {
        for (text, why) in [
            ("", "not an address and a port"),
            ("192.0.2.7", "write ADDRESS:PORT"),
            ("192.0.2.7:", "write ADDRESS:PORT"),
            ("192.0.2.0/24:80", "write ADDRESS:PORT"),
            ("2001:db8::7:80", "[2001:db8::7]:80"),
            ("www.example.com:80", "not an address and a port"),
            ("192.0.2.7:65536", "not an address and a port"),
            ("192.0.2.7:0", "from 1 to 65535"),
            ("[::ffff:192.0.2.7]:80", "IPv4-mapped"),
            ("[fe80::1%2]:80", "interfaces"),
        ] {
            let error = text.parse::<Endpoint>().unwrap_err().to_string();
            assert!(error.contains(why), "{text:?}: {error}");
        }
        let of = |from: &str, protocol| Explain {
            protocol,
            to: "192.0.2.7:80".parse().unwrap(),
            from: Some(from.parse().unwrap()),
            via: None,
        };
        assert!(of("192.0.2.7:80", Protocol::Udp).validate().is_ok());
        assert!(of("192.0.2.7:80", Protocol::Both).validate().unwrap_err().error.contains("not both"));
        assert!(of("[::1]:80", Protocol::Tcp).validate().unwrap_err().error.contains("same IP version"));
    }
}
