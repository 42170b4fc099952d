//! Desired state, and the only path by which it gets into the kernel.
//!
//! [`Engine`] orders four types, whose fields are their own: `Desired` has the rules and their numbers, `Services` the services at work,
//! `Kernel` what the kernel holds of both, and `Kept` what is on the disk. `change.rs` takes all of them from one rule set to the next.
//!
//! Order at the start: sockets, rules, routes; so nothing reaches the host before a socket is there to take it. At the end
//! it is the reverse. Every step makes the kernel equal to what is desired and can be repeated, so a failure is undone by
//! applying the previous state again.

mod answers;
mod apply;
mod change;
mod commands;
mod decisions;
mod desired;
mod difference;
mod drain;
mod dropping;
mod explain;
mod fleet;
mod kept;
mod kernel;
mod listing;
mod observed;
mod past;
mod progress;
mod published;
mod record;
mod register;
mod reload;
mod safety;
mod served;
mod services;
mod shadow;
mod shared;
mod snapshot;
mod start;
#[cfg(test)]
mod tests;
mod views;

use std::sync::Arc;

use tokio::sync::Notify;
use tracing::error;

use self::{
    answers::Answers, apply::Unconfirmed, decisions::Decisions, desired::Desired, dropping::Dropping, kept::Kept,
    kernel::Kernel, reload::Settings, served::Served, services::Services, shadow::Shadow,
};
pub use self::{
    kernel::{Connected, Look, Peers},
    listing::Listing,
    observed::{Observed, ObservedService},
    progress::Progress,
    published::Clock,
    services::fetch_registered,
    shared::{Held, Shared, SharedEngine, beside},
    snapshot::Snapshot,
    start::Simulation,
    views::Counted,
};
use crate::{complaint::Complaint, fleet::FleetBoard, routes::Watch, service::DescriptorPool, steering::BackEnd};

/// The daemon's state and its hold on the kernel.
#[derive(Debug)]
pub struct Engine {
    desired: Desired,
    services: Services,
    kernel: Kernel,
    kept: Kept,
    settings: Settings,
    /// What was applied and waits to be confirmed.
    unconfirmed: Option<Unconfirmed>,
    /// What is served, for the router that announces it.
    served: Served,
    /// What is dropped that should be served.
    dropping: Dropping,
    /// What rules take from the host.
    shadow: Shadow,
    /// Answers that don't reach clients.
    answers: Answers,
    /// Which rules the programs are asked about next.
    decisions: Decisions,
    /// What the status says of the fleet, if this node belongs to one.
    fleet: Option<Arc<FleetBoard>>,
    /// How far a long command is.
    progress: Arc<Progress>,
    /// What other parts of the daemon complain of: that metrics are not served, or that clients don't find a socket.
    complaints: Vec<Complaint>,
}

/// By what it is judged whether clients are served.
#[derive(Clone, Copy, Debug)]
struct Facts<'a> {
    desired: &'a Desired,
    services: &'a Services,
    kernel: &'a Kernel,
}

impl Engine {
    /// How far a long command is, for clients that can't wait for it.
    pub fn progress(&self) -> Arc<Progress> {
        Arc::clone(&self.progress)
    }

    /// Says as its own what other parts of the daemon complain of.
    pub fn pass_on(&mut self, complaints: Vec<Complaint>) {
        self.complaints = complaints;
    }

    /// Which back end is in use.
    pub fn back_end(&self) -> BackEnd {
        self.kernel.back_end()
    }

    /// Notified when a process has ended that registered a socket: time to [`Self::refresh`].
    pub fn owner_exits(&self) -> Arc<Notify> {
        Arc::clone(self.services.owner_exits())
    }

    /// Reports what others do to interfaces and to our routes. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// The kernel's.
    pub fn watch(&self) -> anyhow::Result<Watch> {
        self.kernel.watch()
    }

    /// Checks again what may have changed outside: interfaces, what others have removed of ours, and addresses that keep
    /// their route only for connections. Tries again what could not be undone.
    pub async fn refresh(&mut self) {
        self.roll_back_if_due().await;
        if self.kernel.is_repair_due() {
            self.repair().await;
        }
        if let Err(error) = self.look_after_registered().await {
            error!("look after the sockets that were registered: {error:#}");
        }
        if let Err(error) = self.kernel.refresh() {
            error!("look again at interfaces and sockets: {error:#}");
        }
        // What the fleet gave, and what was rolled back, is done by now.
        self.progress.end();
        self.check_decisions();
        self.kernel.reconcile(&self.desired, &self.services, self.settings.config().mend).await;
        self.dropping.look(Facts { desired: &self.desired, services: &self.services, kernel: &self.kernel });
        self.answers.look(&self.services);
        self.look_for_shadowed().await;
        self.judge();
        self.go_on_draining().await;
        if let Err(error) = self.kernel.end_draining(self.desired.rules()).await {
            error!("remove the routes of connections that have ended: {error:#}");
            // All routes are compared then.
            let why = format!("routes of connections that have ended may be there, which is repaired: {error:#}");
            self.kernel.note_broken(why);
        }
        if let Err(error) = self.kernel.trim() {
            error!("give memory of the lookup table back: {error:#}");
        }
        if self.kept.are_counters_due() {
            self.keep_counters();
        } else if self.kept.complaint().is_some() {
            self.kept.try_out();
        }
    }

    /// Notes that routes of ours may be gone.
    pub fn suspect_routes(&mut self) {
        self.kernel.suspect_routes();
    }

    /// Withdraws everything that is announced, before nothing is there to serve it.
    pub async fn withdraw(&self) {
        self.served.withdraw().await;
    }

    /// Continues with what is announced, if something is to be.
    fn start_announcing(&mut self) {
        if let Some(announce) = &self.settings.config().announce {
            self.served.start(announce, &self.services);
            self.judge();
        }
    }

    /// Has announced what is served now. Returns the number of this judgement, if something is announced at all.
    fn judge(&mut self) -> Option<u64> {
        let Self { desired, services, kernel, served, settings, .. } = self;
        served.judge(settings.config().announce.as_ref()?, Facts { desired, services, kernel })
    }

    fn keep_counters(&mut self) {
        self.kept.save_counters(&self.desired, &self.services, &self.kernel);
    }

    /// Leaves steering in the kernel and the sockets with the keeper, for another process to go on with. Connections go on in this
    /// one; they are over when what is returned is whole again.
    pub async fn leave(mut self) -> DescriptorPool {
        self.served.leave().await;
        self.keep_counters();
        let descriptors = self.services.leave().await;
        self.kernel.leave();
        descriptors
    }

    /// Takes everything out of the kernel. The state file stays.
    ///
    /// # Errors
    /// What could not be removed; the rest is.
    pub async fn stop(mut self) -> anyhow::Result<()> {
        self.keep_counters();
        let kernel = self.kernel.detach().await;
        self.services.stop().await;
        kernel
    }
}
