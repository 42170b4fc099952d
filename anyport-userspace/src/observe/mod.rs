//! What the daemon reports to those who watch it: metrics, health, and a page.
//!
//! All of it is served by a thread of its own, so that neither traffic nor control waits for those who watch. The answers come from
//! samples. One sample serves all requests within a short time, and is taken so rarely that taking them needs a twentieth of a CPU
//! at most, however many rules there are and however often clients ask.

mod connections;
mod families;
mod history;
mod metrics;
mod page;
mod process;
mod ranking;
mod sample;
mod server;
mod text;

pub use self::{
    metrics::{Metric, all as all_metrics},
    sample::{Observer, Sample, Servers},
    server::Server,
    text::MetricType,
};
