//! The requests and answers at the socket for registering.

use std::{fmt, net::SocketAddr, str::FromStr};

use anyport_common::flow::Transport;
use serde::{Deserialize, Serialize};

use crate::rules::{Family, InvalidText, Protocol, ServiceName};

/// What is asked for at the socket for registering.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Request {
    /// Steer to these sockets from now on.
    Register(Register),
    /// Steer to them no more.
    Unregister(Unregister),
    /// Take answers to datagrams over this connection from now on.
    Answer(Answer),
}

impl Request {
    /// The service that it is about.
    pub fn service(&self) -> &ServiceName {
        match self {
            Self::Register(Register { service, .. })
            | Self::Unregister(Unregister { service, .. })
            | Self::Answer(Answer { service }) => service,
        }
    }
}

/// Has the sockets registered whose descriptors come with the request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Register {
    /// Who receives.
    pub service: ServiceName,
    /// The process that serves them, if it is not the one that asks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pid: Option<u32>,
}

/// Which sockets to give up: all of the service, or fewer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Unregister {
    /// Whose they are.
    pub service: ServiceName,
    /// Only those for this transport.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub protocol: Option<Protocol>,
    /// Only those for packets of this family.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub family: Option<Family>,
}

/// Whose answers are to be taken.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Answer {
    /// The original destinations must be steered to it.
    pub service: ServiceName,
}

/// Where a socket waits, as `tcp:127.0.0.1:8080` or `udp:[::]:53`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Listen {
    /// Its transport.
    pub transport: Transport,
    /// Where it is bound.
    pub local: SocketAddr,
}

impl FromStr for Listen {
    type Err = InvalidText;

    fn from_str(text: &str) -> Result<Self, InvalidText> {
        let parsed = text.split_once(':').and_then(|(transport, local)| {
            let transport = match transport {
                "tcp" => Transport::Tcp,
                "udp" => Transport::Udp,
                _ => return None,
            };
            Some(Self { transport, local: local.parse().ok()? })
        });
        parsed.ok_or_else(|| InvalidText(format!("{text:?} is no tcp:ADDR:PORT or udp:ADDR:PORT, such as udp:[::]:53")))
    }
}

impl fmt::Display for Listen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { transport, local } = self;
        write!(f, "{}:{local}", Protocol::from(*transport))
    }
}

#[cfg(test)]
mod tests {
    use super::{Listen, Request};

    #[test]
    fn places_read_back_as_written() {
        for text in ["tcp:127.0.0.1:8080", "udp:[::]:53"] {
            assert_eq!(text.parse::<Listen>().unwrap().to_string(), text);
        }
        for text in ["127.0.0.1:80", "tcp:127.0.0.1", "sctp:127.0.0.1:80", "tcp:host:80", "tcp::::80", ""] {
            assert!(text.parse::<Listen>().unwrap_err().to_string().contains("tcp:ADDR:PORT"), "{text}");
        }
    }

    #[test]
    fn requests_are_checked_key_by_key() {
        for text in [
            r#"{"register":{"service":"web"}}"#,
            r#"{"register":{"service":"web","pid":7}}"#,
            r#"{"unregister":{"service":"web","protocol":"tcp","family":"ipv6"}}"#,
            r#"{"answer":{"service":"web"}}"#,
        ] {
            let request: Request = serde_json::from_str(text).unwrap();
            assert_eq!(serde_json::to_string(&request).unwrap(), text);
        }
        for text in [
            r#"{"register":{"service":"web","port":80}}"#,
            r#"{"register":{}}"#,
            r#"{"register":{"service":"web","pid":7,"fd":3}}"#,
            r#"{"register":{"service":"web\n"}}"#,
            r#"{"unregister":{"service":"web","family":"unix"}}"#,
            r#"{"register":{"service":"a"},"unregister":{"service":"a"}}"#,
            r#"{"steal":{"service":"a"}}"#,
        ] {
            assert!(serde_json::from_str::<Request>(text).is_err(), "{text}");
        }
    }
}
