//! The settings of `forward`.

use std::{
    fmt::{self, Write as _},
    net::IpAddr,
    num::{NonZeroU16, NonZeroU32},
    str::FromStr,
};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize, de::DeserializeOwned};

pub use super::{super::socket_options::TcpOptions, header::ProxyVersion};
use crate::{
    as_text::as_text,
    human_duration::HumanDuration,
    rules::{InvalidText, Prefix},
};

/// Where an upstream is, as the operator writes it: `ADDR:PORT`, `ADDR:*`, `NAME:PORT` or `NAME:*`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct UpstreamAddress {
    /// What to dial.
    pub host: Host,
    /// The port to dial; the one that the client dialled if there is none.
    pub port: Option<NonZeroU16>,
}

/// The part of an upstream before its port.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Host {
    /// An address.
    Address(IpAddr),
    /// A name that is resolved, to all its addresses.
    Name(String),
}

impl FromStr for UpstreamAddress {
    type Err = InvalidText;

    fn from_str(text: &str) -> Result<Self, InvalidText> {
        let wrong = |why: &str| {
            InvalidText(format!(
                "{text:?} is no upstream: {why}; upstreams are such as 198.51.100.5:80, [2001:db8::5]:80, \
                 origin.example:80, or with * for the port that was dialled"
            ))
        };
        let (host, port) = text.rsplit_once(':').ok_or_else(|| wrong("it has no port"))?;
        let port = match port {
            "*" => None,
            port => Some(port.parse().map_err(|_| wrong("the port is not a number from 1 to 65535"))?),
        };
        let host = match host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
            Some(address) => {
                Host::Address(IpAddr::V6(address.parse().map_err(|_| wrong("not an IPv6 address in brackets"))?))
            }
            None if host.contains(':') => return Err(wrong("an IPv6 address stands in brackets")),
            None => match host.parse() {
                Ok(address) => Host::Address(address),
                Err(_) if is_name(host) => Host::Name(host.to_ascii_lowercase()),
                Err(_) => return Err(wrong("neither an address nor a name")),
            },
        };
        match &host {
            Host::Address(address) if address.to_canonical() != *address => {
                Err(wrong("write IPv4 addresses as such, not as IPv6 addresses"))
            }
            Host::Address(address) if address.is_unspecified() || address.is_multicast() => {
                Err(wrong("nobody can be dialled there"))
            }
            _ => Ok(Self { host, port }),
        }
    }
}

/// Whether this can be a host's name: labels of letters, digits, `-` and `_`, the last one not a number.
fn is_name(text: &str) -> bool {
    let mut labels = text.strip_suffix('.').unwrap_or(text).split('.');
    let is_label = |label: &str| {
        (1..=63).contains(&label.len())
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    text.len() <= 253
        && labels.clone().all(is_label)
        && labels.next_back().is_some_and(|last| !last.bytes().all(|byte| byte.is_ascii_digit()))
}

impl fmt::Display for UpstreamAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.host {
            Host::Address(IpAddr::V6(address)) => write!(f, "[{address}]:")?,
            Host::Address(address) => write!(f, "{address}:")?,
            Host::Name(name) => write!(f, "{name}:")?,
        }
        match self.port {
            Some(port) => write!(f, "{port}"),
            None => f.write_str("*"),
        }
    }
}

as_text!(UpstreamAddress, such as "198.51.100.5:80");

/// Which of several upstreams gets the next connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Balance {
    /// One after the other.
    #[default]
    RoundRobin,
    /// The one with the fewest open connections.
    LeastConnections,
    /// Always the same one for a client's address, as long as it is usable.
    SourceHash,
}

/// What becomes of connections to an upstream that is down, or that is not among the upstreams any more.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum OnDown {
    /// They go on for as long as both sides do.
    #[default]
    Keep,
    /// They are reset.
    Close,
}

/// What becomes of flows to an upstream that is down, or that is not among the upstreams any more, and of flows that are
/// not steered here any more.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum OnDownUdp {
    /// They end, and the client's next datagram goes where new ones go.
    #[default]
    Move,
    /// They go on until they are idle.
    Keep,
}

/// How upstreams are tried when nobody dials them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct HealthCheck {
    /// Time between two checks of an upstream.
    pub interval: HumanDuration,
    /// How long a connection may take to come to be.
    pub timeout: HumanDuration,
    /// So many in a row that succeed bring an upstream up.
    pub rise: NonZeroU32,
    /// So many in a row that fail take it down.
    pub fall: NonZeroU32,
    /// The port to check; needed where the upstream has none of its own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub port: Option<NonZeroU16>,
}

impl Default for HealthCheck {
    fn default() -> Self {
        let times = |count| NonZeroU32::new(count).unwrap_or(NonZeroU32::MIN);
        Self {
            interval: HumanDuration::seconds(2),
            timeout: HumanDuration::seconds(1),
            rise: times(2),
            fall: times(3),
            port: None,
        }
    }
}

/// When an upstream that clients could not be connected to gets no more of them for a while.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct Ejection {
    /// So many failures in a row; 0 for never.
    pub failures: u32,
    /// For how long.
    pub time: HumanDuration,
}

impl Default for Ejection {
    fn default() -> Self {
        Self { failures: 3, time: HumanDuration::seconds(10) }
    }
}

/// How datagrams are forwarded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct UdpOptions {
    /// A flow over which nothing was said for this long is forgotten. Two minutes are the least for NATs (RFC 4787, REQ-5).
    pub idle_timeout: HumanDuration,
    /// The same for flows to port 53, which may be shorter (REQ-5a).
    pub dns_idle_timeout: HumanDuration,
    /// What becomes of those that have no place any more.
    pub on_down: OnDownUdp,
    /// Most flows at a time; the least recently used go first.
    pub max_flows: NonZeroU32,
    /// A flow is over when so many datagrams have come for each one that was sent to the upstream; without, only when it is idle.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub responses: Option<NonZeroU32>,
}

impl Default for UdpOptions {
    fn default() -> Self {
        let max_flows = NonZeroU32::MIN.saturating_add((1 << 14) - 1);
        Self {
            idle_timeout: HumanDuration::seconds(2 * 60),
            dns_idle_timeout: HumanDuration::seconds(10),
            on_down: OnDownUdp::default(),
            max_flows,
            responses: None,
        }
    }
}

/// Where a service forwards to, and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ForwardConfig {
    /// At least one.
    pub upstreams: Vec<UpstreamAddress>,
    /// Which of them gets the next connection.
    pub balance: Balance,
    /// Whether upstreams are told who dialled what.
    pub proxy_protocol: Option<ProxyVersion>,
    /// Peers that tell us who dialled what.
    pub accept_proxy: Vec<Prefix>,
    /// Whether upstreams see the client's address as the source.
    pub transparent_source: bool,
    /// How long a connection to an upstream may take to come to be.
    pub connect_timeout: HumanDuration,
    /// How many other upstreams are tried after the first.
    pub retries: u32,
    /// A connection over which nothing was said for this long is closed, after half as much more at the latest.
    pub idle_timeout: HumanDuration,
    /// A connection is closed after this time.
    pub max_duration: Option<HumanDuration>,
    /// What becomes of connections to an upstream that gets no more of them.
    pub on_down: OnDown,
    /// How upstreams are tried when nobody dials them; not at all if absent.
    pub health_check: Option<HealthCheck>,
    /// When an upstream gets no clients for a while.
    pub ejection: Ejection,
    /// How often names are resolved again.
    pub resolve_interval: HumanDuration,
    /// Options of the sockets.
    pub tcp: TcpOptions,
    /// How datagrams are forwarded.
    pub udp: UdpOptions,
}

impl Default for ForwardConfig {
    fn default() -> Self {
        Self {
            upstreams: Vec::new(),
            balance: Balance::default(),
            proxy_protocol: None,
            accept_proxy: Vec::new(),
            transparent_source: false,
            connect_timeout: HumanDuration::seconds(3),
            retries: 2,
            idle_timeout: HumanDuration::seconds(5 * 60),
            max_duration: None,
            on_down: OnDown::default(),
            health_check: None,
            ejection: Ejection::default(),
            resolve_interval: HumanDuration::seconds(30),
            tcp: TcpOptions::default(),
            udp: UdpOptions::default(),
        }
    }
}

impl ForwardConfig {
    /// Whether the settings fit each other.
    ///
    /// # Errors
    /// Which do not, and what to do.
    pub fn validate(&self) -> Result<(), InvalidText> {
        const MOST: usize = 1000;
        let invalid = |why: String| Err(InvalidText(why));
        if self.upstreams.is_empty() {
            return invalid("the handler forward needs upstreams, such as upstreams = [\"198.51.100.5:80\"]".into());
        }
        if self.upstreams.len() > MOST {
            return invalid(format!("{} upstreams; {MOST} are the limit", self.upstreams.len()));
        }
        for (at, upstream) in self.upstreams.iter().enumerate() {
            if self.upstreams[..at].contains(upstream) {
                return invalid(format!("the upstream {upstream} stands there twice"));
            }
            if upstream.port.is_none() && self.health_check.is_some_and(|check| check.port.is_none()) {
                return invalid(format!(
                    "the upstream {upstream} has no port of its own: health-check needs a port, such as port = 80"
                ));
            }
        }
        Ok(())
    }
}

/// Reads a table of settings that is written as one word, such as `interval=2s,rise=3`.
///
/// # Errors
/// A key that the table does not have, or a value that is none.
pub(in crate::service) fn table_of_words<T: DeserializeOwned>(text: &str) -> Result<T, String> {
    let mut toml = String::new();
    for pair in text.split(',').filter(|pair| !pair.is_empty()) {
        let (key, value) = pair.split_once('=').ok_or_else(|| format!("{pair:?} is not KEY=VALUE"))?;
        let is_bare = |text: &str| text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b".-".contains(&byte));
        if !is_bare(key) || !is_bare(value) {
            return Err(format!("{pair:?} is not KEY=VALUE"));
        }
        let quote = if value.parse::<u64>().is_ok() || value.parse::<bool>().is_ok() { "" } else { "\"" };
        // Writing to a string does not fail.
        writeln!(toml, "{key} = {quote}{value}{quote}").ok();
    }
    toml::from_str(&toml).map_err(|error| error.message().to_owned())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::{Ejection, ForwardConfig, HealthCheck, HumanDuration, TcpOptions, UpstreamAddress, table_of_words};
    use crate::as_text::expect_same_json;

    #[test]
    fn reads_and_writes_upstreams() {
        for text in ["198.51.100.5:80", "198.51.100.5:*", "[2001:db8::5]:443", "[2001:db8::5]:*", "a.example:80", "a:*"]
        {
            assert_eq!(text.parse::<UpstreamAddress>().unwrap().to_string(), text);
        }
        for (text, why) in [
            ("198.51.100.5", "has no port"),
            ("198.51.100.5:0", "1 to 65535"),
            ("198.51.100.5:65536", "1 to 65535"),
            ("198.51.100.5:http", "1 to 65535"),
            ("2001:db8::5:80", "in brackets"),
            ("[198.51.100.5]:80", "not an IPv6"),
            ("[::ffff:198.51.100.5]:80", "write IPv4 addresses as such"),
            ("198.51.100.555:80", "neither an address nor a name"),
            ("-a.example:80", "neither an address nor a name"),
            ("a..example:80", "neither an address nor a name"),
            (":80", "neither an address nor a name"),
            ("0.0.0.0:80", "nobody can be dialled"),
            ("[ff02::1]:80", "nobody can be dialled"),
        ] {
            let error = text.parse::<UpstreamAddress>().unwrap_err().to_string();
            assert!(error.contains(why), "{text:?}: {error}");
        }
        expect_same_json::<UpstreamAddress>(&["198.51.100.5:80", "[2001:db8::5]:*", "a.example:80"]);
    }

    #[test]
    fn reads_and_writes_times() {
        for text in ["10ms", "3s", "1m30s", "5m"] {
            assert_eq!(text.parse::<HumanDuration>().unwrap().to_string(), text);
        }
        for text in ["", "3", "9ms", "2years", "-1s", "soon"] {
            assert!(text.parse::<HumanDuration>().is_err(), "{text:?}");
        }
        expect_same_json::<HumanDuration>(&["10ms", "1m30s"]);
    }

    #[test]
    fn reads_tables_of_words() {
        let check: HealthCheck = table_of_words("interval=500ms,rise=1,port=8080").unwrap();
        assert_eq!((check.interval.0, check.rise.get(), check.fall.get()), (Duration::from_millis(500), 1, 3));
        assert_eq!(check.port.unwrap().get(), 8080);
        assert_eq!(table_of_words(""), Ok(Ejection::default()));
        assert!(table_of_words::<TcpOptions>("fast-open=true").unwrap().fast_open);
        for (text, why) in
            [("rise", "KEY=VALUE"), ("rise=0", "nonzero"), ("raise=1", "unknown field"), ("rise=\"1\"", "KEY=VALUE")]
        {
            let error = table_of_words::<HealthCheck>(text).unwrap_err();
            assert!(error.contains(why), "{text:?}: {error}");
        }
    }

    #[test]
    fn settings_fit_each_other() {
        let config = |upstreams: &[&str], health_check| ForwardConfig {
            upstreams: upstreams.iter().map(|it| it.parse().unwrap()).collect(),
            health_check,
            ..ForwardConfig::default()
        };
        let with_port = HealthCheck { port: Some(80.try_into().unwrap()), ..HealthCheck::default() };
        for (config, why) in [
            (config(&["198.51.100.5:*"], None), None),
            (config(&["198.51.100.5:*"], Some(with_port)), None),
            (config(&[], None), Some("needs upstreams")),
            (config(&["a:1", "b:1", "a:1"], None), Some("a:1 stands there twice")),
            (config(&["a:1", "b:*"], Some(HealthCheck::default())), Some("b:* has no port")),
        ] {
            match (config.validate(), why) {
                (Ok(()), None) => {}
                (Err(error), Some(why)) => assert!(error.to_string().contains(why), "{error}"),
                (verdict, why) => panic!("{config:?}: {verdict:?} instead of {why:?}"),
            }
        }
    }
}
