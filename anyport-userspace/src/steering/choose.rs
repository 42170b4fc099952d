//! Finding the back end that works here, by trying.

use std::io;

use anyhow::{Context as _, bail};
use nix::errno::Errno;
use serde::{Deserialize, Serialize};
use tracing::{info, warn};

use super::{
    BackEnd, Steering,
    bpf::{self, Bpf},
    privileged::Privileged,
    tproxy::{self, Tproxy},
};
use crate::privileges;

/// The back end in use and what is to be said of each.
#[derive(Debug)]
pub struct Chosen {
    /// The back end, attached but without rules.
    pub steering: Box<dyn Steering>,
    /// One entry for each of [`BackEnd::ALL`].
    pub outcomes: Vec<Outcome>,
}

/// Why a back end is used or not.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outcome {
    /// Which one.
    pub back_end: BackEnd,
    /// Whether it works here; nothing if it was not tried.
    pub usable: Option<bool>,
    /// Why.
    pub reason: String,
    /// Whether it failed for want of something that may be there the next time, such as memory.
    #[serde(default)]
    pub is_passing: bool,
}

/// What a server of this executable found out about the back ends. The keeper hands it to the next one, which need not wait for a
/// verifier to refuse once more what it has refused. Neither outlives the keeper, so nor does it outlive the kernel.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Remembered {
    /// The settings that have a say in it.
    settings: String,
    /// As in [`Chosen`].
    outcomes: Vec<Outcome>,
}

impl Remembered {
    /// What is to be remembered of a choice.
    pub fn new(wanted: Option<BackEnd>, options: &bpf::Options, outcomes: &[Outcome]) -> Self {
        Self { settings: settings(wanted, options), outcomes: outcomes.to_vec() }
    }

    /// Those that can't work with the same settings.
    fn unusable(&self, wanted: Option<BackEnd>, options: &bpf::Options) -> Vec<Outcome> {
        if self.settings != settings(wanted, options) {
            return Vec::new();
        }
        self.outcomes.iter().filter(|it| it.usable == Some(false) && !it.is_passing).cloned().collect()
    }
}

fn settings(wanted: Option<BackEnd>, bpf::Options { bpffs, interfaces, debug, .. }: &bpf::Options) -> String {
    format!("{wanted:?} {} {interfaces:?} {debug}", bpffs.display())
}

/// Opens the back end that was asked for, or else the first that works. What a server before has tried is not tried again, unless
/// nothing else works any more.
///
/// # Errors
/// The one that was asked for does not work, or none does: says what the kernel said of each.
pub fn choose(
    wanted: Option<BackEnd>,
    options: &bpf::Options,
    remembered: Option<&Remembered>,
) -> anyhow::Result<Chosen> {
    let unusable = remembered.map(|it| it.unusable(wanted, options)).unwrap_or_default();
    match try_all(wanted, &unusable, |back_end| open(back_end, options)) {
        Err(error) if !unusable.is_empty() => {
            info!("trying all back ends again: {error:#}");
            try_all(wanted, &[], |back_end| open(back_end, options))
        }
        chosen => chosen,
    }
}

fn try_all(
    wanted: Option<BackEnd>,
    unusable: &[Outcome],
    open: impl Fn(BackEnd) -> anyhow::Result<Box<dyn Steering>>,
) -> anyhow::Result<Chosen> {
    let mut steering: Option<Box<dyn Steering>> = None;
    let mut outcomes = Vec::new();
    for back_end in BackEnd::ALL {
        if let Some(known) = unusable.iter().find(|it| it.back_end == back_end) {
            outcomes.push(known.clone());
            continue;
        }
        let mut is_passing = false;
        let (usable, reason) = match (&steering, wanted) {
            (_, Some(wanted)) if wanted != back_end => (None, format!("not tried: {wanted} was asked for")),
            (Some(first), _) => (None, format!("not tried: {} works and comes first", first.back_end())),
            (None, _) => match open(back_end) {
                Ok(opened) => {
                    steering = Some(Box::new(Privileged(opened)));
                    (Some(true), reason_to_use(wanted))
                }
                Err(error) if wanted.is_some() => {
                    return Err(error).with_context(|| format!("the back end {back_end} does not work here"));
                }
                Err(error) => {
                    is_passing = is_shortage(&error);
                    (Some(false), format!("{error:#}"))
                }
            },
        };
        outcomes.push(Outcome { back_end, usable, reason, is_passing });
    }
    let Some(steering) = steering else {
        let reasons: Vec<String> = outcomes.iter().map(|it| format!("\n  {}: {}", it.back_end, it.reason)).collect();
        bail!("no back end works here:{}", reasons.concat());
    };
    for Outcome { back_end, usable, reason, .. } in &outcomes {
        match usable {
            Some(true) => info!("steering by {back_end}: {reason}"),
            Some(false) => warn!("passed over {back_end}: {reason}"),
            None => info!("{back_end} {reason}"),
        }
    }
    Ok(Chosen { steering, outcomes })
}

/// Whether the kernel was short of something, or asked to be tried again.
fn is_shortage(error: &anyhow::Error) -> bool {
    let code = |cause: &(dyn std::error::Error + 'static)| {
        let by_io = || cause.downcast_ref::<io::Error>().and_then(io::Error::raw_os_error);
        let by_program = || cause.downcast_ref::<bpf::load::NotTaken>().and_then(|it| it.code);
        let errno = cause.downcast_ref::<Errno>().copied();
        errno.or_else(|| by_io().or_else(by_program).map(Errno::from_raw))
    };
    let codes =
        [Errno::ENOMEM, Errno::ENOBUFS, Errno::EMFILE, Errno::ENFILE, Errno::EAGAIN, Errno::EINTR, Errno::EBUSY];
    error.chain().filter_map(code).any(|it| codes.contains(&it))
}

fn reason_to_use(wanted: Option<BackEnd>) -> String {
    if wanted.is_some() { "it was asked for".into() } else { "the first that works here".into() }
}

fn open(back_end: BackEnd, options: &bpf::Options) -> anyhow::Result<Box<dyn Steering>> {
    privileges::expect_for(back_end)?;
    let _raised = privileges::raise_for(back_end);
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
            let _raised = privileges::raise_for(BackEnd::Tproxy);
            tproxy::remove_leftovers()
        }
        BackEnd::Tproxy => Bpf::remove_leftovers(&options.bpffs),
    }
}

#[cfg(test)]
mod tests {
    use std::{cell::RefCell, sync::Arc};

    use anyhow::bail;

    use super::{BackEnd, Errno, Outcome, Remembered, bpf::Options, io, is_shortage, try_all};

    fn options(interface: &str) -> Options {
        Options {
            bpffs: "/pins".into(),
            interfaces: vec![interface.to_owned()],
            debug: false,
            readers: Arc::default(),
            events: Arc::default(),
        }
    }

    /// As it comes back from the keeper.
    #[test]
    fn what_was_refused_is_not_tried_again_with_the_same_settings() {
        let refused = |back_end| Outcome { back_end, usable: Some(false), reason: "no".into(), is_passing: false };
        let last = Outcome { back_end: BackEnd::Tproxy, usable: Some(true), reason: String::new(), is_passing: false };
        let outcomes = [refused(BackEnd::SkLookup), refused(BackEnd::Tc), last];
        let text = serde_json::to_string(&Remembered::new(None, &options("lo"), &outcomes)).unwrap();
        let remembered: Remembered = serde_json::from_str(&text).unwrap();
        for (wanted, interface, is_known) in
            [(None, "lo", true), (None, "eth0", false), (Some(BackEnd::Tc), "lo", false)]
        {
            let unusable = remembered.unusable(wanted, &options(interface));
            assert_eq!(unusable.len(), if is_known { 2 } else { 0 }, "{wanted:?} {interface}");
        }
        let tried = RefCell::new(Vec::new());
        let unusable = remembered.unusable(None, &options("lo"));
        let error = try_all(None, &unusable, |back_end| {
            tried.borrow_mut().push(back_end);
            bail!("not any more")
        });
        assert_eq!(*tried.borrow(), [BackEnd::Tproxy]);
        let error = format!("{:#}", error.unwrap_err());
        assert!(error.contains("sk-lookup: no") && error.contains("tproxy: not any more"), "{error}");
    }

    #[test]
    fn a_shortage_is_no_verdict() {
        for (error, is_passing) in [
            (anyhow::Error::from(io::Error::from_raw_os_error(libc::ENOMEM)).context("load the programs"), true),
            (anyhow::Error::from(Errno::EMFILE).context("open the maps"), true),
            (anyhow::Error::from(Errno::EINVAL), false),
            (anyhow::anyhow!("the kernel is too old"), false),
        ] {
            assert_eq!(is_shortage(&error), is_passing, "{error:#}");
        }
        let outcome = |is_passing| Outcome {
            back_end: BackEnd::SkLookup,
            usable: Some(false),
            reason: String::new(),
            is_passing,
        };
        for is_passing in [true, false] {
            let remembered = Remembered::new(None, &options("lo"), &[outcome(is_passing)]);
            assert_eq!(remembered.unusable(None, &options("lo")).is_empty(), is_passing);
        }
    }
}
