//! The tc programs at the ingress of each interface.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    mem, thread,
};

use anyhow::{Context as _, bail};
use anyport_common::flow::Flow;
use aya::{
    Ebpf,
    programs::{
        LinkOrder, ProgramError, SchedClassifier, TcAttachType, TestRun as _, TestRunOptions,
        links::FdLink,
        tc::{NlOptions, SchedClassifierLink, TcAttachOptions, TcError, qdisc_add_clsact, qdisc_detach_program},
    },
};
use futures_util::TryStreamExt as _;
use netlink_packet_route::tc::TcHandle;
use nix::{
    ifaddrs::getifaddrs,
    libc,
    net::if_::{InterfaceFlags, if_nameindex},
};
use tracing::{info, warn};

use super::{
    explain,
    hooks::{Hook, MaybePinned, loaded, program},
    pins::PinDirectory,
};
use crate::steering::{BackEnd, Kind, Loss};

// Of `linux/if_arp.h`, which libc has in part.
const ARPHRD_RAWIP: u16 = 519;
const ARPHRD_IP6GRE: u16 = 823;
/// Beginning of the names of pinned links, before the interface's index.
const PIN: &str = "tc-";
/// For interfaces whose packets begin with an Ethernet header.
const ETHERNET_PROGRAM: &str = "anyport_eth";
/// For interfaces whose packets begin with the IP header.
const IP_PROGRAM: &str = "anyport_ip";

#[derive(Debug)]
pub(super) struct TcHook {
    ebpf: Ebpf,
    /// The interfaces to watch; every one that is up if empty.
    selected: Vec<String>,
    /// tcx links where the kernel has them (6.6), else clsact filters.
    attach_by: AttachBy,
    attached: BTreeMap<u32, Attached>,
    /// The interfaces whose clsact qdisc we added.
    own_qdiscs: BTreeSet<u32>,
    failures: BTreeMap<u32, String>,
}

/// How a program gets to the ingress of an interface.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum AttachBy {
    Tcx,
    Clsact,
}

#[derive(Debug)]
struct Attached {
    interface: Interface,
    link: TcLink,
}

#[derive(Debug)]
enum TcLink {
    Tcx(MaybePinned),
    Clsact(SchedClassifierLink),
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
    /// `attach_by` is found out by trying unless it is given.
    pub(super) fn attach(mut ebpf: Ebpf, selected: Vec<String>, attach_by: Option<AttachBy>) -> anyhow::Result<Self> {
        for name in [ETHERNET_PROGRAM, IP_PROGRAM] {
            let program: &mut SchedClassifier = program(&mut ebpf, name)?;
            program.load().context("load the tc program (Linux 5.8 or later is needed, and CAP_PERFMON)")?;
        }
        let interfaces = interfaces()?;
        if let Some(missing) = selected.iter().find(|name| !interfaces.iter().any(|it| it.name == **name)) {
            bail!("watch the interface {missing}: there is none of that name that is up (ip link lists them)");
        }
        if let Some(unknown) = interfaces.iter().find(|it| selected.contains(&it.name) && it.program.is_none()) {
            bail!("watch the interface {}: {}", unknown.name, unknown_kind(unknown));
        }
        let Some(first) = interfaces.iter().find(|it| it.program.is_some()) else {
            bail!("attach the tc program: no interface of a known kind is up; try: ip link set lo up");
        };
        let attach_by = attach_by.map_or_else(|| probe(&mut ebpf, first), Ok)?;
        let (attached, own_qdiscs, failures) = (BTreeMap::new(), BTreeSet::new(), BTreeMap::new());
        let mut hook = Self { ebpf, selected, attach_by, attached, own_qdiscs, failures };
        hook.refresh()?;
        if hook.attached.is_empty()
            && let Some(failure) = hook.failures.values().next()
        {
            bail!("{failure}");
        }
        Ok(hook)
    }

    fn attach_to(&mut self, interface: &Interface) -> anyhow::Result<TcLink> {
        if interface.program.is_none() {
            bail!("{} is not watched: {}", interface.name, unknown_kind(interface));
        }
        let link = match self.attach_by {
            AttachBy::Tcx => attach_tcx(&mut self.ebpf, interface)
                .map(|link| TcLink::Tcx(MaybePinned::No(link)))
                .map_err(anyhow::Error::from),
            AttachBy::Clsact => self.attach_clsact(interface),
        };
        link.with_context(|| format!("attach the tc program to {} ({:?})", interface.name, self.attach_by))
    }

    fn attach_clsact(&mut self, interface: &Interface) -> anyhow::Result<TcLink> {
        match qdisc_add_clsact(&interface.name) {
            Ok(()) => drop(self.own_qdiscs.insert(interface.index)),
            Err(TcError::NetlinkError(error)) if error.raw_os_error() == Some(libc::EEXIST) => {}
            Err(error) => return Err(error).context("add the clsact qdisc"),
        }
        let program = classifier(&mut self.ebpf, interface)?;
        let options = TcAttachOptions::Netlink(NlOptions::default());
        let id = program.attach_with_options(&interface.name, TcAttachType::Ingress, options)?;
        Ok(TcLink::Clsact(program.take_link(id)?))
    }

    /// The interfaces that are up, and on which the program is not any more where it was.
    fn detached(&self) -> anyhow::Result<Vec<u32>> {
        let mut detached = Vec::new();
        let filters =
            if self.attach_by == AttachBy::Clsact { filters(self.attached.keys().copied())? } else { BTreeMap::new() };
        for (index, Attached { link, .. }) in &self.attached {
            let is_attached = match link {
                TcLink::Tcx(link) => link.is_attached()?,
                TcLink::Clsact(filter) => {
                    let own = (filter.priority()?, filter.handle()?.into());
                    filters.get(index).is_some_and(|filters| filters.contains(&own))
                }
            };
            if !is_attached {
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
    fn run(&self, flow: &Flow, source_port: u16) -> anyhow::Result<()> {
        let program: &SchedClassifier = loaded(&self.ebpf, ETHERNET_PROGRAM)?;
        let frame = explain::frame(flow, source_port);
        let options = TestRunOptions { data_in: Some(&frame), ..TestRunOptions::new() };
        program.test_run(options).context("run the tc program")?;
        Ok(())
    }

    fn back_end(&self) -> BackEnd {
        BackEnd::Tc
    }

    fn pin(&mut self, pins: &PinDirectory) -> anyhow::Result<()> {
        // An interface that went leaves a pin that keeps a link to nothing, or to one that is down.
        let mut result =
            pins.remove_stale_links(PIN, |name| self.attached.keys().any(|index| name == pin_name(*index)));
        for (index, Attached { interface, link }) in mem::take(&mut self.attached) {
            let link = match link {
                TcLink::Tcx(link) => link.pin(pins, &pin_name(index)).map(TcLink::Tcx),
                clsact @ TcLink::Clsact(_) => Ok(clsact),
            };
            match link {
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
    fn refresh(&mut self) -> anyhow::Result<Vec<Loss>> {
        let wanted: BTreeMap<u32, Interface> = interfaces()?
            .into_iter()
            .filter(|it| self.selected.is_empty() || self.selected.contains(&it.name))
            .map(|it| (it.index, it))
            .collect();
        let is_gone = |index: &u32, attached: &mut Attached| wanted.get(index) != Some(&attached.interface);
        let mut news = Vec::new();
        for (index, gone) in self.attached.extract_if(.., is_gone) {
            self.own_qdiscs.remove(&index);
            news.push(Loss::new(Kind::Interface, format!("the interface {} went or is down", gone.interface.name)));
        }
        let known = mem::take(&mut self.failures);
        for (index, interface) in wanted {
            if self.attached.contains_key(&index) {
                continue;
            }
            match self.attach_to(&interface) {
                Ok(link) => {
                    news.push(Loss::new(
                        Kind::Interface,
                        format!("the interface {} came and is watched", interface.name),
                    ));
                    self.attached.insert(index, Attached { interface, link });
                }
                Err(error) => {
                    let failure = format!("{error:#}");
                    if known.get(&index) != Some(&failure) {
                        warn!("{failure}");
                    }
                    self.failures.insert(index, failure);
                }
            }
        }
        Ok(news)
    }

    fn lost(&self, pins: &PinDirectory) -> anyhow::Result<Vec<Loss>> {
        let detached = self.detached()?;
        let lost = self.attached.iter().filter_map(|(index, Attached { interface, link })| match link {
            TcLink::Tcx(_) if detached.contains(index) => {
                Some(Loss::new(Kind::Link, format!("the link of the tc program to {}", interface.name)))
            }
            TcLink::Clsact(_) if detached.contains(index) => {
                Some(Loss::new(Kind::Filter, format!("the clsact filter of {}", interface.name)))
            }
            TcLink::Tcx(link) => link.lost_pin(pins, &pin_name(*index)),
            TcLink::Clsact(_) => None,
        });
        Ok(lost.collect())
    }

    fn forget_lost(&mut self) -> anyhow::Result<()> {
        for index in self.detached()? {
            if let Some(Attached { link: TcLink::Clsact(filter), .. }) = self.attached.remove(&index) {
                // The filter of somebody else may have its number by now.
                mem::forget(filter);
            }
        }
        Ok(())
    }

    fn interfaces(&self) -> Vec<String> {
        self.attached.values().map(|attached| attached.interface.name.clone()).collect()
    }

    fn degraded(&self) -> Vec<String> {
        let is_there = |name: &String| self.attached.values().any(|attached| attached.interface.name == *name);
        let is_failure = |name: &String| self.failures.values().any(|failure| failure.contains(name.as_str()));
        let missing = self.selected.iter().filter(|name| !is_there(name) && !is_failure(name));
        let missing = missing.map(|name| format!("the interface {name} is to be watched, and is not there or down"));
        self.failures.values().cloned().chain(missing).collect()
    }

    fn detach(self: Box<Self>) -> anyhow::Result<()> {
        let names: BTreeMap<u32, String> =
            self.attached.iter().map(|(index, attached)| (*index, attached.interface.name.clone())).collect();
        drop(self.attached);
        let mut result = Ok(());
        for index in self.own_qdiscs {
            let name = names.get(&index).map_or("", String::as_str);
            let removed = remove_clsact(index);
            result = result.and(removed.with_context(|| format!("remove the clsact qdisc from {name}")));
        }
        result
    }

    /// Links are pinned. Filters stay by themselves, unless aya takes them away.
    fn leave(self: Box<Self>) {
        for attached in self.attached.into_values() {
            if let TcLink::Clsact(filter) = attached.link {
                mem::forget(filter);
            }
        }
    }
}

/// Takes away the clsact filters that a daemon left, also from interfaces that are down by now. A qdisc that it added
/// stays: whose it was is not known.
pub(super) fn remove_leftovers() -> anyhow::Result<()> {
    for interface in &if_nameindex().context("list the interfaces")? {
        for program in [ETHERNET_PROGRAM, IP_PROGRAM] {
            // There is nothing to remove as a rule.
            drop(qdisc_detach_program(&interface.name().to_string_lossy(), TcAttachType::Ingress, program));
        }
    }
    Ok(())
}

/// Finds out whether the kernel has tcx links by making one.
fn probe(ebpf: &mut Ebpf, interface: &Interface) -> anyhow::Result<AttachBy> {
    match attach_tcx(ebpf, interface) {
        Ok(_) => Ok(AttachBy::Tcx),
        // The attach type is unknown to kernels before 6.6.
        Err(ProgramError::SyscallError(error)) if error.io_error.raw_os_error() == Some(libc::EINVAL) => {
            info!("the kernel has no tcx links; using clsact filters");
            Ok(AttachBy::Clsact)
        }
        Err(error) => Err(error).with_context(|| format!("attach the tc program to {} (tcx)", interface.name)),
    }
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

fn remove_clsact(index: u32) -> anyhow::Result<()> {
    with_netlink(async move |handle| {
        let mut request = handle.qdisc().del(index.cast_signed());
        request.message_mut().header.parent = TcHandle::CLSACT;
        Ok(request.execute().await?)
    })
}

/// The filters at the ingress of these interfaces, each by priority and handle.
fn filters(interfaces: impl Iterator<Item = u32>) -> anyhow::Result<BTreeMap<u32, Vec<(u16, u32)>>> {
    let interfaces: Vec<u32> = interfaces.collect();
    with_netlink(async move |handle| {
        let mut filters = BTreeMap::new();
        for index in interfaces {
            let listed = handle.traffic_filter(index.cast_signed()).get().ingress().execute().try_collect::<Vec<_>>();
            let of_interface = match listed.await {
                Ok(messages) => messages,
                // There is no qdisc, or no interface.
                Err(rtnetlink::Error::NetlinkError(_)) => continue,
                Err(error) => return Err(error).context("list the filters of an interface"),
            };
            let number = |header: &netlink_packet_route::tc::TcHeader| {
                // The upper half is the priority, the lower one the protocol.
                Some((u16::try_from(header.info >> 16).ok()?, header.handle.into()))
            };
            filters.insert(index, of_interface.iter().filter_map(|message| number(&message.header)).collect());
        }
        Ok(filters)
    })
}

/// Talks to the kernel on a thread of its own: the caller may be on a runtime, on which nothing may block.
fn with_netlink<T: Send>(talk: impl AsyncFnOnce(rtnetlink::Handle) -> anyhow::Result<T> + Send) -> anyhow::Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let on_thread = || {
        runtime.block_on(async {
            let (connection, handle, _) = rtnetlink::new_connection()?;
            tokio::spawn(connection);
            talk(handle).await
        })
    };
    thread::scope(|scope| scope.spawn(on_thread).join())
        .unwrap_or_else(|_| bail!("the thread that asks about filters panicked"))
}

/// The interfaces that are up, `lo` among them.
fn interfaces() -> anyhow::Result<Vec<Interface>> {
    let mut seen = HashSet::new();
    let interfaces = getifaddrs()
        .context("list the interfaces")?
        .filter(|it| it.flags.contains(InterfaceFlags::IFF_UP))
        .filter_map(|it| {
            let link = *it.address.as_ref()?.as_link_addr()?;
            Some(Interface {
                index: u32::try_from(link.ifindex()).ok()?,
                name: it.interface_name,
                link_type: link.hatype(),
                program: program_for(link.hatype()),
            })
        })
        .filter(|it| seen.insert(it.index))
        .collect();
    Ok(interfaces)
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

    use super::{
        super::{
            Bpf, Options, Steering as _, load,
            tests::{in_new_namespace, output, with_pins},
        },
        AttachBy, BackEnd, ETHERNET_PROGRAM, Hook, IP_PROGRAM, Interface, Kind, Loss, TcHook, program_for,
    };

    fn filters() -> String {
        output("tc", "filter show dev lo ingress")
    }

    #[test]
    fn clsact_filters_come_and_go_with_their_qdisc() {
        in_new_namespace(|| {
            let hook = TcHook::attach(load(false).unwrap(), Vec::new(), Some(AttachBy::Clsact)).unwrap();
            assert_eq!(hook.interfaces(), ["lo"]);
            assert!(filters().contains("anyport_eth"), "{}", filters());
            Box::new(hook).detach().unwrap();
            assert!(!output("tc", "qdisc show dev lo").contains("clsact"));
        });
    }

    /// The older way, which no kernel takes that has tcx.
    #[test]
    fn clsact_filters_are_put_back() {
        with_pins(|pins, _| {
            let mut hook = TcHook::attach(load(false).unwrap(), Vec::new(), Some(AttachBy::Clsact)).unwrap();
            for line in ["filter del dev lo ingress", "qdisc del dev lo clsact"] {
                assert_eq!(hook.lost(&pins).unwrap(), []);
                output("tc", line);
                let lost = hook.lost(&pins).unwrap();
                assert_eq!(lost, [Loss::new(Kind::Filter, "the clsact filter of lo")], "{line}");
                hook.forget_lost().unwrap();
                hook.refresh().unwrap();
                assert!(filters().contains("anyport_eth"), "{line}: {}", filters());
            }
            // That of somebody else is no concern of ours.
            output("tc", "qdisc add dev lo root pfifo");
            assert_eq!(hook.lost(&pins).unwrap(), []);
            Box::new(hook).detach().unwrap();
            assert!(!output("tc", "qdisc show dev lo").contains("clsact"));
        });
    }

    #[test]
    fn a_qdisc_that_was_there_stays() {
        in_new_namespace(|| {
            output("tc", "qdisc add dev lo clsact");
            let hook = TcHook::attach(load(false).unwrap(), Vec::new(), Some(AttachBy::Clsact)).unwrap();
            Box::new(hook).detach().unwrap();
            assert!(output("tc", "qdisc show dev lo").contains("clsact"));
            assert!(!filters().contains("anyport"), "{}", filters());
        });
    }

    #[test]
    fn filters_of_a_daemon_that_was_killed_are_removed() {
        in_new_namespace(|| {
            let hook = TcHook::attach(load(false).unwrap(), Vec::new(), Some(AttachBy::Clsact)).unwrap();
            std::mem::forget(hook);
            assert!(filters().contains("anyport_eth"));
            output("ip", "link set lo down");
            let bpffs = tempfile::tempdir().unwrap();
            let options = Options {
                bpffs: bpffs.path().join("bpf"),
                interfaces: Vec::new(),
                debug: false,
                readers: Arc::default(),
                events: Arc::default(),
            };
            let opened = Bpf::open(BackEnd::SkLookup, &options).unwrap();
            assert!(!filters().contains("anyport_eth"), "{}", filters());
            Box::new(opened).detach().unwrap();
        });
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
            let mut hook = TcHook::attach(load(false).unwrap(), Vec::new(), None).unwrap();
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
            let mut hook = TcHook::attach(load(false).unwrap(), Vec::new(), None).unwrap();
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
            let mut hook = TcHook::attach(load(false).unwrap(), Vec::new(), None).unwrap();
            let interface = Interface { index: 7, name: "ib0".into(), link_type: 32, program: None };
            let error = hook.attach_to(&interface).unwrap_err().to_string();
            assert!(error.contains("ib0") && error.contains("link type 32"), "{error}");
        });
    }

    #[test]
    fn tcx_is_found_and_interfaces_are_followed() {
        in_new_namespace(|| {
            let mut hook = TcHook::attach(load(false).unwrap(), Vec::new(), None).unwrap();
            assert_eq!(hook.attach_by, AttachBy::Tcx);
            output("ip", "link add later0 up type veth peer name later1");
            hook.refresh().unwrap();
            assert_eq!(hook.interfaces(), ["lo", "later0"]);
            output("ip", "link del later0");
            hook.refresh().unwrap();
            assert_eq!(hook.interfaces(), ["lo"]);
        });
    }

    #[test]
    fn an_interface_that_is_not_there_is_named() {
        in_new_namespace(|| {
            let error = TcHook::attach(load(false).unwrap(), vec!["nope0".into()], None).unwrap_err();
            assert!(error.to_string().contains("nope0"), "{error:#}");
        });
    }
}
