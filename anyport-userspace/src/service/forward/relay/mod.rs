//! Moving data between a client and its upstream.
//!
//! An idle connection holds no buffer: what is there is read into a buffer of the worker and written at once, and only
//! what the peer does not take is kept. While something is kept nothing more is read, so that a slow reader slows its
//! peer down and memory stays bounded. Large transfers go through a pipe (splice(2)).
//!
//! Each side's end is passed on as what it was. Behind a FIN the other direction goes on. When one side resets the
//! connection, what it has said before is delivered first, and then the other side is reset.

mod delivery;
mod direction;
mod idle;
#[cfg(test)]
mod tests;

use std::{fmt, io, time::Instant};

pub(super) use self::idle::Limits;
use self::{
    delivery::Delivery,
    direction::{Direction, Fault},
    idle::IdleTimer,
};
use crate::service::{
    counts::Traffic,
    descriptors::DescriptorPool,
    event_loop::{Context, Next, Stream},
};

/// Bytes that may be missing in the counts while a connection is open.
const UNCOUNTED: u64 = 1 << 20;

/// What became of a connection.
#[derive(Debug)]
pub(in crate::service) struct Outcome {
    /// Bytes of the client that the upstream's socket took.
    pub(in crate::service) to_upstream: u64,
    /// Bytes of the upstream that the client's socket took.
    pub(in crate::service) to_client: u64,
    /// Why it ended.
    pub(in crate::service) end: RelayEnd,
}

/// Why a connection ended.
#[derive(Debug)]
pub(in crate::service) enum RelayEnd {
    /// Both sides have said all they had to say.
    Closed,
    /// Nothing was said for too long.
    Idle,
    /// It lasted too long.
    TooLong,
    /// The upstream gets no clients any more, and connections to it are closed.
    UpstreamLeft,
    /// The client's side broke.
    Client(io::Error),
    /// The upstream's side broke.
    Upstream(io::Error),
}

impl fmt::Display for RelayEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Closed => f.write_str("closed by both sides"),
            Self::Idle => f.write_str("closed as idle"),
            Self::TooLong => f.write_str("closed by its time limit"),
            Self::UpstreamLeft => f.write_str("closed since the upstream is down or taken out"),
            Self::Client(error) => write!(f, "the client's side broke ({error})"),
            Self::Upstream(error) => write!(f, "the upstream's side broke ({error})"),
        }
    }
}

/// What an upstream gets before anything that its client says from now on.
#[derive(Debug, Default)]
pub(super) struct InitialData {
    pub(super) bytes: Vec<u8>,
    /// How many of them are ours.
    pub(super) header: usize,
    /// Whether the client has said all.
    pub(super) has_ended: bool,
    /// By what its words have ended, if not as they should.
    pub(super) reset: Option<io::Error>,
}

/// The two directions of a connection.
#[derive(Debug)]
pub(super) struct Relay {
    up: Direction,
    down: Direction,
    /// Bytes in either direction that the counts of the upstream and of the service have.
    counted: (u64, u64),
    quiet: IdleTimer,
    /// Once one side has broken: how far the other one has what it had said.
    broken: Option<Box<Broken>>,
}

/// A connection of which one side has broken.
#[derive(Debug)]
struct Broken {
    end: RelayEnd,
    delivery: Delivery,
}

impl Relay {
    /// Of a connection to an upstream that has just come to be.
    pub(super) fn new(mut first: InitialData, limits: Limits) -> Self {
        let reset = first.reset.take();
        let mut relay = Self {
            up: Direction::new(first),
            down: Direction::new(InitialData::default()),
            counted: (0, 0),
            quiet: IdleTimer::new(limits),
            broken: None,
        };
        if let Some(error) = reset {
            relay.broke(RelayEnd::Client(error));
        }
        relay
    }

    /// From now on only what the broken side had said is moved.
    pub(super) fn broke(&mut self, end: RelayEnd) {
        match end {
            RelayEnd::Client(_) => self.up.cut(),
            _ => self.down.cut(),
        }
        self.broken = Some(Box::new(Broken { end, delivery: Delivery::begin() }));
    }

    /// Moves data in both directions until nothing goes any more; how it has ended if both have ended, or one side broke
    /// and the other one has what it had said.
    pub(super) fn advance(
        &mut self,
        cx: &mut Context<'_>,
        client: &mut Stream,
        upstream: &mut Stream,
        pool: &DescriptorPool,
        traffic: [&Traffic; 2],
    ) -> Result<Next, RelayEnd> {
        let moved = match self.broken {
            Some(_) => self.deliver_rest(cx, client, upstream, pool),
            None => match self.advance_both(cx, client, upstream, pool) {
                Err(end @ (RelayEnd::Client(_) | RelayEnd::Upstream(_))) => {
                    self.broke(end);
                    self.deliver_rest(cx, client, upstream, pool)
                }
                moved => moved,
            },
        };
        if self.uncounted() > UNCOUNTED || moved.is_err() {
            self.count(traffic);
        }
        moved
    }

    fn advance_both(
        &mut self,
        cx: &mut Context<'_>,
        client: &mut Stream,
        upstream: &mut Stream,
        pool: &DescriptorPool,
    ) -> Result<Next, RelayEnd> {
        let Self { up, down, .. } = self;
        let next = up.advance(cx, client, upstream, down.has_ended(), pool).map_err(|fault| match fault {
            Fault::Source(error) => RelayEnd::Client(error),
            Fault::Sink(error) => RelayEnd::Upstream(error),
        })?;
        let other = down.advance(cx, upstream, client, up.has_ended(), pool).map_err(|fault| match fault {
            Fault::Source(error) => RelayEnd::Upstream(error),
            Fault::Sink(error) => RelayEnd::Client(error),
        })?;
        if up.has_ended() && down.has_ended() {
            return Err(RelayEnd::Closed);
        }
        // A side that has ended its words is not read any more: that it resets the connection later does not show there.
        if up.has_ended()
            && let Some(error) = client.take_failure()
        {
            return Err(RelayEnd::Client(error));
        }
        if down.has_ended()
            && let Some(error) = upstream.take_failure()
        {
            return Err(RelayEnd::Upstream(error));
        }
        Ok(if (next, other) == (Next::Wait, Next::Wait) { Next::Wait } else { Next::Reschedule })
    }

    /// Moves what the side that broke had said, and waits until the other side has it: to reset a connection throws away
    /// what is still under way.
    fn deliver_rest(
        &mut self,
        cx: &mut Context<'_>,
        client: &mut Stream,
        upstream: &mut Stream,
        pool: &DescriptorPool,
    ) -> Result<Next, RelayEnd> {
        let Self { up, down, quiet, broken, .. } = self;
        if let Some(Broken { end, delivery }) = broken.as_deref_mut() {
            let (rest, from, to) = match end {
                RelayEnd::Client(_) => (up, client, upstream),
                _ => (down, upstream, client),
            };
            match rest.advance(cx, from, to, true, pool) {
                Ok(next) if !rest.has_ended() => return Ok(next),
                Ok(_) if !delivery.is_over(to, quiet.limits) => {
                    cx.wake_at(delivery.next_look());
                    return Ok(Next::Wait);
                }
                // Where the other side has broken, too, there is nobody to deliver to.
                Ok(_) | Err(_) => {}
            }
        }
        Err(self.end_of_broken().unwrap_or(RelayEnd::Closed))
    }

    fn end_of_broken(&mut self) -> Option<RelayEnd> {
        self.broken.take().map(|broken| broken.end)
    }

    /// When to look for silence next.
    pub(super) fn next_look(&self) -> Instant {
        self.quiet.next
    }

    /// Looks whether it has been silent for too long, or has lasted too long; or whether all was delivered.
    pub(super) fn look(
        &mut self,
        cx: &mut Context<'_>,
        client: &mut Stream,
        upstream: &mut Stream,
        pool: &DescriptorPool,
        traffic: [&Traffic; 2],
    ) -> Result<Next, RelayEnd> {
        if self.broken.as_ref().is_some_and(|broken| broken.delivery.has_begun()) {
            return self.advance(cx, client, upstream, pool, traffic);
        }
        let looked = self.quiet.look(self.up.taken() + self.down.taken());
        cx.wake_at(self.quiet.next);
        if looked.is_err() {
            self.count(traffic);
        }
        looked.map(|()| Next::Wait).map_err(|end| self.end_of_broken().unwrap_or(end))
    }

    fn uncounted(&self) -> u64 {
        self.up.taken() - self.counted.0 + self.down.taken() - self.counted.1
    }

    fn count(&mut self, traffic: [&Traffic; 2]) {
        let taken = (self.up.taken(), self.down.taken());
        for traffic in traffic {
            traffic.add(taken.0 - self.counted.0, taken.1 - self.counted.1);
        }
        self.counted = taken;
    }

    /// What became of it, if it ends like this.
    pub(super) fn outcome(&self, end: RelayEnd) -> Outcome {
        Outcome { to_upstream: self.up.taken(), to_client: self.down.taken(), end }
    }
}
