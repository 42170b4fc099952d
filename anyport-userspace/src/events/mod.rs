//! Events: what begins or is refused, published to subscribers.

mod bus;
mod publisher;

pub use self::{
    bus::{EventBus, KernelPublisher, Subscriber, TooManySubscribers},
    publisher::EventPublisher,
};
