//! The control API: HTTP and JSON on a Unix socket.

#[cfg(feature = "daemon")]
mod announce;
mod changed;
#[cfg(feature = "daemon")]
mod client;
#[cfg(feature = "daemon")]
mod clients;
#[cfg(feature = "daemon")]
mod events;
#[cfg(feature = "daemon")]
mod explain;
#[cfg(feature = "daemon")]
mod live;
#[cfg(feature = "daemon")]
mod peer;
mod problem;
#[cfg(feature = "daemon")]
mod server;
#[cfg(feature = "daemon")]
mod turns;
#[cfg(feature = "daemon")]
mod types;

#[cfg(feature = "daemon")]
pub use self::{
    announce::{AnnounceView, AnnouncedPrefix, DrainRequest, DrainState, DrainView, Undrain},
    client::Client,
    events::{EventView, Listen, Outcome, Told, Wanted},
    explain::{
        Considered, Endpoint, Explain, Explanation, ListenerView, Reason, RouteView, RuleView, SocketView, Verdict,
    },
    live::{LivePrefix, LiveService, LiveUpstream, LiveView, PrefixCounts, ServiceCounts},
    peer::{GROUP, Peer, Readers},
    server::{Shared, adopt, bind, serve},
    types::{
        AddPrefixes, Applied, Apply, BackEndView, FleetView, ListPrefixes, MendedView, PrefixView, ProgressView,
        RefusedView, Reload, Reloaded, RemovePrefixes, ServiceView, StatusView, TakeOver, Taken, Totals, parse,
    },
};
pub use changed::Changed;
pub use problem::{Kind, Problem};
#[cfg(feature = "daemon")]
pub(crate) use {live::increase, server::stopping};
