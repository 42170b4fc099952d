//! The record of changes: a line of the log for each, and an event.

use std::time::SystemTime;

use tracing::info;

use super::Engine;
use crate::events::{Author, ChangeView};

impl Engine {
    /// Records that a change was made: `what` has changed because of a `verb`.
    pub fn record(&self, by: Author, verb: &str, what: String) {
        let time = humantime::format_rfc3339_micros(SystemTime::now()).to_string();
        let change = ChangeView { time, verb: verb.to_owned(), by, what, generation: self.kernel.generation() };
        info!("{change}");
        self.kernel.events().tell(change);
    }
}
