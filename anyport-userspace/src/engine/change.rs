//! The only path from one rule set to the next: written aside on the disk, forward once into the kernel, and valid on the disk; and
//! back once where that fails.

use super::{
    Engine,
    desired::Transition,
    kept::{Keep, Written},
    past,
};
use crate::{api::Problem, rules::Change};

impl Engine {
    /// Makes the kernel and the state file equal to the rules after a change and the services at hand, or leaves both
    /// as they are. Returns the change as it was carried out, with the numbers that the rules have got.
    pub(super) async fn change(&mut self, change: Change, keep: Keep) -> Result<Change, Problem> {
        let transition = self.desired.begin(change)?;
        // A disk that is full is found here, while the kernel still serves as before.
        let written = match self.write(keep, transition.change()) {
            Ok(written) => written,
            Err(error) => {
                self.desired.roll_back(transition);
                return Err(error.into());
            }
        };
        match self.carry_out(&transition, written).await {
            Ok(()) => {
                self.services.measure_descriptors();
                self.leave_counters(&transition);
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

    /// The rules that are gone leave what they have counted.
    fn leave_counters(&mut self, transition: &Transition) {
        let counted = self.kernel.left(&past::gone(transition.steps()));
        self.services.past_mut().leave_rules(transition.change(), &counted.into_iter().collect());
    }

    async fn carry_out(&mut self, transition: &Transition, written: Option<Written>) -> anyhow::Result<()> {
        let Self { desired, kernel, services, kept, progress, .. } = self;
        let activated = kernel.activate(desired, services, transition, progress).await;
        let Some(written) = written else { return activated };
        if activated.is_err() {
            kept.discard(written);
            return activated;
        }
        kept.activate(written)
    }

    fn write(&self, keep: Keep, change: &Change) -> anyhow::Result<Option<Written>> {
        if !matches!(keep, Keep::InMemory) {
            self.progress.begin("writing the rules down", 2);
        }
        self.kept.write(keep, &self.desired, &self.services, change)
    }

    /// Keeps what has to be there after a restart, which is in the kernel already.
    pub(super) fn keep_applied(&mut self, change: &Change, lines: Option<String>) -> anyhow::Result<()> {
        let written = self.write(Keep::AppliedOnDisk(lines), change)?;
        written.map_or(Ok(()), |it| self.kept.activate(it))
    }

    /// Makes the kernel equal to the rules, whatever it holds.
    pub(super) async fn repair(&mut self) {
        self.kernel.repair(&self.desired, &self.services).await;
    }
}
