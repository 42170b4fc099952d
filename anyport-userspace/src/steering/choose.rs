//! Finding the back end that works here, by trying.

use anyhow::{Context as _, bail};
use tracing::{info, warn};

use super::{
    BackEnd, Steering,
    bpf::{self, Bpf},
    privileged::Privileged,
    tproxy::{self, Tproxy},
};
use crate::rights;

/// The back end in use and what is to be said of each.
#[derive(Debug)]
pub struct Chosen {
    /// The back end, attached but without rules.
    pub steering: Box<dyn Steering>,
    /// One entry for each of [`BackEnd::ALL`].
    pub outcomes: Vec<Outcome>,
}

/// Why a back end is used or not.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Which one.
    pub back_end: BackEnd,
    /// Whether it works here; nothing if it was not tried.
    pub usable: Option<bool>,
    /// Why.
    pub reason: String,
}

/// Opens the back end that was asked for, or else the first that works.
///
/// # Errors
/// The one that was asked for does not work, or none does: says what the kernel said of each.
pub fn choose(wanted: Option<BackEnd>, options: &bpf::Options) -> anyhow::Result<Chosen> {
    let mut steering: Option<Box<dyn Steering>> = None;
    let mut outcomes = Vec::new();
    for back_end in BackEnd::ALL {
        let (usable, reason) = match (&steering, wanted) {
            (_, Some(wanted)) if wanted != back_end => (None, format!("not tried: {wanted} was asked for")),
            (Some(first), _) => (None, format!("not tried: {} works and comes first", first.back_end())),
            (None, _) => match open(back_end, options) {
                Ok(opened) => {
                    steering = Some(Box::new(Privileged(opened)));
                    (Some(true), reason_to_use(wanted))
                }
                Err(error) if wanted.is_some() => {
                    return Err(error).with_context(|| format!("the back end {back_end} does not work here"));
                }
                Err(error) => (Some(false), format!("{error:#}")),
            },
        };
        outcomes.push(Outcome { back_end, usable, reason });
    }
    let Some(steering) = steering else {
        let reasons: Vec<String> = outcomes.iter().map(|it| format!("\n  {}: {}", it.back_end, it.reason)).collect();
        bail!("no back end works here:{}", reasons.concat());
    };
    for Outcome { back_end, usable, reason } in &outcomes {
        match usable {
            Some(true) => info!("steering by {back_end}: {reason}"),
            Some(false) => warn!("passed over {back_end}: {reason}"),
            None => info!("{back_end} {reason}"),
        }
    }
    Ok(Chosen { steering, outcomes })
}

fn reason_to_use(wanted: Option<BackEnd>) -> String {
    if wanted.is_some() { "it was asked for".into() } else { "the first that works here".into() }
}

fn open(back_end: BackEnd, options: &bpf::Options) -> anyhow::Result<Box<dyn Steering>> {
    rights::expect_for(back_end)?;
    let _raised = rights::raise_for(back_end);
    Ok(match back_end {
        BackEnd::SkLookup | BackEnd::Tc => Box::new(Bpf::open(back_end, options)?),
        BackEnd::Tproxy => Box::new(Tproxy::open()?),
    })
}

/// Removes what a daemon that was killed left to the back ends that are not in use now. The one in use replaces its
/// own leftovers when it gets its first plan.
///
/// # Errors
/// Another daemon is at work with the same pins, or the kernel refused.
pub fn remove_leftovers(in_use: BackEnd, options: &bpf::Options) -> anyhow::Result<()> {
    match in_use {
        BackEnd::SkLookup | BackEnd::Tc => {
            let _raised = rights::raise_for(BackEnd::Tproxy);
            tproxy::remove_leftovers()
        }
        BackEnd::Tproxy => Bpf::remove_leftovers(&options.bpffs),
    }
}
