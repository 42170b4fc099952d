//! What the daemon may do: as which user, with which capabilities, and with which of them at this moment.
//!
//! Capabilities belong to threads (`capabilities(7)`). Those that a thread of the server may have are *permitted*, and none is
//! effective except where [`raise`] stands around a call: what parses requests or communicates with peers acts without any. Threads
//! that serve connections are the exception, see [`for_data`].

mod sandbox;
mod user;

use std::{
    io,
    marker::PhantomData,
    thread::{self, JoinHandle},
};

use anyhow::{Context as _, bail};
use nix::{
    sys::resource::{RLIM_INFINITY, Resource, getrlimit, setrlimit},
    unistd::Uid,
};
pub use rustix::thread::CapabilitySet;
use rustix::thread::{
    CapabilitySets, capabilities, clear_ambient_capability_set, configure_capability_in_ambient_set, set_capabilities,
};

pub use self::{
    sandbox::{confine, narrow},
    user::{GROUP, USER, User, act_as_owner_of, become_user, expect_user},
};
use crate::back_end::{BackEnd, Choice};

/// Routes, BPF programs at hooks of the network, iptables, transparent sockets, buffers beyond `net.core.rmem_max`.
pub const NET_ADMIN: CapabilitySet = CapabilitySet::NET_ADMIN;
/// What a worker needs: foreign addresses of its own, raw answers (`CAP_NET_RAW`), and ports below 1024 to answer from.
const DATA: CapabilitySet = CapabilitySet::NET_RAW.union(CapabilitySet::NET_BIND_SERVICE);
/// What a tool such as `iptables-restore` needs; the older kind opens a raw socket.
const TOOLS: CapabilitySet = NET_ADMIN.union(CapabilitySet::NET_RAW);
/// Maps and programs. Without `CAP_PERFMON` the verifier takes a program for one that spies by speculation (`bypass_spec_v1` in
/// include/linux/bpf.h, Linux 6.18): that of tc is too long for it then, and that of sk-lookup adds numbers to pointers.
const PROGRAMS: CapabilitySet = CapabilitySet::BPF.union(CapabilitySet::PERFMON);
/// All that any back end needs.
const ALL: CapabilitySet = DATA.union(NET_ADMIN).union(PROGRAMS);

/// Finds out whether a back end may be tried.
///
/// # Errors
/// Capabilities are missing: names them.
pub fn expect_for(back_end: BackEnd) -> anyhow::Result<()> {
    let needed = match back_end {
        BackEnd::SkLookup | BackEnd::Tc => NET_ADMIN.union(PROGRAMS),
        BackEnd::Tproxy => NET_ADMIN,
    };
    expect(needed)
}

/// Finds out whether these are permitted.
fn expect(needed: CapabilitySet) -> anyhow::Result<()> {
    let permitted = capabilities(None).context("ask for the capabilities")?.permitted;
    // Before Linux 5.8 that one stood for the two of programs, and it still does.
    let implied = if permitted.contains(CapabilitySet::SYS_ADMIN) { PROGRAMS } else { CapabilitySet::empty() };
    let missing = needed - permitted - implied;
    if missing.is_empty() {
        return Ok(());
    }
    let names: Vec<_> = missing.iter_names().map(|(name, _)| format!("CAP_{name}")).collect();
    bail!(
        "it needs {}, which anyportd lacks: start it as root, or grant that (AmbientCapabilities= and CapabilityBoundingSet= in a \
         unit of systemd, capabilities of a container)",
        names.join(" and ")
    )
}

/// Lets BPF maps and programs take the memory that they need, in this process and in those that it starts. Before Linux 5.11 they
/// count against the limit of locked memory, 64 KiB as a rule, beyond which only root may go. Where that is not possible, the map that
/// does not come to be says so.
pub fn raise_memory_limit() {
    let of = Resource::RLIMIT_MEMLOCK;
    if setrlimit(of, RLIM_INFINITY, RLIM_INFINITY).is_err() {
        getrlimit(of).and_then(|(_, hard)| setrlimit(of, hard, hard)).ok();
    }
}

/// Capabilities that are effective on this thread until this is dropped.
#[derive(Debug)]
#[must_use = "they are effective for as long as this lives"]
pub struct Raised {
    /// What was effective before, if that is to be restored.
    before: Option<CapabilitySets>,
    /// Another thread has capabilities of its own.
    not_send: PhantomData<*const ()>,
}

/// Makes permitted capabilities effective. What is missing is left to the call that needs it, which says so.
pub fn raise(wanted: CapabilitySet) -> Raised {
    change(wanted, CapabilitySet::empty())
}

/// As [`raise`], with what a back end needs. The tools that it starts meanwhile inherit what they need.
pub fn raise_for(back_end: BackEnd) -> Raised {
    match back_end {
        BackEnd::SkLookup | BackEnd::Tc => raise(NET_ADMIN.union(PROGRAMS)),
        BackEnd::Tproxy => change(TOOLS, TOOLS),
    }
}

fn change(wanted: CapabilitySet, inherited: CapabilitySet) -> Raised {
    let none = Raised { before: None, not_send: PhantomData };
    // Programs that root starts have all that it may have.
    let (false, Ok(before)) = (Uid::effective().is_root(), capabilities(None)) else { return none };
    let after = CapabilitySets {
        effective: before.effective | (wanted & before.permitted),
        inheritable: before.inheritable | (inherited & before.permitted),
        ..before
    };
    if after == before || set_capabilities(None, after).is_err() {
        return none;
    }
    for capability in inherited & before.permitted {
        // What the bounding set lacks is missing later, in the tool's own words.
        configure_capability_in_ambient_set(capability, true).ok();
    }
    Raised { before: Some(before), ..none }
}

impl Drop for Raised {
    fn drop(&mut self) {
        // To have less is never refused; and what can't be inherited any more is not ambient either.
        if let Some(before) = self.before {
            set_capabilities(None, before).ok();
        }
    }
}

/// Makes only `effective` effective on this thread, and has programs inherit nothing; `permitted` can still be raised.
fn settle(permitted: CapabilitySet, effective: CapabilitySet) -> rustix::io::Result<()> {
    if Uid::effective().is_root() {
        return Ok(());
    }
    let sets = capabilities(None)?;
    clear_ambient_capability_set()?;
    let permitted = sets.permitted & permitted;
    set_capabilities(
        None,
        CapabilitySets { effective: effective & permitted, permitted, inheritable: CapabilitySet::empty() },
    )
}

/// Starts a thread that has what `limit` leaves it, one of [`for_control`], [`for_data`] and [`for_others`], before it does anything:
/// no thread of the daemon starts in another way. One that could not give the rest up does no work.
///
/// # Errors
/// The kernel refuses a thread.
pub fn start_thread(
    name: impl Into<String>,
    limit: fn() -> rustix::io::Result<()>,
    work: impl FnOnce() + Send + 'static,
) -> io::Result<JoinHandle<()>> {
    let name = name.into();
    let complaint = format!("the thread {name} ends, since it can't give up capabilities");
    let limited = move || match limit() {
        Ok(()) => work(),
        Err(error) => tracing::error!("{complaint}: {error}"),
    };
    #[expect(clippy::disallowed_methods, reason = "this is the one place where threads start")]
    thread::Builder::new().name(name).spawn(limited)
}

/// For the first thread while the daemon starts, and for all that start from it: what the choice may need is permitted, and nothing
/// is effective.
pub fn for_start(choice: Choice) -> rustix::io::Result<()> {
    let unneeded = if choice == Choice::Tproxy { PROGRAMS } else { CapabilitySet::empty() };
    settle(ALL - unneeded, CapabilitySet::empty())
}

/// For the threads of control: programs are loaded once, by the first thread, and by nobody any more.
pub fn for_control() -> rustix::io::Result<()> {
    settle(ALL - CapabilitySet::PERFMON, CapabilitySet::empty())
}

/// For threads that need nothing.
pub fn for_others() -> rustix::io::Result<()> {
    settle(CapabilitySet::empty(), CapabilitySet::empty())
}

/// For the threads that serve connections: two capabilities are always effective, since the first answer
/// from each original destination takes them, and raising one costs more than sending it.
pub fn for_data() -> rustix::io::Result<()> {
    settle(DATA, DATA)
}

#[cfg(test)]
mod tests {
    use std::thread;

    use rustix::{
        process::Uid,
        thread::{
            CapabilitySet, capabilities, capability_is_in_ambient_set, set_keep_capabilities, set_thread_res_uid,
        },
    };

    use super::{NET_ADMIN, PROGRAMS, TOOLS, for_control, for_others, for_start, raise, raise_for};
    use crate::back_end::{BackEnd, Choice};

    /// On a thread of an ordinary user who may have all.
    fn as_nobody(test: fn()) {
        let run = move || {
            let nobody = Uid::from_raw(65_534);
            set_keep_capabilities(true).unwrap();
            set_thread_res_uid(nobody, nobody, nobody).unwrap();
            test();
        };
        thread::spawn(run).join().unwrap();
    }

    fn in_force() -> CapabilitySet {
        capabilities(None).unwrap().effective
    }

    #[test]
    fn capabilities_are_in_force_around_a_call() {
        as_nobody(|| {
            for_start(Choice::Auto).unwrap();
            assert_eq!(in_force(), CapabilitySet::empty());
            {
                let _outer = raise(NET_ADMIN);
                assert_eq!(in_force(), NET_ADMIN);
                drop(raise_for(BackEnd::SkLookup));
                assert_eq!(in_force(), NET_ADMIN, "as before the inner call");
            }
            assert_eq!(in_force(), CapabilitySet::empty());
            let raised = raise_for(BackEnd::Tproxy);
            assert!(TOOLS.iter().all(|it| capability_is_in_ambient_set(it).unwrap()));
            // Threads have what the one has that starts them, until they say otherwise.
            let inherited = thread::spawn(|| {
                for_control().unwrap();
                in_force()
            });
            assert_eq!(inherited.join().unwrap(), CapabilitySet::empty());
            drop(raised);
            assert!(!TOOLS.iter().any(|it| capability_is_in_ambient_set(it).unwrap()));
        });
    }

    #[test]
    fn what_was_given_up_stays_away() {
        as_nobody(|| {
            for_control().unwrap();
            for_start(Choice::Auto).unwrap();
            let _raised = raise_for(BackEnd::Tc);
            assert_eq!(in_force() & PROGRAMS, CapabilitySet::BPF);
            for_others().unwrap();
            let _nothing = raise(NET_ADMIN);
            assert_eq!(in_force(), CapabilitySet::empty());
        });
    }
}
