//! The only path from one rule set to the next: forward once, into the kernel and onto the disk, and back once where that fails.

use super::{Engine, desired::Transition, kept::Keep};
use crate::{api::Problem, rules::Change};

impl Engine {
    /// Makes the kernel and the state file equal to the rules after a change and the services at hand, or leaves both
    /// as they are. Returns the change as it was carried out, with the numbers that the rules have got.
    pub(super) async fn change(&mut self, change: Change, keep: Keep) -> Result<Change, Problem> {
        let transition = self.desired.begin(change)?;
        match self.carry_out(&transition, keep).await {
            Ok(()) => {
                self.services.measure_descriptors();
                Ok(self.desired.finish(transition))
            }
            Err(error) => {
                self.desired.roll_back(transition);
                self.kernel.roll_back(&self.desired);
                self.repair().await;
                Err(error.into())
            }
        }
    }

    async fn carry_out(&mut self, transition: &Transition, keep: Keep) -> anyhow::Result<()> {
        let Self { desired, kernel, services, kept, progress, .. } = self;
        kernel.activate(desired, services, transition, progress).await?;
        if !matches!(keep, Keep::InMemory) {
            progress.begin("writing the rules down", 5);
        }
        kept.keep(keep, desired, services, transition.change())
    }

    /// Keeps what has to be there after a restart, which is in the kernel already. See [`super::kept::Kept::save`].
    pub(super) fn save(&mut self, change: &Change, lines: Option<String>) -> anyhow::Result<()> {
        self.progress.begin("writing the rules down", 5);
        self.kept.save(&self.desired, &self.services, change, lines)
    }

    /// Makes the kernel equal to the rules, whatever it holds.
    pub(super) async fn repair(&mut self) {
        self.kernel.repair(&self.desired, &self.services).await;
    }
}
