//! Events: what begins or is refused, published to subscribers.

mod bus;
mod changes;
mod publisher;

pub use self::{
    bus::{EventBus, KernelPublisher, Subscriber, TooManySubscribers},
    changes::{Author, ChangeView},
    publisher::EventPublisher,
};
