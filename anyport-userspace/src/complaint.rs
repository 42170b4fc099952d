//! What is wrong with a part of the daemon, for those who do not know that part.

use std::sync::{Arc, Mutex, PoisonError};

/// Nothing, or what does not work now. All clones are the same one.
#[derive(Clone, Debug, Default)]
pub struct Complaint(Arc<Mutex<Option<String>>>);

impl Complaint {
    /// It is that from now on. Whether it was nothing before.
    pub(crate) fn raise(&self, what: String) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).replace(what).is_none()
    }

    /// All is well from now on.
    pub(crate) fn clear(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// What it is now.
    pub(crate) fn get(&self) -> Option<String> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}
