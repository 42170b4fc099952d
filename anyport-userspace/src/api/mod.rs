//! The control API: HTTP and JSON on a Unix socket.

mod client;
mod explain;
mod problem;
mod server;
mod types;

pub use client::Client;
pub use explain::{
    Considered, Endpoint, Explain, Explanation, ListenerView, Reason, RouteView, RuleView, SocketView, Verdict,
};
pub use problem::{Kind, Problem};
pub use server::{Shared, bind, serve};
pub use types::{
    AddPrefixes, Applied, Apply, BackEndView, Changed, ListPrefixes, PrefixView, ProgressView, RemovePrefixes,
    ServiceView, StatusView, Totals, parse,
};
