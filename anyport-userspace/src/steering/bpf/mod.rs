//! The BPF back ends, `sk-lookup` and `tc`: one object and one set of maps, two hooks.

mod counts;
mod explain;
mod hooks;
mod listing;
pub(super) mod load;
mod pins;
mod refuse;
mod ring_buffer;
mod sockets;
mod table;
mod tc;
#[cfg(test)]
mod tests;

use std::{
    collections::{HashMap, HashSet},
    fmt,
    ops::Range,
    os::fd::{AsFd as _, OwnedFd},
    path::{Path, PathBuf},
    sync::{Arc, Weak},
};

use anyhow::{Context as _, bail};
use anyport_common::{
    flow::Flow,
    maps::{Counters, SOCKETS_PER_SERVICE, names},
};
use aya::{
    Ebpf, EbpfLoader, include_bytes_aligned,
    maps::{Map, MapData, PerCpuArray},
};
use aya_log::EbpfLogger;
use tracing::warn;

pub use self::pins::make_pin_directory;
use self::{
    counts::{Counts, SharedCounts},
    explain::Explainer,
    hooks::{Hook, SkLookupHook},
    listing::Listing,
    pins::{PINNED_AGAIN, PINNED_AT_ONCE, PinDirectory},
    refuse::RefuseSockets,
    ring_buffer::BpfPublisher,
    sockets::Sockets,
    table::{BpfTable, SUBSCRIBERS_WORD, map_control},
    tc::TcHook,
};
use super::{BackEnd, Decided, Drift, Holder, ObjectKind, Plan, SharedCounters, Steering};
use crate::{
    events::EventBus,
    sys,
    table::{Published, Reader},
};

static OBJECT: &[u8] = include_bytes_aligned!("../../../../anyport-ebpf/prebuilt/anyport.o");

/// What the BPF back ends need to know of the configuration.
#[derive(Clone, Debug)]
pub struct Options {
    /// Directory of the pins.
    pub bpffs: PathBuf,
    /// The interfaces that `tc` watches; every one that is up if empty.
    pub interfaces: Vec<String>,
    /// Whether the programs log what they decide.
    pub debug: bool,
    /// The readers of the lookup table in this process.
    pub readers: Arc<Published>,
    /// The event bus and its subscribers.
    pub events: Arc<EventBus>,
}

/// A BPF back end at work.
pub struct Bpf {
    hook: Box<dyn Hook>,
    table: BpfTable,
    listing: Listing,
    counts: SharedCounts,
    totals: PerCpuArray<MapData, [u64; 2]>,
    sockets: Sockets,
    explainer: Explainer,
    /// The map of sockets that an earlier daemon pinned, until ours has taken its place.
    previous: Option<Sockets>,
    /// What was put into the map of sockets.
    held: HashMap<u32, Held>,
    pins: PinDirectory,
    events: Arc<EventBus>,
    /// Handles for pinning the maps, each with its name.
    maps: Vec<(&'static str, MapData)>,
    /// Whether that was done.
    is_pinned: bool,
    /// Why pins that others have removed could not be put back.
    unpinned: Option<String>,
    /// Sockets that a hook needs which can't refuse by itself.
    refuse: Option<RefuseSockets>,
}

/// A socket in the map of sockets.
#[derive(Debug)]
struct Held {
    cookie: u64,
    /// Of a socket that this process has. One of another process is gone from the map by itself when its owner has closed it.
    descriptor: Weak<OwnedFd>,
}

impl fmt::Debug for Bpf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Bpf").field("hook", &self.hook).finish_non_exhaustive()
    }
}

impl Bpf {
    /// Loads and attaches the programs. They steer nothing before the first plan, and the pins of an earlier daemon stay
    /// active until then.
    ///
    /// # Errors
    /// What the kernel refused. Nothing is left behind.
    pub fn open(back_end: BackEnd, options: &Options) -> anyhow::Result<Self> {
        if back_end == BackEnd::Tc {
            tc::expect_tcx()?;
        }
        // Gives back what it took when it is dropped, as it is where something fails below.
        let pins = PinDirectory::open(&options.bpffs)?;
        let previous = Sockets::previous(&pins);
        let mut ebpf = load(options.debug)?;
        if options.debug {
            forward_log(&mut ebpf)?;
        }
        let control = take_map(&mut ebpf, names::CONTROL)?;
        let table = take_map(&mut ebpf, names::TABLE)?;
        let counts = take_map(&mut ebpf, names::COUNTS)?;
        let drops = take_map(&mut ebpf, names::DROPS)?;
        let batches = take_map(&mut ebpf, names::BATCHES)?;
        let totals = take_map(&mut ebpf, names::TOTALS)?;
        let sockets = take_map(&mut ebpf, names::SOCKETS)?;
        // The maps have to stay open until the programs that use them are loaded.
        let filters = take_map(&mut ebpf, names::FILTERS)?;
        let ring = take_map(&mut ebpf, names::EVENTS)?;
        let ears = BpfPublisher::new(
            &fd_of(&filters)?,
            ring,
            map_control(fd_of(&control)?)?,
            SUBSCRIBERS_WORD,
            &options.events,
        )?;
        let [rules, ports] = [names::RULES, names::PORTS].map(|name| take_map(&mut ebpf, name));
        let [segment, counter, portion] =
            [names::SEGMENT, names::COUNTER, names::PORTION].map(|name| take_map(&mut ebpf, name));
        let maps = PINNED_AT_ONCE
            .into_iter()
            .zip([&control, &table, &counts, &batches, &drops, &totals, &sockets])
            .map(|(name, map)| Ok((name, duplicate(map)?)))
            .collect::<anyhow::Result<_>>()?;
        let sockets = Sockets::new(&sockets)?;
        let explainer = Explainer::load(&mut ebpf, back_end)?;
        let mut refuse = None;
        let hook: Box<dyn Hook> = match back_end {
            BackEnd::SkLookup => Box::new(SkLookupHook::attach(ebpf)?),
            BackEnd::Tc => {
                refuse = Some(RefuseSockets::open(&mut ebpf, &sockets)?);
                Box::new(TcHook::attach(ebpf, options.interfaces.clone())?)
            }
            BackEnd::Tproxy => bail!("tproxy works without BPF"),
        };
        options.events.connect(Some(Arc::new(ears)));
        Ok(Self {
            previous,
            hook,
            events: Arc::clone(&options.events),
            table: BpfTable::new(table, &segment?, control, Arc::clone(&options.readers))?,
            listing: Listing::new(rules?, ports?)?,
            counts: Counts::new(counts, &counter?, drops, &portion?, batches)?.into(),
            totals: PerCpuArray::try_from(totals)?,
            sockets,
            explainer,
            held: HashMap::new(),
            pins,
            maps,
            is_pinned: false,
            unpinned: None,
            refuse,
        })
    }

    /// Removes what a daemon left in the kernel that had no chance to do so.
    ///
    /// # Errors
    /// A daemon is at work with the same directory, or the kernel refused.
    pub fn remove_leftovers(bpffs: &Path) -> anyhow::Result<()> {
        pins::remove_leftovers(bpffs)
    }
}

impl Steering for Bpf {
    fn back_end(&self) -> BackEnd {
        self.hook.back_end()
    }

    /// What a generation needs is there before it is active, and what only the previous one needs goes afterwards.
    fn apply(&mut self, plan: &Plan<'_>) -> anyhow::Result<()> {
        self.add_sockets(plan)?;
        let new = self.counts.write().make_room(plan.fresh).map_err(load::with_memory_limit)?;
        self.counts.read().reset(plan.fresh, &new);
        self.table.publish(plan).map_err(load::with_memory_limit)?;
        self.counts.read().move_all(plan.moved);
        self.remove_sockets(plan)?;
        self.hook.refresh()?;
        self.listing.apply(plan)?;
        self.pin()
    }

    fn refresh(&mut self) -> anyhow::Result<Vec<Drift>> {
        let mut news = self.hook.refresh()?;
        if !news.is_empty() && self.is_pinned {
            self.pin()?;
        }
        let sockets = self.put_back_sockets()?;
        if sockets > 0 {
            news.push(Drift::new(ObjectKind::Socket, format!("{sockets} sockets in the map sockets")));
        }
        self.table.trim()?;
        Ok(news)
    }

    fn lost(&mut self) -> anyhow::Result<Vec<Drift>> {
        if !self.is_pinned {
            return Ok(Vec::new());
        }
        let mut lost = self.hook.lost(&self.pins)?;
        let names = self.maps.iter().map(|(name, _)| *name).chain(PINNED_AGAIN);
        let gone = names.map(|name| self.pins.map(name)).filter(|path| !path.exists());
        lost.extend(gone.map(|path| Drift::new(ObjectKind::Pin, format!("the pin {}", path.display()))));
        if !self.pins.is_in_place() {
            lost.retain(|loss| loss.kind != ObjectKind::Pin);
            lost.push(Drift::new(ObjectKind::Pin, "the directory of the pins"));
        }
        Ok(lost)
    }

    fn forget_lost(&mut self) -> anyhow::Result<()> {
        self.table.forget_lost();
        self.hook.forget_lost()
    }

    fn unrepaired(&self) -> Option<&str> {
        self.unpinned.as_deref()
    }

    fn interfaces(&self) -> Vec<String> {
        self.hook.interfaces()
    }

    fn degraded(&self) -> Vec<String> {
        self.hook.degraded()
    }

    fn counters(&self) -> anyhow::Result<Box<dyn Fn(u32) -> Counters + '_>> {
        Ok(SharedCounters::read(&self.counts))
    }

    fn left(&self, numbers: &[Range<u32>]) -> Vec<(u32, Counters)> {
        let counters = SharedCounters::read(&self.counts);
        let all = numbers.iter().cloned().flatten().map(|number| (number, counters(number)));
        all.filter(|(_, counters)| *counters != Counters::default()).collect()
    }

    fn shared_counters(&self) -> Option<Arc<dyn SharedCounters>> {
        Some(Arc::new(self.counts.clone()))
    }

    fn dropped(&self) -> anyhow::Result<Option<u64>> {
        Ok(Some(self.counts.read().dropped()))
    }

    fn can_adopt(&self, cookie: u64) -> bool {
        self.previous.as_ref().is_some_and(|previous| previous.place_of(cookie).is_some())
    }

    fn unmatched(&self) -> anyhow::Result<u64> {
        let by_cpu = self.totals.get(&0, 0).context("read how many packets no rule speaks of")?;
        Ok(by_cpu.iter().map(|[unmatched, _]| unmatched).sum())
    }

    fn restore_counters(&mut self, counted: &[(u32, Counters)]) -> anyhow::Result<()> {
        for (number, counters) in counted {
            self.counts.read().add(*number, *counters);
        }
        Ok(())
    }

    fn decide(&self, flow: &Flow) -> anyhow::Result<Decided> {
        Self::decide(self, flow)
    }

    fn reader(&self) -> Option<Reader> {
        Some(self.table.reader())
    }

    fn bytes(&self) -> u64 {
        self.table.bytes() + self.counts.read().bytes() + self.listing.bytes()
    }

    fn detach(self: Box<Self>) -> anyhow::Result<()> {
        let Self { hook, pins, events, .. } = *self;
        events.connect(None);
        let detached = hook.detach();
        detached.and(pins.remove())
    }

    fn leave(self: Box<Self>) {
        self.events.connect(None);
        self.hook.leave();
    }
}

impl Bpf {
    fn add_sockets(&mut self, plan: &Plan<'_>) -> anyhow::Result<()> {
        for service in plan.services {
            for (offset, group) in (0..).zip(&service.groups) {
                let index = u32::from(service.slot) * SOCKETS_PER_SERVICE + offset;
                let Some(group) = group else { continue };
                // What others take out of the map is put back by us, but for what its owner has alone.
                let is_there = match &group.holder {
                    Holder::Us(_) => true,
                    Holder::Owner(_) => self.sockets.cookie(index)? == Some(group.cookie),
                };
                if is_there && self.held.get(&index).is_some_and(|held| held.cookie == group.cookie) {
                    continue;
                }
                let descriptor = match (group.descriptor(), &group.holder) {
                    (Err(_), Holder::Owner(_)) if self.goes_on(group.cookie, index)? => {
                        self.held.insert(index, Held { cookie: group.cookie, descriptor: Weak::new() });
                        continue;
                    }
                    // Its owner has ended at this very moment, which must not keep other changes from being made.
                    (Err(error), Holder::Owner(_)) => {
                        warn!("service {} has no live socket for the moment: {error:#}", service.name);
                        self.clear(index)?;
                        continue;
                    }
                    (descriptor, _) => descriptor?,
                };
                self.sockets.put(index, &*descriptor).with_context(|| {
                    format!("put the socket {} of service {} into the BPF map", group.bound, service.name)
                })?;
                let ours = match &group.holder {
                    Holder::Us(descriptor) => Arc::downgrade(descriptor),
                    Holder::Owner(_) => Weak::new(),
                };
                self.held.insert(index, Held { cookie: group.cookie, descriptor: ours });
            }
        }
        Ok(())
    }

    /// Puts the sockets that this process has into the map where others have taken them out, or put others in their place. Returns how
    /// many that were.
    fn put_back_sockets(&self) -> anyhow::Result<usize> {
        let mut count = self.refuse.as_ref().map_or(Ok(0), |refuse| refuse.put_back(&self.sockets))?;
        for (index, held) in &self.held {
            if let Some(descriptor) = held.descriptor.upgrade() {
                count += usize::from(self.sockets.put_back(*index, held.cookie, &*descriptor)?);
            }
        }
        Ok(count)
    }

    /// Takes a socket over from the map of an earlier daemon, or from another place of ours, if it is there.
    fn goes_on(&self, cookie: u64, to: u32) -> anyhow::Result<bool> {
        let ours = self.held.iter().find(|(_, held)| held.cookie == cookie).map(|(place, _)| (&self.sockets, *place));
        let previous = || self.previous.as_ref().and_then(|previous| Some((previous, previous.place_of(cookie)?)));
        let Some((map, from)) = ours.or_else(previous) else { return Ok(false) };
        let copied = map.copy(from, &self.sockets, to);
        copied.with_context(|| format!("take over the registered socket with the cookie {cookie}"))
    }

    fn remove_sockets(&mut self, plan: &Plan<'_>) -> anyhow::Result<()> {
        let wanted: HashSet<u32> = plan
            .services
            .iter()
            .flat_map(|service| {
                let first = u32::from(service.slot) * SOCKETS_PER_SERVICE;
                (first..).zip(&service.groups).filter(|(_, group)| group.is_some()).map(|(index, _)| index)
            })
            .collect();
        let unwanted: Vec<u32> = self.held.keys().copied().filter(|index| !wanted.contains(index)).collect();
        unwanted.into_iter().try_for_each(|index| self.clear(index))
    }

    /// Takes a socket out of the map, if it is still there.
    fn clear(&mut self, index: u32) -> anyhow::Result<()> {
        if self.held.remove(&index).is_none() {
            return Ok(());
        }
        self.sockets.clear(index)
    }

    /// Has everything pinned. Pins keep the program attached beyond this process, and clients are served without them: where others
    /// have removed them and they can't be put back, rules change all the same.
    fn pin(&mut self) -> anyhow::Result<()> {
        let was_pinned = self.is_pinned;
        match self.try_to_pin() {
            Err(error) if was_pinned => {
                self.unpinned = Some(format!("{error:#}"));
                Ok(())
            }
            pinned => {
                self.unpinned = None;
                pinned
            }
        }
    }

    /// Puts this daemon's pins in the place of those of an earlier one, and where others have removed them.
    fn try_to_pin(&mut self) -> anyhow::Result<()> {
        self.pins.put_back()?;
        if !self.is_pinned {
            self.pins.clear()?;
        }
        for (name, map) in &self.maps {
            let path = self.pins.map(name);
            if !path.exists() {
                map.pin(&path).with_context(|| format!("pin a map as {}", path.display()))?;
            }
        }
        self.listing.pin(&self.pins.map("rules"), &self.pins.map("ports"))?;
        self.is_pinned = true;
        self.previous = None;
        self.hook.pin(&self.pins)
    }
}

/// Finds out whether the kernel takes the programs of a back end, and leaves nothing behind.
///
/// # Errors
/// It does not: says why.
pub fn try_out(back_end: BackEnd) -> anyhow::Result<()> {
    if back_end == BackEnd::Tc {
        tc::expect_tcx()?;
    }
    let mut ebpf = load(false)?;
    Explainer::load(&mut ebpf, back_end)?;
    match back_end {
        BackEnd::SkLookup => hooks::load_sk_lookup(&mut ebpf),
        BackEnd::Tc => tc::load_all(&mut ebpf),
        BackEnd::Tproxy => bail!("tproxy works without BPF"),
    }
}

fn load(debug: bool) -> anyhow::Result<Ebpf> {
    let log_level = if debug { u8::MAX } else { 0 };
    EbpfLoader::new()
        .override_global(aya_log::LEVEL, &log_level, true)
        .load(OBJECT)
        .context(
            "load the BPF maps (needs CAP_BPF and CAP_NET_ADMIN, or root, and no seccomp filter that forbids bpf(2))",
        )
        .map_err(load::with_memory_limit)
}

/// Passes on what the programs log, as long as the runtime runs.
fn forward_log(ebpf: &mut Ebpf) -> anyhow::Result<()> {
    let logger = EbpfLogger::init(ebpf).context("read the log of the BPF programs")?;
    let mut logger = sys::watch_readable(logger).context("watch the log of the BPF programs")?;
    tokio::spawn(async move {
        loop {
            match logger.readable_mut().await {
                Ok(mut guard) => {
                    guard.get_inner_mut().flush();
                    guard.clear_ready();
                }
                Err(error) => return warn!("the log of the BPF programs ended: {error}"),
            }
        }
    });
    Ok(())
}

fn take_map(ebpf: &mut Ebpf, name: &str) -> anyhow::Result<Map> {
    ebpf.take_map(name).with_context(|| format!("the BPF object has no map {name}"))
}

/// Another handle of a map, for pinning it later.
fn duplicate(map: &Map) -> anyhow::Result<MapData> {
    MapData::from_fd(fd_of(map)?).context("duplicate the handle of a BPF map")
}

/// The types of a map that shows them.
fn types_of(map: &Map) -> anyhow::Result<sys::bpf::Types> {
    Ok(sys::bpf::types_of(fd_of(map)?)?)
}

/// Another descriptor of a map.
fn fd_of(map: &Map) -> anyhow::Result<OwnedFd> {
    let (Map::Array(data) | Map::ArrayOfMaps(data) | Map::PerCpuArray(data) | Map::SockMap(data)) = map else {
        bail!("the BPF object has a map of an unexpected type: {map:?}");
    };
    data.fd().as_fd().try_clone_to_owned().context("duplicate the descriptor of a BPF map")
}
