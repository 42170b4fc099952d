//! The progress bar of `anyportctl fleet`.

use std::{
    io::{IsTerminal as _, stderr},
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressStyle};

/// Something that takes less is not worth a bar.
const PATIENCE: Duration = Duration::from_secs(1);

/// A bar on the terminal, if there is one, for what takes longer than a second.
pub(super) struct Bar {
    begun: Instant,
    bar: Option<ProgressBar>,
}

impl Bar {
    pub(super) fn new() -> Self {
        Self { begun: Instant::now(), bar: None }
    }

    /// Shows how much of how much is done.
    pub(super) fn show(&mut self, done: usize, of: usize, doing: &str) {
        if self.begun.elapsed() < PATIENCE || !stderr().is_terminal() {
            return;
        }
        let bar = self.bar.get_or_insert_with(|| {
            let style = ProgressStyle::with_template("{elapsed:>4} [{bar:30}] {pos}/{len} {msg}");
            ProgressBar::new(0).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
        });
        bar.set_length(of as u64);
        bar.set_position(done as u64);
        bar.set_message(doing.to_owned());
    }

    /// Takes the bar away, so that something can be printed.
    pub(super) fn clear(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}
