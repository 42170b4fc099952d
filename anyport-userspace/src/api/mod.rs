//! The control API: HTTP and JSON on a Unix socket.

mod client;
mod explain;
mod peer;
mod problem;
mod server;
mod types;

pub use client::Client;
pub use explain::{
    Considered, Endpoint, Explain, Explanation, ListenerView, Reason, RouteView, RuleView, SocketView, Verdict,
};
pub use peer::Peer;
pub use problem::{Kind, Problem};
pub(crate) use server::stopping;
pub use server::{Shared, bind, serve};
pub use types::{
    AddPrefixes, Applied, Apply, BackEndView, Changed, ListPrefixes, PrefixView, ProgressView, RemovePrefixes,
    ServiceView, StatusView, Taken, Totals, parse,
};
