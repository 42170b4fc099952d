//! Raises capabilities around each call of a back end.

use std::{ops::Range, sync::Arc};

use anyport_common::{flow::Flow, maps::Counters};

use super::{BackEnd, Decided, Drift, Plan, SharedCounters, Steering};
use crate::{
    privileges::{Raised, raise_for},
    table::Reader,
};

/// A back end that has its capabilities while it is called, and only then.
#[derive(Debug)]
pub(super) struct Privileged(pub(super) Box<dyn Steering>);

impl Privileged {
    fn raise(&self) -> Raised {
        raise_for(self.0.back_end())
    }
}

impl Steering for Privileged {
    fn back_end(&self) -> BackEnd {
        self.0.back_end()
    }

    fn apply(&mut self, plan: &Plan<'_>) -> anyhow::Result<()> {
        let _raised = self.raise();
        self.0.apply(plan)
    }

    fn refresh(&mut self) -> anyhow::Result<Vec<Drift>> {
        let _raised = self.raise();
        self.0.refresh()
    }

    fn lost(&mut self) -> anyhow::Result<Vec<Drift>> {
        let _raised = self.raise();
        self.0.lost()
    }

    fn forget_lost(&mut self) -> anyhow::Result<()> {
        let _raised = self.raise();
        self.0.forget_lost()
    }

    fn unrepaired(&self) -> Option<&str> {
        self.0.unrepaired()
    }

    fn interfaces(&self) -> Vec<String> {
        self.0.interfaces()
    }

    fn degraded(&self) -> Vec<String> {
        let _raised = self.raise();
        self.0.degraded()
    }

    fn counters(&self) -> anyhow::Result<Box<dyn Fn(u32) -> Counters + '_>> {
        let _raised = self.raise();
        self.0.counters()
    }

    fn left(&self, numbers: &[Range<u32>]) -> Vec<(u32, Counters)> {
        self.0.left(numbers)
    }

    fn shared_counters(&self) -> Option<Arc<dyn SharedCounters>> {
        self.0.shared_counters()
    }

    fn dropped(&self) -> anyhow::Result<Option<u64>> {
        let _raised = self.raise();
        self.0.dropped()
    }

    fn can_adopt(&self, cookie: u64) -> bool {
        let _raised = self.raise();
        self.0.can_adopt(cookie)
    }

    fn unmatched(&self) -> anyhow::Result<u64> {
        let _raised = self.raise();
        self.0.unmatched()
    }

    fn restore_counters(&mut self, counted: &[(u32, Counters)]) -> anyhow::Result<()> {
        let _raised = self.raise();
        self.0.restore_counters(counted)
    }

    fn decide(&self, flow: &Flow) -> anyhow::Result<Decided> {
        let _raised = self.raise();
        self.0.decide(flow)
    }

    fn reader(&self) -> Option<Reader> {
        self.0.reader()
    }

    fn bytes(&self) -> u64 {
        self.0.bytes()
    }

    fn detach(self: Box<Self>) -> anyhow::Result<()> {
        let _raised = self.raise();
        self.0.detach()
    }

    fn leave(self: Box<Self>) {
        let _raised = self.raise();
        self.0.leave();
    }
}
