//! Events from the programs.

use std::{
    fmt,
    os::fd::OwnedFd,
    sync::{
        Arc, Mutex, PoisonError, Weak,
        atomic::Ordering::{Relaxed, SeqCst},
    },
};

use anyhow::{Context as _, bail};
use anyport_common::event::{Event, Filter, SUBSCRIBERS};
use aya::maps::{Map, MapData, RingBuf};
use tokio::io::unix::AsyncFd;
use tracing::error;

use crate::{
    events::{EventBus, KernelPublisher},
    sys::{self, MappedWords},
};

/// Words of a filter.
const FILTER_WORDS: usize = size_of::<Filter>() / 8;
/// Which of them counts what was missed.
const MISSED: usize = std::mem::offset_of!(Filter, missed) / 8;

/// The maps by which programs know the subscribers and their filters.
pub(super) struct BpfPublisher {
    filters: MappedWords,
    control: MappedWords,
    /// The word of the control map that says which filters count.
    subscribers: usize,
    /// Until the first subscriber comes.
    ring: Mutex<Option<RingBuf<MapData>>>,
    bus: Weak<EventBus>,
}

impl fmt::Debug for BpfPublisher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BpfPublisher").finish_non_exhaustive()
    }
}

impl BpfPublisher {
    /// `subscribers` is the word of the control map that says which subscribers there are.
    pub(super) fn new(
        filters: &OwnedFd,
        ring: Map,
        control: MappedWords,
        subscribers: usize,
        bus: &Arc<EventBus>,
    ) -> anyhow::Result<Self> {
        let Map::RingBuf(ring) = ring else { bail!("the map of events is no ring buffer") };
        let filters = MappedWords::new(filters, SUBSCRIBERS * FILTER_WORDS).context("map the filters into memory")?;
        let ring = RingBuf::try_from(Map::RingBuf(ring)).context("map the ring buffer of events into memory")?;
        Ok(Self { filters, control, subscribers, ring: Mutex::new(Some(ring)), bus: Arc::downgrade(bus) })
    }

    fn read_events(&self) -> anyhow::Result<()> {
        let Some(ring) = self.ring.lock().unwrap_or_else(PoisonError::into_inner).take() else { return Ok(()) };
        let ring = sys::watch_readable(ring).context("watch the ring buffer of events")?;
        tokio::spawn(deliver(ring, Weak::clone(&self.bus)));
        Ok(())
    }
}

impl KernelPublisher for BpfPublisher {
    fn set(&self, number: usize, filter: Option<&Filter>) -> anyhow::Result<()> {
        let Some(filter) = filter else {
            self.control.words()[self.subscribers].fetch_and(!(1 << number), SeqCst);
            return Ok(());
        };
        self.read_events()?;
        let words: [u64; FILTER_WORDS] = bytemuck::cast(*filter);
        let places = &self.filters.words()[number * FILTER_WORDS..][..FILTER_WORDS];
        // While a filter is changed it may let through what neither form of it wants; the event bus checks again.
        let is_new = self.control.words()[self.subscribers].load(SeqCst) >> number & 1 == 0;
        for (at, (place, word)) in places.iter().zip(words).enumerate() {
            if at != MISSED || is_new {
                place.store(word, Relaxed);
            }
        }
        self.control.words()[self.subscribers].fetch_or(1 << number, SeqCst);
        Ok(())
    }

    fn missed(&self, number: usize) -> u64 {
        self.filters.words()[number * FILTER_WORDS + MISSED].load(Relaxed)
    }
}

/// Hands events on as they come, for as long as there is an event bus for them.
async fn deliver(mut ring: AsyncFd<RingBuf<MapData>>, bus: Weak<EventBus>) {
    loop {
        let mut ready = match ring.readable_mut().await {
            Ok(ready) => ready,
            Err(error) => return error!("no more events: {error}"),
        };
        let Some(bus) = bus.upgrade() else { return };
        let ring = ready.get_inner_mut();
        while let Some(item) = ring.next() {
            if let Ok(event) = bytemuck::try_pod_read_unaligned::<Event>(&item) {
                bus.deliver(&event);
            }
        }
        ready.clear_ready();
    }
}
