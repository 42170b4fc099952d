//! What the answers to readers may take of the daemon's memory: so many at a time, and so many bytes, for each reader and for all.

use std::{
    collections::HashMap,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll},
};

use axum::body::{Body, Bytes};
use hyper::body::{Frame, SizeHint};
use nix::unistd::Uid;

use super::clients::Busy;
use crate::api::{Problem, ProblemKind};

/// Requests of a reader that are under way at a time, until the last byte of the answer has left; and those of all readers.
const REQUESTS: usize = 8;
const ALL_REQUESTS: usize = 64;
/// Bytes of answers that wait for a reader, and for all. Long lists are not among them: they are made while they leave.
const BYTES: usize = 8 << 20;
const ALL_BYTES: usize = 24 << 20;

/// What is taken by readers.
#[derive(Clone, Debug, Default)]
pub(super) struct Budget(Arc<Mutex<HashMap<Uid, Share>>>);

#[derive(Clone, Copy, Debug, Default)]
struct Share {
    requests: usize,
    bytes: usize,
}

/// A request of a reader, until this is dropped.
#[derive(Debug)]
pub(super) struct Taken {
    budget: Budget,
    uid: Uid,
    bytes: usize,
}

impl Budget {
    fn shares(&self) -> MutexGuard<'_, HashMap<Uid, Share>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a part for a request.
    ///
    /// # Errors
    /// Nothing is left.
    pub(super) fn begin(&self, uid: Uid) -> Result<Taken, Problem> {
        let mut shares = self.shares();
        let all: usize = shares.values().map(|share| share.requests).sum();
        if shares.get(&uid).is_some_and(|own| own.requests >= REQUESTS) || all >= ALL_REQUESTS {
            return Err(too_much("too many requests of readers are under way"));
        }
        shares.entry(uid).or_default().requests += 1;
        Ok(Taken { budget: self.clone(), uid, bytes: 0 })
    }
}

impl Taken {
    /// Takes a part for the bytes of an answer.
    ///
    /// # Errors
    /// Nothing is left.
    pub(super) fn add(&mut self, bytes: usize) -> Result<(), Problem> {
        let mut shares = self.budget.shares();
        let all: usize = shares.values().map(|share| share.bytes).sum();
        let own = shares.entry(self.uid).or_default();
        if own.bytes + bytes > BYTES || all + bytes > ALL_BYTES {
            return Err(too_much("too many bytes wait to be read by readers"));
        }
        own.bytes += bytes;
        self.bytes += bytes;
        Ok(())
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        let mut shares = self.budget.shares();
        if let Some(share) = shares.get_mut(&self.uid) {
            share.requests -= 1;
            share.bytes -= self.bytes;
            if share.requests == 0 {
                shares.remove(&self.uid);
            }
        }
    }
}

fn too_much(error: &str) -> Problem {
    Problem::new(ProblemKind::Stopping, error).hint("nothing was done; try again when they are done")
}

/// The body of an answer, whose request is under way until the body is gone.
pub(super) struct Leaving {
    body: Body,
    _busy: Busy,
}

impl Leaving {
    pub(super) fn new(body: Body, busy: Busy) -> Self {
        Self { body, _busy: busy }
    }
}

impl hyper::body::Body for Leaving {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use nix::unistd::Uid;

    use super::{ALL_REQUESTS, BYTES, Budget, REQUESTS};

    #[test]
    fn a_reader_has_its_part_and_all_have_theirs() {
        let budget = Budget::default();
        let users = 1_000..;
        let mut taken = Vec::new();
        for uid in users.map(Uid::from_raw).take(ALL_REQUESTS / REQUESTS) {
            taken.extend((0..REQUESTS).map(|_| budget.begin(uid).unwrap()));
            budget.begin(uid).unwrap_err();
        }
        budget.begin(Uid::from_raw(1)).unwrap_err();
        taken[0].add(BYTES).unwrap();
        taken[1].add(1).unwrap_err();
        taken[REQUESTS].add(BYTES).unwrap();
        taken.clear();
        assert!(budget.shares().is_empty());
        budget.begin(Uid::from_raw(1)).unwrap().add(BYTES).unwrap();
    }
}
