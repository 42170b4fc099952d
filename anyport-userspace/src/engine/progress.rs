//! How far a long command is, readable while it runs.

use std::sync::{Mutex, PoisonError};

use crate::api::ProgressView;

/// How many steps a long command has.
const STEPS: u32 = 5;

/// How far a long command is. Can be read while the command is carried out.
#[derive(Debug, Default)]
pub struct Progress(Mutex<ProgressView>);

impl Progress {
    /// A step begins.
    pub(super) fn begin(&self, doing: &str, step: u32) {
        let view = ProgressView { doing: doing.to_owned(), step, steps: STEPS };
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = view;
    }

    /// The step that has begun last.
    pub fn view(&self) -> ProgressView {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}
