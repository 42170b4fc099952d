//! The event bus: subscribers and their filters.

use std::{
    fmt,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU32, AtomicU64, Ordering::Relaxed},
    },
};

use anyport_common::event::{Event, Filter, RECENT, SUBSCRIBERS, goes_on, remembered};
use tokio::sync::{broadcast, mpsc};
use tracing::warn;

use super::ChangeView;
use crate::rules::ServiceName;

/// Events that wait for a subscriber who is busy. The kernel holds as many.
const WAITING: usize = 4096;
/// Changes that wait for one who is busy.
const CHANGES: usize = 256;
/// The slot of a service that is not there.
const NO_SLOT: u32 = u32::MAX;

/// What publishes events in the kernel.
pub trait KernelPublisher: fmt::Debug + Send + Sync {
    /// Has the kernel publish what this filter matches to the subscriber with this number, or nothing any more.
    ///
    /// # Errors
    /// What the kernel refused.
    fn set(&self, number: usize, filter: Option<&Filter>) -> anyhow::Result<()>;

    /// Events for this subscriber that the kernel could not hold since its filter was set first.
    fn missed(&self, number: usize) -> u64;
}

/// The subscribers: at most [`SUBSCRIBERS`] at a time.
#[derive(Debug)]
pub struct EventBus {
    inner: Mutex<Inner>,
    /// Which places are taken, a bit each.
    taken: AtomicU32,
    /// As the programs have it, for events that this process makes.
    recent: Box<[AtomicU64]>,
    /// To those who hear of changes, too.
    changes: broadcast::Sender<ChangeView>,
}

#[derive(Debug, Default)]
struct Inner {
    places: [Option<Place>; SUBSCRIBERS],
    /// Without, events are made by this process.
    kernel: Option<Arc<dyn KernelPublisher>>,
}

#[derive(Debug)]
struct Place {
    filter: Filter,
    service: Option<ServiceName>,
    sender: mpsc::Sender<Event>,
    missed: u64,
}

/// All places are taken.
#[derive(Debug, thiserror::Error)]
#[error("{SUBSCRIBERS} others listen already, which is the limit")]
pub struct TooManySubscribers;

/// Receives events until it is dropped.
#[derive(Debug)]
pub struct Subscriber {
    bus: Arc<EventBus>,
    number: usize,
    events: mpsc::Receiver<Event>,
    /// How many of the missed ones [`Subscriber::missed`] has returned already.
    reported: u64,
}

impl Default for EventBus {
    fn default() -> Self {
        let recent = (0..RECENT).map(|_| AtomicU64::new(0)).collect();
        Self { inner: Mutex::default(), taken: AtomicU32::new(0), recent, changes: broadcast::channel(CHANGES).0 }
    }
}

impl EventBus {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has events come from the kernel from now on, or no more.
    pub fn connect(&self, kernel: Option<Arc<dyn KernelPublisher>>) {
        let before = std::mem::replace(&mut self.lock().kernel, kernel);
        // Programs may stay when this process ends, and should not go on publishing.
        if let Some(before) = before {
            for number in 0..SUBSCRIBERS {
                before.set(number, None).ok();
            }
        }
    }

    /// Whether events come from the kernel, rather than from the services.
    pub fn is_connected(&self) -> bool {
        self.lock().kernel.is_some()
    }

    /// Adds a subscriber; if `service` is there, the filter's slot is kept equal to that of this service.
    ///
    /// # Errors
    /// [`TooManySubscribers`], or the kernel's.
    pub fn listen(self: &Arc<Self>, filter: Filter, service: Option<ServiceName>) -> anyhow::Result<Subscriber> {
        let mut inner = self.lock();
        let Inner { places, kernel } = &mut *inner;
        let number = places.iter().position(Option::is_none).ok_or(TooManySubscribers)?;
        if let Some(kernel) = kernel {
            kernel.set(number, Some(&filter))?;
        }
        let (sender, events) = mpsc::channel(WAITING);
        places[number] = Some(Place { filter, service, sender, missed: 0 });
        self.taken.fetch_or(1 << number, Relaxed);
        Ok(Subscriber { bus: Arc::clone(self), number, events, reported: 0 })
    }

    /// Says which slots services have now.
    pub fn follow(&self, slot_of: impl Fn(&ServiceName) -> Option<u16>) {
        if !self.is_heard() {
            return;
        }
        let Inner { places, kernel } = &mut *self.lock();
        for (number, place) in places.iter_mut().enumerate() {
            let Some(Place { filter, service: Some(service), .. }) = place else { continue };
            let slot = slot_of(service).map_or(NO_SLOT, u32::from);
            if filter.service != slot {
                filter.service = slot;
                if let Some(Err(error)) = kernel.as_ref().map(|kernel| kernel.set(number, Some(filter))) {
                    warn!("have the kernel tell events of service {service}: {error:#}");
                }
            }
        }
    }

    /// Tells of a change.
    pub fn tell(&self, change: ChangeView) {
        // An error says that nobody listens.
        self.changes.send(change).ok();
    }

    /// The changes from now on.
    pub fn changes(&self) -> broadcast::Receiver<ChangeView> {
        self.changes.subscribe()
    }

    /// Whether there is a subscriber.
    pub fn is_heard(&self) -> bool {
        self.taken.load(Relaxed) != 0
    }

    /// Hands an event to those that it names.
    pub fn deliver(&self, event: &Event) {
        for (number, place) in self.lock().places.iter_mut().enumerate() {
            if event.subscribers >> number & 1 != 0
                && let Some(Place { filter, sender, missed, .. }) = place
                // It may have been published to the previous subscriber with this number.
                && filter.wants(event)
                && sender.try_send(*event).is_err()
            {
                *missed += 1;
            }
        }
    }

    /// Publishes an event that this process makes, as the programs do.
    pub fn publish(&self, mut event: Event, random: u32) {
        {
            let inner = self.lock();
            let wants = |place: &Place| place.filter.wants(&event) && place.filter.is_sampled(random);
            let places = inner.places.iter().enumerate();
            let wanted = places.filter(|(_, place)| place.as_ref().is_some_and(wants));
            event.subscribers = wanted.fold(0, |bits, (number, _)| bits | 1 << number);
        }
        if event.subscribers != 0 && (event.protocol != UDP || !self.is_recent(&event)) {
            self.deliver(&event);
        }
    }

    fn is_recent(&self, event: &Event) -> bool {
        let mark = event.mark();
        let place = usize::try_from(mark % RECENT as u64).unwrap_or_default();
        let before = self.recent[place].swap(remembered(mark, event.time), Relaxed);
        goes_on(before, mark, event.time)
    }

    fn close(&self, number: usize) {
        let Inner { places, kernel } = &mut *self.lock();
        places[number] = None;
        self.taken.fetch_and(!(1 << number), Relaxed);
        if let Some(Err(error)) = kernel.as_ref().map(|kernel| kernel.set(number, None)) {
            warn!("have the kernel tell no more events: {error:#}");
        }
    }

    fn missed(&self, number: usize) -> u64 {
        let Inner { places, kernel } = &*self.lock();
        let here = places[number].as_ref().map_or(0, |place| place.missed);
        here + kernel.as_ref().map_or(0, |kernel| kernel.missed(number))
    }
}

/// The protocol whose packets are not published one by one.
const UDP: u8 = anyport_common::flow::Transport::Udp.number();

impl Subscriber {
    /// The next event.
    pub async fn next(&mut self) -> Option<Event> {
        self.events.recv().await
    }

    /// The next event, if there is one now.
    pub fn try_next(&mut self) -> Option<Event> {
        self.events.try_recv().ok()
    }

    /// How many events were lost because queues were full since this was last asked.
    pub fn missed(&mut self) -> u64 {
        let missed = self.bus.missed(self.number);
        let new = missed.saturating_sub(self.reported);
        self.reported = missed;
        new
    }
}

impl Drop for Subscriber {
    fn drop(&mut self) {
        self.bus.close(self.number);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use anyport_common::{
        event::{DENIED, Event, Filter, STEERED, SUBSCRIBERS},
        flow::{Address, Flow, Transport},
    };
    use bytemuck::Zeroable as _;

    use super::{EventBus, NO_SLOT, WAITING};

    fn event(transport: Transport, source_port: u16) -> Event {
        let flow = Flow { source: Address::v4(1), address: Address::v4(2), transport, port: 80 };
        Event { service: 3, ..Event::new(&flow, source_port, STEERED, 1) }
    }

    fn all() -> Filter {
        Filter { outcomes: STEERED | DENIED, ..Filter::zeroed() }
    }

    fn ports(listener: &mut super::Subscriber) -> Vec<u16> {
        std::iter::from_fn(|| listener.try_next()).map(|it| it.source_port).collect()
    }

    #[test]
    fn each_hears_what_it_wants() {
        let bus = Arc::new(EventBus::default());
        assert!(!bus.is_heard());
        let mut everybody = bus.listen(all(), None).unwrap();
        let mut udp = bus.listen(Filter { protocol: 17, ..all() }, None).unwrap();
        assert!(bus.is_heard());
        bus.publish(event(Transport::Tcp, 1), 0);
        bus.publish(event(Transport::Tcp, 1), 0);
        // Of a flow only the first datagram is published.
        bus.publish(event(Transport::Udp, 2), 0);
        bus.publish(event(Transport::Udp, 2), 0);
        bus.publish(event(Transport::Udp, 3), 0);
        assert_eq!((ports(&mut everybody), ports(&mut udp)), (vec![1, 1, 2, 3], vec![2, 3]));
        drop(udp);
        // What was published to the previous subscriber does not reach the next one with its number.
        let mut denied = bus.listen(Filter { outcomes: DENIED, ..all() }, None).unwrap();
        bus.deliver(&Event { subscribers: 0b11, ..event(Transport::Udp, 4) });
        assert_eq!((ports(&mut everybody), ports(&mut denied)), (vec![4], vec![]));
        drop((everybody, denied));
        assert!(!bus.is_heard());
    }

    #[test]
    fn what_a_busy_one_misses_is_counted() {
        let bus = Arc::new(EventBus::default());
        let mut busy = bus.listen(all(), None).unwrap();
        for _ in 0..WAITING + 7 {
            bus.publish(event(Transport::Tcp, 1), 0);
        }
        assert_eq!((busy.missed(), busy.missed()), (7, 0));
        assert_eq!(ports(&mut busy).len(), WAITING);
    }

    #[test]
    fn there_is_room_for_some() {
        let bus = Arc::new(EventBus::default());
        let mut all: Vec<_> = (0..SUBSCRIBERS).map(|_| bus.listen(all(), None).unwrap()).collect();
        bus.listen(self::all(), None).unwrap_err();
        all.swap_remove(3);
        bus.listen(self::all(), None).unwrap();
    }

    #[test]
    fn a_service_is_followed_to_its_slot() {
        let bus = Arc::new(EventBus::default());
        let name = "web".parse().unwrap();
        let mut listener = bus.listen(Filter { service: 3, ..all() }, Some(name)).unwrap();
        for (slot, heard) in [(Some(3), 1), (Some(4), 0), (None, 0), (Some(3), 1)] {
            bus.follow(|_| slot);
            bus.publish(event(Transport::Tcp, 1), 0);
            assert_eq!(ports(&mut listener).len(), heard, "slot {slot:?}");
        }
        assert_ne!(NO_SLOT, 3);
    }
}
