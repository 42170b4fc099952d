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

    /// Nothing is under way any more.
    pub fn end(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = ProgressView::default();
    }

    /// The step that has begun last; none where nothing is under way.
    pub fn view(&self) -> ProgressView {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

#[cfg(test)]
mod tests {
    use super::{Progress, STEPS};

    #[test]
    fn what_has_ended_is_not_under_way() {
        let progress = Progress::default();
        progress.begin("reading the rules", 1);
        assert_eq!((progress.view().step, progress.view().steps), (1, STEPS));
        progress.end();
        assert_eq!((progress.view().doing.as_str(), progress.view().step), ("", 0));
    }
}
