//! The control API, HTTP and JSON on a Unix socket: requests, answers, and the client.

#[cfg(feature = "daemon")]
mod advice;
#[cfg(feature = "daemon")]
mod announce;
#[cfg(feature = "daemon")]
mod client;
#[cfg(feature = "daemon")]
mod events;
#[cfg(feature = "daemon")]
mod explain;
#[cfg(feature = "daemon")]
mod live;
#[cfg(feature = "daemon")]
mod peer;
#[cfg(feature = "daemon")]
mod types;

#[cfg(feature = "daemon")]
pub use self::{
    advice::advice,
    announce::{AnnounceState, AnnounceView, AnnouncedPrefix, DrainRequest, DrainState, DrainView, Undrain},
    client::Client,
    events::{EventLine, EventView, Listen, Outcome, Wanted},
    explain::{
        AnswerView, Considered, Endpoint, Explain, Explanation, ListenerView, Reason, RouteView, RuleView, SocketView,
        Verdict,
    },
    live::{
        LiveAdvice, LiveAnnounce, LiveNode, LivePrefix, LiveService, LiveUpstream, LiveView, PrefixCounts,
        ServiceCounts,
    },
    peer::{Peer, Readers},
    types::{
        AddPrefixes, Applied, Apply, BackEndView, FleetView, ListPrefixes, PrefixView, ProgressView, RefusedView,
        Reload, Reloaded, RemovePrefixes, RepairView, ServiceView, StatusView, TakeOver, Taken, Totals, parse,
    },
};
#[cfg(feature = "daemon")]
pub(crate) use self::{
    live::increase,
    types::{FIRST_HEADER, ID_HEADER, LONGEST_WAIT, MAX_BODY, MAX_FILE, since_boot, too_large},
};
pub use crate::problem::{Changed, Problem, ProblemKind};
