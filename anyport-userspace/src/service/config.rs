//! What a service is called and what it does with what it gets.

use std::{fmt, net::IpAddr, num::NonZeroU32, sync::Arc};

use anyport_common::flow::Transport;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::forward::config::{
    Balance, Ejection, ForwardConfig, HealthCheck, Host, OnDown, ProxyVersion, TcpOptions, UdpOptions, UpstreamAddress,
    table_of_words,
};
use super::{Limits, Rate, Registrant, mark::Mark};
use crate::{
    human_duration::HumanDuration,
    rules::{InvalidText, Prefix, ServiceName, SourceLists},
};

/// Longest banner in bytes: what the kernel takes at once even from a client that reads nothing.
const MAX_BANNER: usize = 1024;

/// What the daemon does with what arrives at a service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, clap::ValueEnum, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum HandlerKind {
    /// Tells clients who they are and what they dialled.
    Hello,
    /// Returns what it gets.
    Echo,
    /// Reads and forgets, after a banner if there is one.
    Discard,
    /// Connects clients to upstreams.
    Forward,
    /// Nothing: other processes serve it, with sockets that they register.
    Registered,
}

impl fmt::Display for HandlerKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Hello => "hello",
            Self::Echo => "echo",
            Self::Discard => "discard",
            Self::Forward => "forward",
            Self::Registered => "registered",
        })
    }
}

/// A service as the operator describes it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(from = "ServiceTable", into = "ServiceTable")]
pub struct ServiceConfig {
    /// Its name.
    pub name: ServiceName,
    /// What it does.
    pub handler: HandlerKind,
    /// What `discard` says first over TCP, exactly as written: nothing is appended. 1 to 1,024 bytes.
    pub banner: Option<String>,
    /// Who may register sockets for `registered`, beside root and the group `anyport`.
    pub owners: Vec<Registrant>,
    /// Who receives what `registered` has no live socket for; it is refused if there is none.
    pub fallback: Option<ServiceName>,
    /// A line of the log for one of so many connections and forwarded flows, at their end; none if absent.
    pub connection_log: Option<NonZeroU32>,
    /// Limits on connections, for those with sockets of the daemon.
    pub limits: Limits,
    /// Whose connections and datagrams it takes.
    pub sources: Arc<SourceLists>,
    /// The mark of what it answers.
    pub mark: Option<Mark>,
    /// The settings of `forward`.
    pub forward: Option<Box<ForwardConfig>>,
}

impl ServiceConfig {
    /// The upstreams that are named by address.
    pub fn upstream_addresses(&self) -> impl Iterator<Item = IpAddr> {
        let upstreams = self.forward.iter().flat_map(|forward| &forward.upstreams);
        upstreams.filter_map(|upstream| match upstream.host {
            Host::Address(address) => Some(address),
            Host::Name(_) => None,
        })
    }

    /// A service without settings.
    pub fn new(name: ServiceName, handler: HandlerKind) -> Self {
        Self {
            name,
            handler,
            banner: None,
            owners: Vec::new(),
            fallback: None,
            connection_log: None,
            limits: Limits::default(),
            sources: Arc::default(),
            mark: None,
            forward: None,
        }
    }

    /// The service that is there when nobody has made one of its name: it greets.
    pub fn default_service() -> Self {
        Self::new(ServiceName::default_service(), HandlerKind::Hello)
    }

    /// Whether the daemon has sockets for it of this transport. Version 1 of the PROXY protocol has no words for UDP.
    pub fn has_sockets(&self, transport: Transport) -> bool {
        let speaks_of = |forward: &ForwardConfig| forward.proxy_protocol != Some(ProxyVersion::V1);
        self.handler != HandlerKind::Registered
            && (transport == Transport::Tcp || self.forward.as_deref().is_none_or(speaks_of))
    }

    /// Refuses owners whose name nobody has: nobody could ever register.
    ///
    /// # Errors
    /// Names the first.
    pub fn expect_owners(&self) -> Result<(), InvalidText> {
        let Self { name, owners, .. } = self;
        match owners.iter().find(|it| it.is_unknown()) {
            None => Ok(()),
            Some(unknown) => Err(InvalidText(format!(
                "service {name}: there is no {unknown} to own its sockets; correct the name, make that first, or give a number"
            ))),
        }
    }

    /// Whether the settings fit each other.
    pub fn validate(&self) -> Result<(), InvalidText> {
        let Self { name, handler, banner, owners, fallback, connection_log, limits, sources, mark, forward } = self;
        let is_registered = *handler == HandlerKind::Registered || (owners.is_empty() && fallback.is_none());
        let checked = check_banner(*handler, banner.as_deref()).and_then(|()| sources.validate());
        let checked = checked.and_then(|()| match (handler, forward) {
            _ if !is_registered => {
                Err(InvalidText(format!("the handler {handler} has neither owners nor fallback; only registered has")))
            }
            _ if *handler == HandlerKind::Registered && connection_log.is_some() => Err(InvalidText(
                "connections to registered sockets are their owner's to log; leave connection-log out".into(),
            )),
            _ if *handler == HandlerKind::Registered && *limits != Limits::default() => Err(InvalidText(
                "connections to registered sockets are their owner's to limit; leave max-connections, \
                 max-connections-per-source and accept-rate-per-source out"
                    .into(),
            )),
            _ if *handler == HandlerKind::Registered && mark.is_some() => Err(InvalidText(
                "registered sockets have the mark that their owner gives them (SO_MARK); leave mark out".into(),
            )),
            _ if fallback.as_ref() == Some(name) => Err(InvalidText("it can't be its own fallback".into())),
            (HandlerKind::Forward, Some(forward)) => forward.validate(),
            (HandlerKind::Forward, None) => ForwardConfig::default().validate(),
            (_, Some(_)) => Err(InvalidText(format!(
                "the handler {handler} forwards nothing; leave upstreams and the like out, or use the handler forward"
            ))),
            (_, None) => Ok(()),
        });
        checked.map_err(|InvalidText(why)| InvalidText(format!("service {name}: {why}")))
    }
}

fn check_banner(handler: HandlerKind, banner: Option<&str>) -> Result<(), InvalidText> {
    let invalid = |why: String| Err(InvalidText(why));
    let Some(banner) = banner else { return Ok(()) };
    if handler != HandlerKind::Discard {
        invalid(format!("the handler {handler} has no banner; leave it out or use the handler discard"))
    } else if banner.is_empty() {
        invalid("the banner is empty; leave it out".into())
    } else if banner.len() > MAX_BANNER {
        invalid(format!("the banner has {} bytes; {MAX_BANNER} are the limit", banner.len()))
    } else {
        Ok(())
    }
}

/// A service as it stands in files, requests and on the command line: all settings of all handlers side by side.
#[derive(Clone, Debug, Serialize, Deserialize, clap::Args, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) struct ServiceTable {
    /// Its name: lower-case letters, digits, and . _ - inside
    name: ServiceName,
    /// What it does with what it accepts
    #[arg(long, value_enum)]
    handler: HandlerKind,
    /// What discard sends first on a TCP connection
    #[arg(long, value_name = "TEXT")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    banner: Option<String>,
    /// Who may register sockets, beside root and the group anyport: user:NAME or group:NAME; may be repeated
    #[arg(long = "owner", value_name = "WHO")]
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    owners: Vec<Registrant>,
    /// The service that receives while no live socket is registered
    #[arg(long, value_name = "NAME")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    fallback: Option<ServiceName>,
    /// Log one of so many connections at their end; 1 for all of them
    #[arg(long, value_name = "N")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    connection_log: Option<NonZeroU32>,
    /// How many connections, and flows of datagrams, may be open [default: as many as the daemon may have]
    #[arg(long, value_name = "N")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    max_connections: Option<NonZeroU32>,
    /// How many of them one source may have, an IPv4 address or a /64 of IPv6 [default: four for each that is free]
    #[arg(long, value_name = "N")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    max_connections_per_source: Option<NonZeroU32>,
    /// How fast one source may open them: 100/s, 20/10s; as many may come at once [default: no limit]
    #[arg(long, value_name = "N/TIME")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    accept_rate_per_source: Option<Rate>,
    /// Take connections and datagrams from there only; may be repeated
    #[arg(long, value_name = "PREFIX", value_delimiter = ',')]
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    source_allow: Vec<Prefix>,
    /// Take none from there; of this and --source-allow the longest prefix decides; may be repeated
    #[arg(long, value_name = "PREFIX", value_delimiter = ',')]
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    source_deny: Vec<Prefix>,
    /// Mark its answers for policy routing and firewalls, such as 0x10
    #[arg(long, value_name = "MARK")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    mark: Option<Mark>,
    /// Where forward connects to: ADDR:PORT, NAME:PORT, or with * for the port that was dialled; may be repeated
    #[arg(long = "upstream", value_name = "ADDR:PORT")]
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    upstreams: Vec<UpstreamAddress>,
    /// Which upstream gets the next connection [default: round-robin]
    #[arg(long, value_enum)]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    balance: Option<Balance>,
    /// Tell upstreams who dialled what, by the PROXY protocol of this version
    #[arg(long, value_enum, value_name = "VERSION")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    proxy_protocol: Option<ProxyVersion>,
    /// Peers that have to say who dialled what, by the PROXY protocol
    #[arg(long, value_name = "PREFIX", value_delimiter = ',')]
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    accept_proxy: Vec<Prefix>,
    /// Dial upstreams from the client's address; their answers must be routed back here
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    transparent_source: Option<bool>,
    /// How long a connection to an upstream may take to come to be [default: 3s]
    #[arg(long, value_name = "TIME")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    connect_timeout: Option<HumanDuration>,
    /// How many other upstreams are tried after the first [default: 2]
    #[arg(long, value_name = "N")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    retries: Option<u32>,
    /// Close connections over which nothing was said for this long [default: 5m]
    #[arg(long, value_name = "TIME")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    idle_timeout: Option<HumanDuration>,
    /// Close connections after this time [default: never]
    #[arg(long, value_name = "TIME")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    max_duration: Option<HumanDuration>,
    /// What becomes of connections whose upstream is down or taken out [default: keep]
    #[arg(long, value_enum)]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    on_down: Option<OnDown>,
    /// Try upstreams by connecting to them; interval=2s,timeout=1s,rise=2,fall=3 and port=N if given without a value
    #[arg(
        long, value_name = "KEY=VALUE,...", num_args = 0..=1, require_equals = true, default_missing_value = "",
        value_parser = table_of_words::<HealthCheck>
    )]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    health_check: Option<HealthCheck>,
    /// When an upstream gets no more clients for a while [default: failures=3,time=10s; failures=0 for never]
    #[arg(long, value_name = "KEY=VALUE,...", value_parser = table_of_words::<Ejection>)]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    ejection: Option<Ejection>,
    /// How often names of upstreams are resolved again [default: 30s]
    #[arg(long, value_name = "TIME")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    resolve_interval: Option<HumanDuration>,
    /// Socket options: nodelay=true, keepalive=TIME, fast-open=false, send-buffer=BYTES, receive-buffer=BYTES
    #[arg(long, value_name = "KEY=VALUE,...", value_parser = table_of_words::<TcpOptions>)]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    tcp: Option<TcpOptions>,
    /// How datagrams are forwarded [default: idle-timeout=2m,dns-idle-timeout=10s,on-down=move,max-flows=16384; also
    /// responses=N]
    #[arg(long, value_name = "KEY=VALUE,...", value_parser = table_of_words::<UdpOptions>)]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    udp: Option<UdpOptions>,
}

impl From<ServiceTable> for ServiceConfig {
    fn from(table: ServiceTable) -> Self {
        let default = ForwardConfig::default();
        let forward = ForwardConfig {
            upstreams: table.upstreams,
            balance: table.balance.unwrap_or(default.balance),
            proxy_protocol: table.proxy_protocol,
            accept_proxy: table.accept_proxy,
            transparent_source: table.transparent_source.unwrap_or(default.transparent_source),
            connect_timeout: table.connect_timeout.unwrap_or(default.connect_timeout),
            retries: table.retries.unwrap_or(default.retries),
            idle_timeout: table.idle_timeout.unwrap_or(default.idle_timeout),
            max_duration: table.max_duration,
            on_down: table.on_down.unwrap_or(default.on_down),
            health_check: table.health_check,
            ejection: table.ejection.unwrap_or(default.ejection),
            resolve_interval: table.resolve_interval.unwrap_or(default.resolve_interval),
            tcp: table.tcp.unwrap_or(default.tcp),
            udp: table.udp.unwrap_or(default.udp),
        };
        let forward = (forward != ForwardConfig::default()).then(|| Box::new(forward));
        Self {
            name: table.name,
            handler: table.handler,
            banner: table.banner,
            owners: table.owners,
            fallback: table.fallback,
            connection_log: table.connection_log,
            limits: Limits {
                max_connections: table.max_connections,
                max_connections_per_source: table.max_connections_per_source,
                accept_rate_per_source: table.accept_rate_per_source,
            },
            sources: Arc::new(SourceLists::new(table.source_allow, table.source_deny)),
            mark: table.mark,
            forward,
        }
    }
}

impl From<ServiceConfig> for ServiceTable {
    /// Settings that are as they are by default are left out.
    fn from(config: ServiceConfig) -> Self {
        fn unless<T: PartialEq>(value: T, default: &T) -> Option<T> {
            (value != *default).then_some(value)
        }
        let ServiceConfig { name, handler, banner, owners, fallback, connection_log, limits, sources, mark, forward } =
            config;
        let default = ForwardConfig::default();
        let forward = forward.map_or_else(|| default.clone(), |it| *it);
        Self {
            name,
            handler,
            banner,
            owners,
            fallback,
            connection_log,
            max_connections: limits.max_connections,
            max_connections_per_source: limits.max_connections_per_source,
            accept_rate_per_source: limits.accept_rate_per_source,
            source_allow: sources.allow().to_vec(),
            source_deny: sources.deny().to_vec(),
            mark,
            upstreams: forward.upstreams,
            balance: unless(forward.balance, &default.balance),
            proxy_protocol: forward.proxy_protocol,
            accept_proxy: forward.accept_proxy,
            transparent_source: unless(forward.transparent_source, &default.transparent_source),
            connect_timeout: unless(forward.connect_timeout, &default.connect_timeout),
            retries: unless(forward.retries, &default.retries),
            idle_timeout: unless(forward.idle_timeout, &default.idle_timeout),
            max_duration: forward.max_duration,
            on_down: unless(forward.on_down, &default.on_down),
            health_check: forward.health_check,
            ejection: unless(forward.ejection, &default.ejection),
            resolve_interval: unless(forward.resolve_interval, &default.resolve_interval),
            tcp: unless(forward.tcp, &default.tcp),
            udp: unless(forward.udp, &default.udp),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{HandlerKind, MAX_BANNER, ServiceConfig};

    fn config(handler: HandlerKind, banner: Option<&str>) -> ServiceConfig {
        ServiceConfig { banner: banner.map(Into::into), ..ServiceConfig::new("edge".parse().unwrap(), handler) }
    }

    #[test]
    fn a_banner_is_for_discard() {
        let long = "x".repeat(MAX_BANNER + 1);
        for (handler, banner, why) in [
            (HandlerKind::Hello, None, None),
            (HandlerKind::Discard, Some("SSH-2.0-x\r\n"), None),
            (HandlerKind::Discard, Some(&long[1..]), None),
            (HandlerKind::Hello, Some("x"), Some("the handler hello has no banner")),
            (HandlerKind::Echo, Some("x"), Some("the handler echo has no banner")),
            (HandlerKind::Discard, Some(""), Some("empty")),
            (HandlerKind::Discard, Some(&long), Some("1025 bytes")),
        ] {
            let verdict = config(handler, banner).validate().err().map(|error| error.to_string());
            match (verdict, why) {
                (None, None) => {}
                (Some(error), Some(why)) => assert!(error.contains(why), "{error}"),
                (verdict, why) => panic!("{handler} {banner:?}: {verdict:?} instead of {why:?}"),
            }
        }
    }

    #[test]
    fn owners_and_fallback_are_for_registered() {
        let text = r#"{"name":"edge","handler":"HANDLER","owners":["user:0"],"fallback":"FALLBACK"}"#;
        for (handler, fallback, why) in [
            ("registered", "default", None),
            ("echo", "default", Some("the handler echo has neither owners nor fallback")),
            ("registered", "edge", Some("its own fallback")),
        ] {
            let text = text.replace("HANDLER", handler).replace("FALLBACK", fallback);
            let read: ServiceConfig = serde_json::from_str(&text).unwrap();
            let verdict = read.validate().map_err(|error| error.to_string());
            assert!(why.map_or(verdict.is_ok(), |why| verdict.clone().unwrap_err().contains(why)), "{verdict:?}");
            assert_eq!(serde_json::to_string(&read).unwrap(), text);
        }
    }

    #[test]
    fn reads_and_writes_what_files_hold() {
        let text = r#"{"name":"edge","handler":"discard","banner":"hi"}"#;
        let read: ServiceConfig = serde_json::from_str(text).unwrap();
        assert_eq!(read, config(HandlerKind::Discard, Some("hi")));
        assert_eq!(serde_json::to_string(&read).unwrap(), text);
        let unknown = serde_json::from_str::<ServiceConfig>(r#"{"name":"a","handler":"echo","baner":"x"}"#);
        assert!(unknown.unwrap_err().to_string().contains("unknown field `baner`"));
    }

    #[test]
    fn settings_of_forward_stand_beside_the_others() {
        let text = concat!(
            r#"{"name":"edge","handler":"forward","upstreams":["198.51.100.5:*","origin.example:8080"],"#,
            r#""balance":"least-connections","proxy-protocol":"v2","accept-proxy":["198.51.100.0/24"],"#,
            r#""transparent-source":true,"connect-timeout":"1s","retries":0,"idle-timeout":"1m","max-duration":"1h","on-down":"close","#,
            r#""health-check":{"interval":"1s","timeout":"1s","rise":2,"fall":3,"port":80},"#,
            r#""ejection":{"failures":1,"time":"1s"},"resolve-interval":"5s","#,
            r#""tcp":{"nodelay":false,"keepalive":"30s","fast-open":true,"send-buffer":65536,"receive-buffer":65536}}"#,
        );
        let read: ServiceConfig = serde_json::from_str(text).unwrap();
        read.validate().unwrap();
        assert_eq!(serde_json::to_string(&read).unwrap(), text);
        let short = r#"{"name":"edge","handler":"forward","upstreams":["a:1"]}"#;
        let read: ServiceConfig = serde_json::from_str(short).unwrap();
        assert_eq!(serde_json::to_string(&read).unwrap(), short);
    }

    #[test]
    fn settings_of_forward_are_for_forward() {
        for (text, why) in [
            (r#"{"name":"a","handler":"forward"}"#, "needs upstreams"),
            (r#"{"name":"a","handler":"forward","upstreams":["a:1"],"banner":"x"}"#, "has no banner"),
            (r#"{"name":"a","handler":"echo","upstreams":["a:1"]}"#, "the handler echo forwards nothing"),
            (r#"{"name":"a","handler":"hello","retries":1}"#, "the handler hello forwards nothing"),
        ] {
            let read: ServiceConfig = serde_json::from_str(text).unwrap();
            let error = read.validate().unwrap_err().to_string();
            assert!(error.contains("service a: ") && error.contains(why), "{text}: {error}");
        }
    }
}
