//! Readers of this process, who must have ended before what they read is written over.

use std::{
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::Duration,
};

use arc_swap::ArcSwap;

use super::Reader;

/// The generation in force, for any number of readers.
#[derive(Debug, Default)]
pub struct Published {
    current: ArcSwap<Reader>,
    former: Mutex<Vec<Arc<Reader>>>,
}

impl Published {
    /// Shows the generation in force to `read`, which should take no longer than some look-ups do.
    pub fn read<T>(&self, read: impl FnOnce(&Reader) -> T) -> T {
        read(&self.current.load())
    }

    /// Puts another generation in force.
    pub fn publish(&self, reader: Reader) {
        let former = self.current.swap(Arc::new(reader));
        self.former.lock().unwrap_or_else(PoisonError::into_inner).push(former);
    }

    /// Waits until nobody reads a former generation.
    pub fn wait_for_readers(&self) {
        let former = std::mem::take(&mut *self.former.lock().unwrap_or_else(PoisonError::into_inner));
        while former.iter().any(|it| Arc::strong_count(it) > 1) {
            thread::sleep(Duration::from_micros(50));
        }
    }
}
