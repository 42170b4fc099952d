//! Where the programs run.

use std::{fmt, fs::File, os::fd::OwnedFd};

use anyhow::Context as _;
use aya::{
    Ebpf,
    programs::{Program, ProgramError, SkLookup, links::FdLink},
};

use super::{
    load::load_program,
    pins::{PinDirectory, remove_pin},
};
use crate::{
    steering::{BackEnd, Drift, ObjectKind},
    sys,
};

/// An attached program.
pub(super) trait Hook: Send + Sync + fmt::Debug {
    fn back_end(&self) -> BackEnd;
    /// Keeps the program attached when this process ends. What can't be pinned stays attached as it was.
    fn pin(&mut self, pins: &PinDirectory) -> anyhow::Result<()>;
    /// Attaches where the program should be and never was. Returns what it did about interfaces that came and went.
    fn refresh(&mut self) -> anyhow::Result<Vec<Drift>>;
    /// Where the program was attached or pinned, and is not any more.
    fn lost(&self, pins: &PinDirectory) -> anyhow::Result<Vec<Drift>>;
    /// Forgets that the program was attached where it is not any more, so that [`Self::refresh`] attaches it again.
    fn forget_lost(&mut self) -> anyhow::Result<()>;
    /// Where the program is.
    #[cfg(test)]
    fn ebpf(&self) -> &Ebpf;
    fn interfaces(&self) -> Vec<String> {
        Vec::new()
    }
    fn degraded(&self) -> Vec<String> {
        Vec::new()
    }
    /// Detaches the program, as far as that can be done; pins of it go with the directory.
    fn detach(self: Box<Self>) -> anyhow::Result<()>;
    /// Leaves the program where it is.
    fn leave(self: Box<Self>);
}

/// A link until it is pinned, and afterwards.
#[derive(Debug)]
pub(super) enum MaybePinned {
    No(FdLink),
    Yes(OwnedFd),
}

impl MaybePinned {
    /// Pins the link where it is not pinned. One that can't be pinned for the first time is lost (aya does not return it),
    /// so that the caller has to attach again.
    pub(super) fn pin(self, pins: &PinDirectory, name: &str) -> anyhow::Result<Self> {
        let path = pins.link(name);
        let attempt = || format!("pin a link as {}", path.display());
        match self {
            Self::No(link) => {
                // An interface that went may have left its pin, and the number comes again.
                remove_pin(&path)?;
                link.pin(&path).with_context(attempt)?;
                sys::bpf::pinned(&path).map(Self::Yes).with_context(attempt)
            }
            Self::Yes(link) => {
                if !path.exists() {
                    sys::bpf::pin(&link, &path).with_context(attempt)?;
                }
                Ok(Self::Yes(link))
            }
        }
    }

    /// Whether the kernel still has the program there.
    pub(super) fn is_attached(&self) -> anyhow::Result<bool> {
        match self {
            // Between its making and its first pin there is hardly a moment.
            Self::No(_) => Ok(true),
            Self::Yes(link) => sys::bpf::is_link_attached(link).context("look at a link"),
        }
    }

    /// Why the pin of this name is missing, if it is.
    pub(super) fn lost_pin(&self, pins: &PinDirectory, name: &str) -> Option<Drift> {
        let path = pins.link(name);
        let is_lost = matches!(self, Self::Yes(_)) && !path.exists();
        is_lost.then(|| Drift::new(ObjectKind::Pin, format!("the pin {}", path.display())))
    }
}

pub(super) const SK_LOOKUP_PROGRAM: &str = "anyport_sk";
/// The name of its link's pin.
const SK_LOOKUP_PIN: &str = "sk-lookup";

/// The program of `sk-lookup`, attached to the network namespace.
#[derive(Debug)]
pub(super) struct SkLookupHook {
    ebpf: Ebpf,
    /// None only when a link was lost that could not be pinned, or was detached by others.
    link: Option<MaybePinned>,
}

impl SkLookupHook {
    pub(super) fn attach(mut ebpf: Ebpf) -> anyhow::Result<Self> {
        load_sk_lookup(&mut ebpf)?;
        let mut hook = Self { ebpf, link: None };
        hook.refresh()?;
        Ok(hook)
    }
}

/// Has the verifier check the program of sk-lookup.
pub(super) fn load_sk_lookup(ebpf: &mut Ebpf) -> anyhow::Result<()> {
    let program: &mut SkLookup = program(ebpf, SK_LOOKUP_PROGRAM)?;
    load_program(BackEnd::SkLookup, SK_LOOKUP_PROGRAM, || program.load())
}

impl Hook for SkLookupHook {
    fn back_end(&self) -> BackEnd {
        BackEnd::SkLookup
    }

    fn pin(&mut self, pins: &PinDirectory) -> anyhow::Result<()> {
        if let Some(link) = self.link.take() {
            match link.pin(pins, SK_LOOKUP_PIN) {
                Ok(link) => self.link = Some(link),
                Err(error) => {
                    self.refresh()?;
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    fn refresh(&mut self) -> anyhow::Result<Vec<Drift>> {
        if self.link.is_none() {
            let program: &mut SkLookup = program(&mut self.ebpf, SK_LOOKUP_PROGRAM)?;
            let netns = File::open("/proc/thread-self/ns/net").context("open the network namespace")?;
            let link = program.attach(netns).context(
                "attach the sk_lookup program to the network namespace (which takes 64 such programs at most; \
                 bpftool link lists them)",
            )?;
            let link = program.take_link(link).context("take the sk_lookup link over")?;
            self.link = Some(MaybePinned::No(link.into()));
        }
        Ok(Vec::new())
    }

    fn lost(&self, pins: &PinDirectory) -> anyhow::Result<Vec<Drift>> {
        let Some(link) = &self.link else { return Ok(vec![detached()]) };
        if !link.is_attached()? {
            return Ok(vec![detached()]);
        }
        Ok(link.lost_pin(pins, SK_LOOKUP_PIN).into_iter().collect())
    }

    fn forget_lost(&mut self) -> anyhow::Result<()> {
        if let Some(link) = &self.link
            && !link.is_attached()?
        {
            self.link = None;
        }
        Ok(())
    }

    #[cfg(test)]
    fn ebpf(&self) -> &Ebpf {
        &self.ebpf
    }

    fn detach(self: Box<Self>) -> anyhow::Result<()> {
        Ok(())
    }

    /// The link is pinned.
    fn leave(self: Box<Self>) {}
}

fn detached() -> Drift {
    Drift::new(ObjectKind::Link, "the link of the sk_lookup program to the network namespace")
}

/// A program that only is to be looked at.
#[cfg(test)]
pub(super) fn loaded<'a, P>(ebpf: &'a Ebpf, name: &str) -> anyhow::Result<&'a P>
where
    &'a P: TryFrom<&'a Program, Error = ProgramError>,
{
    let program = ebpf.program(name).with_context(|| format!("the BPF object has no program {name}"))?;
    program.try_into().with_context(|| format!("the BPF program {name} is not of its type"))
}

pub(super) fn program<'a, P>(ebpf: &'a mut Ebpf, name: &str) -> anyhow::Result<&'a mut P>
where
    &'a mut P: TryFrom<&'a mut Program, Error = ProgramError>,
{
    let program = ebpf.program_mut(name).with_context(|| format!("the BPF object has no program {name}"))?;
    program.try_into().with_context(|| format!("the BPF program {name} is not of its type"))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::{
        super::{load, tests::with_pins},
        Hook as _, SkLookupHook,
    };

    /// The program is attached again, and pinned when that can be done.
    #[test]
    fn a_link_that_can_not_be_pinned_is_made_anew() {
        with_pins(|pins, path| {
            let mut hook = SkLookupHook::attach(load(false).unwrap()).unwrap();
            // A directory is in the way.
            let pin = path.join("link-sk-lookup");
            fs::create_dir(&pin).unwrap();
            hook.pin(&pins).unwrap_err();
            assert!(hook.link.is_some());
            fs::remove_dir(&pin).unwrap();
            for _ in 0..2 {
                hook.pin(&pins).unwrap();
                assert!(pin.is_file());
            }
            pins.remove().unwrap();
        });
    }
}
