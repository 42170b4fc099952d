//! What a service is called and what it does with what it gets.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::rules::{InvalidText, ServiceName};

/// Longest banner in bytes: what the kernel takes at once even from a client that reads nothing.
const MAX_BANNER: usize = 1024;

/// What the daemon does with what arrives at a service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum HandlerKind {
    /// Tells clients who they are and what they dialled.
    Hello,
    /// Returns what it gets.
    Echo,
    /// Reads and forgets, after a banner if there is one.
    Discard,
}

impl fmt::Display for HandlerKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Hello => "hello",
            Self::Echo => "echo",
            Self::Discard => "discard",
        })
    }
}

/// A service as the operator describes it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct ServiceConfig {
    /// Its name.
    pub name: ServiceName,
    /// What it does.
    pub handler: HandlerKind,
    /// What `discard` says first over TCP, exactly as written: nothing is appended. 1 to 1,024 bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub banner: Option<String>,
}

impl ServiceConfig {
    /// The service that is there when nobody has made one of its name: it greets.
    pub fn default_service() -> Self {
        Self { name: ServiceName::default_service(), handler: HandlerKind::Hello, banner: None }
    }

    /// Whether the settings fit each other.
    pub fn validate(&self) -> Result<(), InvalidText> {
        let Self { name, handler, banner } = self;
        let invalid = |why: String| Err(InvalidText(format!("service {name}: {why}")));
        let Some(banner) = banner else { return Ok(()) };
        if *handler != HandlerKind::Discard {
            invalid(format!("the handler {handler} has no banner; leave it out or use the handler discard"))
        } else if banner.is_empty() {
            invalid("the banner is empty; leave it out".into())
        } else if banner.len() > MAX_BANNER {
            invalid(format!("the banner has {} bytes; {MAX_BANNER} are the limit", banner.len()))
        } else {
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{HandlerKind, MAX_BANNER, ServiceConfig};

    fn config(handler: HandlerKind, banner: Option<&str>) -> ServiceConfig {
        ServiceConfig { name: "edge".parse().unwrap(), handler, banner: banner.map(Into::into) }
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
    fn reads_and_writes_what_files_hold() {
        let text = r#"{"name":"edge","handler":"discard","banner":"hi"}"#;
        let read: ServiceConfig = serde_json::from_str(text).unwrap();
        assert_eq!(read, config(HandlerKind::Discard, Some("hi")));
        assert_eq!(serde_json::to_string(&read).unwrap(), text);
        let unknown = serde_json::from_str::<ServiceConfig>(r#"{"name":"a","handler":"echo","baner":"x"}"#);
        assert!(unknown.unwrap_err().to_string().contains("unknown field `baner`"));
    }
}
