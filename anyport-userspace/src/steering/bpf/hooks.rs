//! Where the programs run.

use std::{fmt, fs::File};

use anyhow::Context as _;
use aya::{
    Ebpf,
    programs::{
        Program, ProgramError, SkLookup,
        links::{FdLink, PinnedLink},
    },
};

use super::pins::PinDirectory;
use crate::steering::BackEnd;

/// An attached program.
pub(super) trait Hook: Send + Sync + fmt::Debug {
    fn back_end(&self) -> BackEnd;
    /// Keeps the program attached when this process ends.
    fn pin(&mut self, pins: &PinDirectory) -> anyhow::Result<()>;
    fn refresh(&mut self) -> anyhow::Result<()> {
        Ok(())
    }
    fn interfaces(&self) -> Vec<String> {
        Vec::new()
    }
    fn degraded(&self) -> Vec<String> {
        Vec::new()
    }
    /// Detaches the program; pins of it go with the directory.
    fn detach(self: Box<Self>) -> anyhow::Result<()>;
}

/// A link until it is pinned, and afterwards.
#[derive(Debug)]
pub(super) enum MaybePinned {
    /// Taken out only while it is pinned.
    No(Option<FdLink>),
    Yes(#[expect(dead_code, reason = "keeps the link attached")] PinnedLink),
}

impl MaybePinned {
    pub(super) fn new(link: FdLink) -> Self {
        Self::No(Some(link))
    }

    pub(super) fn is_unpinned(&self) -> bool {
        matches!(self, Self::No(_))
    }

    pub(super) fn pin(&mut self, pins: &PinDirectory, name: &str) -> anyhow::Result<()> {
        if let Self::No(link) = self
            && let Some(link) = link.take()
        {
            let path = pins.link(name);
            let pinned = link.pin(&path).with_context(|| format!("pin a link as {}", path.display()))?;
            *self = Self::Yes(pinned);
        }
        Ok(())
    }
}

/// The program of `sk-lookup`, attached to the network namespace.
#[derive(Debug)]
pub(super) struct SkLookupHook {
    link: MaybePinned,
}

impl SkLookupHook {
    pub(super) fn attach(ebpf: &mut Ebpf) -> anyhow::Result<Self> {
        let program: &mut SkLookup = program(ebpf, "anyport_sk")?;
        program.load().context("load the sk_lookup program (Linux 5.9 or later is needed)")?;
        let netns = File::open("/proc/thread-self/ns/net").context("open the network namespace")?;
        let link = program.attach(netns).context(
            "attach the sk_lookup program to the network namespace (which takes 64 such programs at most; \
             bpftool net lists them)",
        )?;
        let link = program.take_link(link).context("take the sk_lookup link over")?;
        Ok(Self { link: MaybePinned::new(link.into()) })
    }
}

impl Hook for SkLookupHook {
    fn back_end(&self) -> BackEnd {
        BackEnd::SkLookup
    }

    fn pin(&mut self, pins: &PinDirectory) -> anyhow::Result<()> {
        self.link.pin(pins, "sk-lookup")
    }

    fn detach(self: Box<Self>) -> anyhow::Result<()> {
        Ok(())
    }
}

pub(super) fn program<'a, P>(ebpf: &'a mut Ebpf, name: &str) -> anyhow::Result<&'a mut P>
where
    &'a mut P: TryFrom<&'a mut Program, Error = ProgramError>,
{
    let program = ebpf.program_mut(name).with_context(|| format!("the BPF object has no program {name}"))?;
    program.try_into().with_context(|| format!("the BPF program {name} is not of its type"))
}
