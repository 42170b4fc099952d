//! How packets reach the services' sockets: one trait, three back ends.

pub mod bpf;
pub mod choose;
pub mod tproxy;

use std::{collections::HashMap, fmt, net::SocketAddr, os::fd::OwnedFd, sync::Arc};

use anyport_common::maps::{Counters, REFUSE, SOCKETS_PER_SERVICE};
use serde::{Deserialize, Serialize};

use crate::rules::{Rule, ServiceName};

/// A way to hand packets to sockets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum BackEnd {
    /// A BPF program where the kernel looks sockets up. Linux 5.9.
    SkLookup,
    /// A BPF program at the ingress of interfaces. Linux 5.8, 6.6 for services of several workers.
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

/// A rule with the number under which the kernel knows and counts it. A rule that stays keeps its number.
#[derive(Clone, Debug)]
pub struct NumberedRule {
    /// Below [`anyport_common::maps::MAX_RULES`].
    pub number: u32,
    /// The rule.
    pub rule: Rule,
}

/// One socket out of a service's group for one transport and family; the kernel finds the others by it.
#[derive(Clone, Debug)]
pub struct GroupSocket {
    /// A descriptor of the socket, kept open for as long as someone may steer to it.
    pub socket: Arc<OwnedFd>,
    /// Where the socket is bound, which is where TPROXY looks for it.
    pub bound: SocketAddr,
}

/// A service as the back ends see it.
#[derive(Clone, Debug)]
pub struct ServiceSockets {
    /// The service's slot, from 1 to below [`anyport_common::maps::MAX_SERVICES`]; or [`REFUSE`].
    pub slot: u16,
    /// Its name.
    pub name: ServiceName,
    /// One socket a group, in the order of [`anyport_common::flow::Flow::socket_offset`]: TCP and UDP over IPv4,
    /// then TCP and UDP over IPv6. None where the host has no such family.
    pub groups: [Option<GroupSocket>; SOCKETS_PER_SERVICE as usize],
}

impl ServiceSockets {
    /// What has no sockets, so that whatever is steered there is refused.
    pub fn refusing() -> Self {
        Self { slot: REFUSE, name: ServiceName::nobody(), groups: [const { None }; 4] }
    }
}

/// Everything that a back end has to put into the kernel.
#[derive(Clone, Debug, Default)]
pub struct Plan {
    /// The number of this rule set.
    pub generation: u64,
    /// The rules in order of precedence.
    pub rules: Vec<NumberedRule>,
    /// The services that rules may name.
    pub services: Vec<ServiceSockets>,
}

impl Plan {
    /// The service of a rule. Rules of a plan only name services of the plan.
    pub fn service(&self, name: &ServiceName) -> anyhow::Result<&ServiceSockets> {
        self.services
            .iter()
            .find(|service| service.name == *name)
            .ok_or_else(|| anyhow::anyhow!("the plan has no service {name}"))
    }
}

/// A back end at work.
pub trait Steering: Send + Sync + fmt::Debug {
    /// Which one this is.
    fn back_end(&self) -> BackEnd;

    /// Makes the kernel steer by this plan, whatever it did before. Idempotent.
    ///
    /// # Errors
    /// What was attempted and what the kernel said; the caller applies the former plan again.
    fn apply(&mut self, plan: &Plan) -> anyhow::Result<()>;

    /// Looks again at what may have changed outside, such as new interfaces.
    fn refresh(&mut self) -> anyhow::Result<()> {
        Ok(())
    }

    /// The interfaces that are watched, where the back end works by interface.
    fn interfaces(&self) -> Vec<String> {
        Vec::new()
    }

    /// What does not work as it should, for `status`.
    fn degraded(&self) -> Vec<String> {
        Vec::new()
    }

    /// What became of the packets, by rule number.
    fn counters(&self) -> anyhow::Result<HashMap<u32, Counters>>;

    /// Takes everything out of the kernel.
    fn detach(self: Box<Self>) -> anyhow::Result<()>;
}
