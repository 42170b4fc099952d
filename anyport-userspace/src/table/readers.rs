//! Readers of this process, who must have ended before what they read is written over.

use std::{
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::Duration,
};

use arc_swap::ArcSwap;

use super::Reader;

/// The active generation, for any number of readers.
#[derive(Debug, Default)]
pub struct Published {
    current: ArcSwap<Reader>,
    previous: Mutex<Vec<Arc<Reader>>>,
}

impl Published {
    /// Shows the active generation to `read`, which should take no longer than some lookups do.
    pub fn read<T>(&self, read: impl FnOnce(&Reader) -> T) -> T {
        read(&self.current.load())
    }

    /// Makes another generation active.
    pub fn publish(&self, reader: Reader) {
        let replaced = self.current.swap(Arc::new(reader));
        let mut previous = self.previous.lock().unwrap_or_else(PoisonError::into_inner);
        previous.push(replaced);
        // A reader that began before the swap has its own reference to its generation since then.
        previous.retain(|it| Arc::strong_count(it) > 1);
    }

    /// Waits until no reader uses a previous generation.
    pub fn wait_for_readers(&self) {
        let previous = std::mem::take(&mut *self.previous.lock().unwrap_or_else(PoisonError::into_inner));
        while previous.iter().any(|it| Arc::strong_count(it) > 1) {
            thread::sleep(Duration::from_micros(50));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Published, Reader};

    #[test]
    fn only_what_is_read_is_kept() {
        let published = Published::default();
        published.read(|_| {
            for _ in 0..100 {
                published.publish(Reader::default());
            }
            assert_eq!(published.previous.lock().unwrap().len(), 1, "the one that is read");
        });
        published.publish(Reader::default());
        assert_eq!(published.previous.lock().unwrap().len(), 0);
        published.wait_for_readers();
    }
}
