//! The tc programs at the ingress of each interface, attached by tcx links.
//!
//! tcx came with Linux 6.6, the release in which `bpf_sk_assign` also came to take sockets that share a port (`SO_REUSEPORT`, commit
//! 9c02bec95954), as those of services do. So a kernel that has tcx has all that is needed, and on one that has not, the program would
//! drop whatever it is to steer.

use std::{
    collections::{BTreeMap, HashSet},
    mem,
};

use anyhow::{Context as _, bail};
use aya::{
    Ebpf,
    programs::{LinkOrder, ProgramError, SchedClassifier, TcAttachType, links::FdLink, tc::TcAttachOptions},
};
use nix::libc;
use tracing::warn;

use super::{
    hooks::{Hook, MaybePinned, program},
    load::{load_program, needs},
    pins::PinDirectory,
};
use crate::{
    host::{Link, links},
    steering::{BackEnd, Drift, ObjectKind},
};

// Of `linux/if_arp.h`, which libc has in part.
const ARPHRD_RAWIP: u16 = 519;
const ARPHRD_IP6GRE: u16 = 823;
/// Beginning of the names of pinned links, before the interface's index.
const PIN: &str = "tc-";
/// For interfaces whose packets begin with an Ethernet header.
pub(super) const ETHERNET_PROGRAM: &str = "anyport_eth";
/// For interfaces whose packets begin with the IP header.
const IP_PROGRAM: &str = "anyport_ip";

#[derive(Debug)]
pub(super) struct TcHook {
    ebpf: Ebpf,
    /// The interfaces to watch; every one that is up if empty.
    selected: Vec<String>,
    attached: BTreeMap<u32, Attached>,
    failures: BTreeMap<u32, Failure>,
}

#[derive(Debug)]
struct Attached {
    interface: Interface,
    link: MaybePinned,
}

/// An interface to which the program could not be attached.
#[derive(Clone, Debug, PartialEq)]
struct Failure {
    /// Its name.
    interface: String,
    message: String,
}

#[derive(Clone, Debug, PartialEq)]
struct Interface {
    index: u32,
    name: String,
    link_type: u16,
    /// None for a kind that no program can read.
    program: Option<&'static str>,
}

impl TcHook {
    pub(super) fn attach(mut ebpf: Ebpf, selected: Vec<String>) -> anyhow::Result<Self> {
        load_all(&mut ebpf)?;
        let interfaces = interfaces()?;
        if let Some(missing) = selected.iter().find(|name| !interfaces.iter().any(|it| it.name == **name)) {
            bail!("watch the interface {missing}: there is none of that name that is up (ip link lists them)");
        }
        if let Some(unknown) = interfaces.iter().find(|it| selected.contains(&it.name) && it.program.is_none()) {
            bail!("watch the interface {}: {}", unknown.name, unknown_kind(unknown));
        }
        if interfaces.iter().all(|it| it.program.is_none()) {
            bail!("attach the tc program: no interface of a known kind is up; try: ip link set lo up");
        }
        let mut hook = Self { ebpf, selected, attached: BTreeMap::new(), failures: BTreeMap::new() };
        hook.refresh()?;
        if hook.attached.is_empty()
            && let Some(failure) = hook.failures.values().next()
        {
            bail!("{}", failure.message);
        }
        Ok(hook)
    }

    fn attach_to(&mut self, interface: &Interface) -> anyhow::Result<MaybePinned> {
        if interface.program.is_none() {
            bail!("{} is not watched: {}", interface.name, unknown_kind(interface));
        }
        let link = attach_tcx(&mut self.ebpf, interface);
        link.map(MaybePinned::No).with_context(|| format!("attach the tc program to {} (tcx)", interface.name))
    }

    /// The interfaces that are up, and on which the program is not any more where it was.
    fn detached(&self) -> anyhow::Result<Vec<u32>> {
        let mut detached = Vec::new();
        for (index, Attached { link, .. }) in &self.attached {
            if !link.is_attached()? {
                detached.push(*index);
            }
        }
        if !detached.is_empty() {
            // One that went a moment ago took its programs along.
            let up: HashSet<u32> = interfaces()?.iter().map(|it| it.index).collect();
            detached.retain(|index| up.contains(index));
        }
        Ok(detached)
    }
}

impl Hook for TcHook {
    #[cfg(test)]
    fn ebpf(&self) -> &Ebpf {
        &self.ebpf
    }

    fn back_end(&self) -> BackEnd {
        BackEnd::Tc
    }

    fn pin(&mut self, pins: &PinDirectory) -> anyhow::Result<()> {
        // An interface that went leaves a pin that keeps a link to nothing, or to one that is down.
        let mut result =
            pins.remove_stale_links(PIN, |name| self.attached.keys().any(|index| name == pin_name(*index)));
        for (index, Attached { interface, link }) in mem::take(&mut self.attached) {
            match link.pin(pins, &pin_name(index)) {
                Ok(link) => drop(self.attached.insert(index, Attached { interface, link })),
                Err(error) => result = result.and(Err(error)),
            }
        }
        if result.is_err() {
            self.refresh()?;
        }
        result
    }

    /// Attaches to the interfaces that came and forgets those that went.
    fn refresh(&mut self) -> anyhow::Result<Vec<Drift>> {
        let wanted: BTreeMap<u32, Interface> = interfaces()?
            .into_iter()
            .filter(|it| self.selected.is_empty() || self.selected.contains(&it.name))
            .map(|it| (it.index, it))
            .collect();
        let is_gone = |index: &u32, attached: &mut Attached| wanted.get(index) != Some(&attached.interface);
        let mut news = Vec::new();
        for (_, gone) in self.attached.extract_if(.., is_gone) {
            news.push(Drift::new(
                ObjectKind::Interface,
                format!("the interface {} went or is down", gone.interface.name),
            ));
        }
        let known = mem::take(&mut self.failures);
        for (index, interface) in wanted {
            if self.attached.contains_key(&index) {
                continue;
            }
            match self.attach_to(&interface) {
                Ok(link) => {
                    news.push(Drift::new(
                        ObjectKind::Interface,
                        format!("the interface {} came and is watched", interface.name),
                    ));
                    self.attached.insert(index, Attached { interface, link });
                }
                Err(error) => {
                    let failure = Failure { interface: interface.name, message: format!("{error:#}") };
                    if known.get(&index) != Some(&failure) {
                        warn!("{}", failure.message);
                    }
                    self.failures.insert(index, failure);
                }
            }
        }
        Ok(news)
    }

    fn lost(&self, pins: &PinDirectory) -> anyhow::Result<Vec<Drift>> {
        let detached = self.detached()?;
        let lost = self.attached.iter().filter_map(|(index, Attached { interface, link })| {
            if detached.contains(index) {
                return Some(Drift::new(ObjectKind::Link, format!("the link of the tc program to {}", interface.name)));
            }
            link.lost_pin(pins, &pin_name(*index))
        });
        Ok(lost.collect())
    }

    fn forget_lost(&mut self) -> anyhow::Result<()> {
        for index in self.detached()? {
            self.attached.remove(&index);
        }
        Ok(())
    }

    fn interfaces(&self) -> Vec<String> {
        self.attached.values().map(|attached| attached.interface.name.clone()).collect()
    }

    fn degraded(&self) -> Vec<String> {
        let is_there = |name: &String| self.attached.values().any(|attached| attached.interface.name == *name);
        let is_failure = |name: &String| self.failures.values().any(|failure| failure.interface == *name);
        let missing = self.selected.iter().filter(|name| !is_there(name) && !is_failure(name));
        let missing = missing.map(|name| format!("the interface {name} is to be watched, and is not there or down"));
        self.failures.values().map(|failure| failure.message.clone()).chain(missing).collect()
    }

    fn detach(self: Box<Self>) -> anyhow::Result<()> {
        Ok(())
    }

    /// Links are pinned.
    fn leave(self: Box<Self>) {}
}

/// Finds out whether the kernel has tcx links, before programs are loaded that only they can attach.
pub(super) fn expect_tcx() -> anyhow::Result<()> {
    let Some(any) = interfaces()?.into_iter().next() else {
        bail!("look for tcx: no interface is up; try: ip link set lo up");
    };
    has_tcx(SchedClassifier::query_tcx(&any.name, TcAttachType::Ingress).map(drop))
}

/// The attach type is unknown to kernels before 6.6, and to those without `CONFIG_NET_XGRESS`.
fn has_tcx(asked: Result<(), ProgramError>) -> anyhow::Result<()> {
    match asked {
        Err(ProgramError::SyscallError(error)) if error.io_error.raw_os_error() == Some(libc::EINVAL) => {
            bail!("the kernel has no tcx, by which the tc program is attached; {}", needs(BackEnd::Tc))
        }
        // It is known, whatever else went wrong: what programs are there already, root alone may ask.
        Ok(()) | Err(_) => Ok(()),
    }
}

/// Has the verifier check the programs of tc.
pub(super) fn load_all(ebpf: &mut Ebpf) -> anyhow::Result<()> {
    for name in [ETHERNET_PROGRAM, IP_PROGRAM] {
        let program: &mut SchedClassifier = program(ebpf, name)?;
        load_program(BackEnd::Tc, name, || program.load())?;
    }
    Ok(())
}

fn attach_tcx(ebpf: &mut Ebpf, interface: &Interface) -> Result<FdLink, ProgramError> {
    let program = classifier(ebpf, interface)?;
    // In front: programs behind this one still see every packet, while one in front of it may keep some back.
    let options = TcAttachOptions::TcxOrder(LinkOrder::first());
    let id = program.attach_with_options(&interface.name, TcAttachType::Ingress, options)?;
    program.take_link(id)?.try_into().map_err(|_| ProgramError::NotAttached)
}

fn classifier<'a>(ebpf: &'a mut Ebpf, interface: &Interface) -> Result<&'a mut SchedClassifier, ProgramError> {
    let program = interface.program.and_then(|program| ebpf.program_mut(program));
    program.ok_or(ProgramError::NotLoaded)?.try_into()
}

/// The interfaces that are up, `lo` among them, in the order in which they were made.
fn interfaces() -> anyhow::Result<Vec<Interface>> {
    let up = links()?.into_iter().filter(|it| it.is_up);
    let interface =
        |Link { index, name, link_type, .. }| Interface { index, name, link_type, program: program_for(link_type) };
    Ok(up.map(interface).collect())
}

/// The program that can read the packets of interfaces of this type (`ARPHRD_…`).
fn program_for(link_type: u16) -> Option<&'static str> {
    match link_type {
        // Loopback has an Ethernet header too, all zeros but for the type.
        libc::ARPHRD_ETHER | libc::ARPHRD_LOOPBACK => Some(ETHERNET_PROGRAM),
        libc::ARPHRD_NONE
        | libc::ARPHRD_PPP
        | ARPHRD_RAWIP
        | libc::ARPHRD_TUNNEL
        | libc::ARPHRD_TUNNEL6
        | libc::ARPHRD_SIT
        | libc::ARPHRD_IPGRE
        | ARPHRD_IP6GRE => Some(IP_PROGRAM),
        _ => None,
    }
}

fn unknown_kind(interface: &Interface) -> String {
    let file = format!("/sys/class/net/{}/type", interface.name);
    format!("its kind is not known (link type {} in {file}), so its packets can't be read", interface.link_type)
}

fn pin_name(index: u32) -> String {
    format!("{PIN}{index}")
}

#[cfg(test)]
mod tests {
    use std::{fs, path::Path, sync::Arc};

    use aya::{programs::ProgramError, sys::SyscallError};
    use nix::libc;

    use super::{
        super::{
            Bpf, Options, load,
            tests::{in_new_namespace, output, with_pins},
        },
        BackEnd, ETHERNET_PROGRAM, Failure, Hook, IP_PROGRAM, Interface, TcHook, expect_tcx, has_tcx, program_for,
    };

    /// As kernels before 6.6 answer.
    #[test]
    fn a_kernel_without_tcx_is_told_what_is_needed() {
        let io_error = std::io::Error::from_raw_os_error(libc::EINVAL);
        let error = has_tcx(Err(ProgramError::SyscallError(SyscallError { call: "bpf_prog_query", io_error })));
        let error = format!("{:#}", error.unwrap_err());
        assert!(error.contains("no tcx") && error.contains("tc needs Linux 6.6"), "{error}");
        let io_error = std::io::Error::from_raw_os_error(libc::EPERM);
        has_tcx(Err(ProgramError::SyscallError(SyscallError { call: "bpf_prog_get_fd_by_id", io_error }))).unwrap();
        in_new_namespace(|| expect_tcx().unwrap());
    }

    #[test]
    fn a_start_that_fails_leaves_nothing() {
        in_new_namespace(|| {
            let bpffs = tempfile::tempdir().unwrap();
            let options = Options {
                bpffs: bpffs.path().join("bpf"),
                interfaces: vec!["nope0".into()],
                debug: false,
                readers: Arc::default(),
                events: Arc::default(),
            };
            Bpf::open(BackEnd::Tc, &options).unwrap_err();
            assert!(!options.bpffs.exists());
        });
    }

    fn links(directory: &Path) -> usize {
        let pins = fs::read_dir(directory).unwrap();
        pins.filter(|pin| pin.as_ref().unwrap().file_name().to_string_lossy().starts_with("link-")).count()
    }

    #[test]
    fn pins_go_with_their_interfaces() {
        with_pins(|pins, path| {
            let mut hook = TcHook::attach(load(false).unwrap(), Vec::new()).unwrap();
            for _ in 0..3 {
                output("ip", "link add later0 up type veth peer name later1");
                hook.refresh().unwrap();
                hook.pin(&pins).unwrap();
                assert_eq!(links(path), 2);
                output("ip", "link del later0");
                hook.refresh().unwrap();
                hook.pin(&pins).unwrap();
                assert_eq!(links(path), 1);
            }
            pins.remove().unwrap();
        });
    }

    /// Where nothing can be pinned, the programs stay attached and are pinned later.
    #[test]
    fn what_can_not_be_pinned_stays_attached() {
        with_pins(|pins, path| {
            let mut hook = TcHook::attach(load(false).unwrap(), Vec::new()).unwrap();
            // A directory is in the way.
            let pin = path.join("link-tc-1");
            fs::create_dir(&pin).unwrap();
            let error = hook.pin(&pins).unwrap_err();
            assert!(error.to_string().contains("link-tc-1"), "{error:#}");
            assert_eq!(hook.interfaces(), ["lo"]);
            fs::remove_dir(&pin).unwrap();
            for _ in 0..2 {
                hook.pin(&pins).unwrap();
                assert!(pin.is_file());
            }
            pins.remove().unwrap();
        });
    }

    #[test]
    fn kinds_of_interfaces() {
        for (link_type, program) in [
            (1, Some(ETHERNET_PROGRAM)),
            (772, Some(ETHERNET_PROGRAM)),
            (519, Some(IP_PROGRAM)),
            (768, Some(IP_PROGRAM)),
            (776, Some(IP_PROGRAM)),
            (778, Some(IP_PROGRAM)),
            (823, Some(IP_PROGRAM)),
            (0xfffe, Some(IP_PROGRAM)),
            (32, None),
            (280, None),
        ] {
            assert_eq!(program_for(link_type), program, "{link_type}");
        }
    }

    #[test]
    fn a_kind_that_is_not_known_is_named() {
        in_new_namespace(|| {
            let mut hook = TcHook::attach(load(false).unwrap(), Vec::new()).unwrap();
            let interface = Interface { index: 7, name: "ib0".into(), link_type: 32, program: None };
            let error = hook.attach_to(&interface).unwrap_err().to_string();
            assert!(error.contains("ib0") && error.contains("link type 32"), "{error}");
        });
    }

    #[test]
    fn interfaces_are_followed() {
        in_new_namespace(|| {
            let mut hook = TcHook::attach(load(false).unwrap(), Vec::new()).unwrap();
            output("ip", "link add later0 up type veth peer name later1");
            hook.refresh().unwrap();
            assert_eq!(hook.interfaces(), ["lo", "later0"]);
            output("ip", "link del later0");
            hook.refresh().unwrap();
            assert_eq!(hook.interfaces(), ["lo"]);
        });
    }

    /// They have no link-layer address.
    #[test]
    fn tunnels_are_interfaces() {
        in_new_namespace(|| {
            output("ip", "tuntap add mode tun dev tun9");
            output("ip", "link set tun9 up");
            let mut hook = TcHook::attach(load(false).unwrap(), Vec::new()).unwrap();
            assert_eq!(hook.interfaces(), ["lo", "tun9"]);
            output("ip", "link set tun9 down");
            hook.refresh().unwrap();
            assert_eq!(hook.interfaces(), ["lo"]);
        });
    }

    /// The name of one is the beginning of the other's.
    #[test]
    fn degraded_names_a_missing_interface_beside_one_that_failed() {
        in_new_namespace(|| {
            let mut hook = TcHook::attach(load(false).unwrap(), Vec::new()).unwrap();
            hook.selected = vec!["x1".into(), "x10".into()];
            let failure = Failure { interface: "x10".into(), message: "attach the tc program to x10 (tcx)".into() };
            hook.failures.insert(10, failure.clone());
            let missing = "the interface x1 is to be watched, and is not there or down";
            assert_eq!(hook.degraded(), [failure.message.as_str(), missing]);
        });
    }

    #[test]
    fn an_interface_that_is_not_there_is_named() {
        in_new_namespace(|| {
            let error = TcHook::attach(load(false).unwrap(), vec!["nope0".into()]).unwrap_err();
            assert!(error.to_string().contains("nope0"), "{error:#}");
        });
    }
}
