//! Counts that tasks raise and others read.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// A count that one task raises and others read.
#[derive(Debug, Default)]
pub(super) struct Count(AtomicU64);

impl Count {
    pub(super) fn raise(&self) {
        self.add(1);
    }

    pub(super) fn add(&self, count: u64) {
        self.0.fetch_add(count, Relaxed);
    }

    pub(super) fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

/// Bytes of clients and bytes for clients.
#[derive(Debug, Default)]
pub(super) struct Traffic {
    pub(super) from_client: Count,
    pub(super) to_client: Count,
}

impl Traffic {
    pub(super) fn add(&self, from_client: u64, to_client: u64) {
        self.from_client.add(from_client);
        self.to_client.add(to_client);
    }
}
