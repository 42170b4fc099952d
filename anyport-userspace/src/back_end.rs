//! The back ends, and which of them is to be used.

use std::fmt;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A way to hand packets to sockets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum BackEnd {
    /// A BPF program where the kernel looks sockets up. Linux 5.10.
    SkLookup,
    /// A BPF program at the ingress of interfaces. Linux 6.6.
    Tc,
    /// The TPROXY target of iptables.
    Tproxy,
}

impl BackEnd {
    /// All of them, the best first.
    pub const ALL: [Self; 3] = [Self::SkLookup, Self::Tc, Self::Tproxy];
}

impl fmt::Display for BackEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::SkLookup => "sk-lookup",
            Self::Tc => "tc",
            Self::Tproxy => "tproxy",
        })
    }
}

/// Which back end to use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Choice {
    /// The first of them that works here.
    #[default]
    Auto,
    /// A BPF program where the kernel looks sockets up.
    SkLookup,
    /// A BPF program at the ingress of interfaces.
    Tc,
    /// The TPROXY target of iptables.
    Tproxy,
}

impl Choice {
    /// The back end that was asked for, unless any will do.
    pub fn back_end(self) -> Option<BackEnd> {
        match self {
            Self::Auto => None,
            Self::SkLookup => Some(BackEnd::SkLookup),
            Self::Tc => Some(BackEnd::Tc),
            Self::Tproxy => Some(BackEnd::Tproxy),
        }
    }
}

impl fmt::Display for Choice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.back_end() {
            Some(back_end) => back_end.fmt(f),
            None => f.write_str("auto"),
        }
    }
}
