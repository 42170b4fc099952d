//! A kernel that takes whatever it is given, and has nobody to steer.

use std::{
    collections::{BTreeSet, HashSet},
    net::IpAddr,
    ops::Range,
    sync::{Arc, Mutex},
};

use anyhow::{Result, bail};
use anyport::{
    engine::Simulation,
    host::Host,
    routes::{Holder, Local},
    rules::Prefix,
    steering::{BackEnd, Decided, Drift, Plan, Steering},
};
use anyport_common::{flow::Flow, maps::Counters};

/// One of its own for each node.
pub(crate) fn kernel() -> Simulation {
    let routes = Arc::new(Mutex::new(Routes::default()));
    Simulation { steering: Box::new(Idle), routes, connected, look, peers: |_, _| Ok(Vec::new()) }
}

#[expect(clippy::unnecessary_wraps, reason = "so it is in the real world")]
fn connected() -> Result<HashSet<IpAddr>> {
    Ok(HashSet::new())
}

#[expect(clippy::unnecessary_wraps, reason = "so it is in the real world")]
fn look() -> Result<Host> {
    Ok(Host::default())
}

#[derive(Debug)]
struct Idle;

impl Steering for Idle {
    fn back_end(&self) -> BackEnd {
        // One whose table is the kernel's, so that the engine has none.
        BackEnd::SkLookup
    }

    fn apply(&mut self, _plan: &Plan<'_>) -> Result<()> {
        Ok(())
    }

    fn lost(&mut self) -> Result<Vec<Drift>> {
        Ok(Vec::new())
    }

    fn forget_lost(&mut self) -> Result<()> {
        Ok(())
    }

    fn unrepaired(&self) -> Option<&str> {
        None
    }

    fn counters(&self) -> Result<Box<dyn Fn(u32) -> Counters + '_>> {
        Ok(Box::new(|_| Counters::default()))
    }

    fn left(&self, _numbers: &[Range<u32>]) -> Vec<(u32, Counters)> {
        Vec::new()
    }

    fn can_adopt(&self, _cookie: u64) -> bool {
        false
    }

    fn unmatched(&self) -> Result<u64> {
        Ok(0)
    }

    fn restore_counters(&mut self, _counted: &[(u32, Counters)]) -> Result<()> {
        Ok(())
    }

    fn decide(&self, _flow: &Flow) -> Result<Decided> {
        bail!("there is no traffic")
    }

    fn detach(self: Box<Self>) -> Result<()> {
        Ok(())
    }

    fn leave(self: Box<Self>) {}
}

#[derive(Debug, Default)]
struct Routes(BTreeSet<Prefix>);

impl Holder for Routes {
    fn local(&mut self) -> Result<Local> {
        let mut ours: Vec<_> = self.0.iter().copied().collect();
        ours.sort_by_key(|prefix| (!prefix.is_ipv4(), prefix.bounds().0, prefix.len()));
        Ok(Local { ours, others: HashSet::new() })
    }

    fn add(&mut self, prefixes: &[Prefix]) -> Result<Vec<Prefix>> {
        self.0.extend(prefixes);
        Ok(Vec::new())
    }

    fn remove(&mut self, prefixes: &[Prefix]) -> Result<()> {
        for prefix in prefixes {
            self.0.remove(prefix);
        }
        Ok(())
    }
}
