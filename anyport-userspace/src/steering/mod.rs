//! How packets reach the services' sockets: one trait, three back ends.

pub mod bpf;
pub mod choose;
mod privileged;
pub mod tproxy;

use std::{
    fmt,
    net::SocketAddr,
    ops::Range,
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
};

use anyport_common::{
    flow::Flow,
    maps::{Counters, REFUSE, SOCKETS_PER_SERVICE},
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use crate::back_end::BackEnd;
use crate::{
    register::Registered,
    rules::{Prefix, RuleView, ServiceName, SourceLists},
    table::{Reader, Receiver},
};

/// One socket out of a service's group for one transport and family; the kernel finds the others by it.
#[derive(Clone, Debug)]
pub struct GroupSocket {
    /// The kernel's name for the socket, which no other one gets before the next boot.
    pub cookie: u64,
    /// Where the socket is bound, which is where TPROXY looks for it.
    pub bound: SocketAddr,
    /// What keeps it open.
    pub holder: Holder,
}

impl GroupSocket {
    /// A descriptor of the socket.
    ///
    /// # Errors
    /// No process holds the socket any more, or it can't be fetched from the one that does.
    pub fn descriptor(&self) -> anyhow::Result<Arc<dyn AsFd + Send + Sync>> {
        Ok(match &self.holder {
            Holder::Us(descriptor) => Arc::<OwnedFd>::clone(descriptor),
            Holder::Owner(socket) => socket.descriptor()?,
        })
    }
}

/// What keeps a socket open.
#[derive(Clone, Debug)]
pub enum Holder {
    /// This process, for as long as someone may steer to the socket.
    Us(Arc<OwnedFd>),
    /// The process that registered it. We hold no descriptor, which would keep the socket open when its owner is gone, and
    /// connections would pile up in a queue that nobody serves.
    Owner(Arc<Registered>),
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
    /// Which clients it allows. A service that allows others has another slot.
    pub sources: Arc<SourceLists>,
}

impl ServiceSockets {
    /// The service as the lookup table sees it.
    pub fn receiver(&self) -> Receiver<'_> {
        Receiver { slot: self.slot, sources: &self.sources }
    }

    /// What has no sockets, so that whatever is steered there is refused.
    pub fn refusing() -> Self {
        Self { slot: REFUSE, name: ServiceName::nobody(), groups: [const { None }; 4], sources: Arc::default() }
    }
}

/// Everything that a back end has to put into the kernel.
#[derive(Clone, Debug)]
pub struct Plan<'a> {
    /// The number of this rule set.
    pub generation: u64,
    /// The rules, with their numbers, as they are to be read.
    pub rules: RuleView<'a>,
    /// The prefixes whose rules are not those of the plan that was applied last; nothing if that is not known, and
    /// everything has to be looked at.
    pub changed: Option<&'a [Prefix]>,
    /// Numbers that were no rule's before, or another's: their counters begin at zero.
    pub fresh: &'a [Range<u32>],
    /// Numbers that are no rule's any more. What was counted under them is kept until they are fresh again.
    pub freed: &'a [Range<u32>],
    /// Rules that stay under another number, the old one first: their counters go on.
    pub moved: &'a [(u32, u32)],
    /// The services that rules may name.
    pub services: &'a [ServiceSockets],
}

impl Plan<'_> {
    /// The service of a rule. Rules of a plan only name services of the plan.
    pub fn service(&self, name: &ServiceName) -> anyhow::Result<&ServiceSockets> {
        self.services
            .iter()
            .find(|service| service.name == *name)
            .ok_or_else(|| anyhow::anyhow!("the plan has no service {name}"))
    }
}

/// What becomes of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It goes to a service's socket.
    Steer,
    /// A rule leaves it to the host.
    Host,
    /// It is refused, since the service has no socket for it.
    Drop,
    /// It is refused, since the service does not take its source. A back end that leaves this to the service says that it
    /// goes there.
    Deny,
    /// No rule matches.
    Unmatched,
}

/// What the kernel decides about a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Decided {
    /// What becomes of it.
    pub fate: Fate,
    /// The number of the rule by which that is so.
    pub rule: Option<u32>,
    /// The cookie of the socket that was found, where the kernel reports it; another one of the same group may get it.
    pub cookie: Option<u64>,
    /// Where the socket is bound that will be looked for, where the kernel reports that.
    pub bound: Option<SocketAddr>,
    /// The generation that decided, where the kernel reports it.
    pub generation: Option<u64>,
}

/// What others may take from us.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum ObjectKind {
    /// What attaches a BPF program to the network namespace or, by tcx, to an interface.
    Link,
    /// A map or a link in the BPF file system.
    Pin,
    /// A service's socket in the map of sockets.
    Socket,
    /// Our chains of iptables, or a jump to them.
    Chain,
    /// A set of addresses.
    Set,
    /// A local route.
    Route,
    /// An entry of the lookup table.
    Table,
    /// An interface: one that came is watched, one that went is not.
    Interface,
}

impl fmt::Display for ObjectKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&format!("{self:?}").to_lowercase())
    }
}

/// Something of ours that is not in the kernel any more, or not as it was.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Drift {
    /// Of which kind it is.
    pub kind: ObjectKind,
    /// Its name, to stand before "is gone".
    pub what: String,
}

impl Drift {
    /// What stands before "is gone".
    pub fn new(kind: ObjectKind, what: impl Into<String>) -> Self {
        Self { kind, what: what.into() }
    }
}

/// Counters that need no back end at hand: they can be read while it applies a plan.
pub trait SharedCounters: Send + Sync + fmt::Debug {
    /// Gives the counters of a rule by its number. A plan that brings counters waits until what is returned is dropped, so
    /// it is to be held for a short time only.
    fn read(&self) -> Box<dyn Fn(u32) -> Counters + '_>;
}

/// A back end at work.
pub trait Steering: Send + Sync + fmt::Debug {
    /// Which one this is.
    fn back_end(&self) -> BackEnd;

    /// Makes the kernel steer by this plan, whatever it did before. Idempotent.
    ///
    /// # Errors
    /// What was attempted and what the kernel said; the caller applies the previous plan again.
    fn apply(&mut self, plan: &Plan<'_>) -> anyhow::Result<()>;

    /// Checks again what may have changed outside, such as new interfaces. Returns what it has put right.
    fn refresh(&mut self) -> anyhow::Result<Vec<Drift>> {
        Ok(Vec::new())
    }

    /// What the last plan put into the kernel and is not there any more. Asked every second, so it costs a few system calls.
    ///
    /// # Errors
    /// The kernel can't be asked.
    fn lost(&mut self) -> anyhow::Result<Vec<Drift>>;

    /// Takes for granted no more what is lost, so that the next plan puts it back, even one that changes nothing.
    ///
    /// # Errors
    /// The kernel can't be asked.
    fn forget_lost(&mut self) -> anyhow::Result<()>;

    /// Why something that was lost could not be put back, though plans are applied without it.
    fn unrepaired(&self) -> Option<&str>;

    /// The interfaces that are watched, where the back end works by interface.
    fn interfaces(&self) -> Vec<String> {
        Vec::new()
    }

    /// What does not work as it should, for `status`.
    fn degraded(&self) -> Vec<String> {
        Vec::new()
    }

    /// What became of the packets: gives the counters of a rule by its number.
    fn counters(&self) -> anyhow::Result<Box<dyn Fn(u32) -> Counters + '_>>;

    /// What was counted under numbers that the last plan freed, where that is anything. It is known until they are fresh again.
    fn left(&self, numbers: &[Range<u32>]) -> Vec<(u32, Counters)>;

    /// The same for readers that do not wait until a plan is applied, where counters can be read without asking the kernel.
    fn shared_counters(&self) -> Option<Arc<dyn SharedCounters>> {
        None
    }

    /// How many packets were dropped for want of a socket, or since the kernel would not assign it; in little time. Nothing where that is not
    /// counted.
    ///
    /// # Errors
    /// The kernel can't be asked.
    fn dropped(&self) -> anyhow::Result<Option<u64>> {
        Ok(None)
    }

    /// Whether it can steer to a socket that an earlier daemon steered to, without a descriptor of it.
    fn can_adopt(&self, cookie: u64) -> bool;

    /// Packets that no rule matched.
    fn unmatched(&self) -> anyhow::Result<u64>;

    /// Adds to the counters of rules, by number, what was counted before this back end was at work.
    fn restore_counters(&mut self, counted: &[(u32, Counters)]) -> anyhow::Result<()>;

    /// What the kernel decides about the first packet of a flow, asked of what it holds at this moment.
    ///
    /// # Errors
    /// The kernel can't be asked.
    fn decide(&self, flow: &Flow) -> anyhow::Result<Decided>;

    /// The lookup table that was applied last, where this back end has one that the daemon can read too.
    fn reader(&self) -> Option<Reader> {
        None
    }

    /// Bytes of the kernel's memory that rules and counters take.
    fn bytes(&self) -> u64 {
        0
    }

    /// Takes everything out of the kernel.
    fn detach(self: Box<Self>) -> anyhow::Result<()>;

    /// Leaves steering in the kernel, for another process to take over, and gives back what would keep that from it.
    fn leave(self: Box<Self>);
}
