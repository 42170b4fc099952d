//! The BPF back ends, `sk-lookup` and `tc`: one object and one set of maps, two hooks.

mod compile;
#[cfg(test)]
mod frames;
mod hooks;
mod pins;
mod refuse;
mod table;
mod tc;

use std::{
    collections::{HashMap, HashSet},
    fmt,
    os::fd::{AsFd as _, AsRawFd as _},
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::{Context as _, bail};
use anyport_common::maps::{
    ACTION_EXCEPT, ACTION_STEER, Counters, MAX_RULE_ENTRIES, RuleEntry, RuleKey, SOCKETS_PER_SERVICE, names,
};
use aya::{
    Ebpf, EbpfLoader, include_bytes_aligned,
    maps::{HashMap as BpfHashMap, Map, MapData, PerCpuArray, PerCpuValues, SockMap},
    util::nr_cpus,
};
use aya_log::EbpfLogger;
use nix::sys::resource::{RLIM_INFINITY, Resource, setrlimit};
use tracing::warn;

use self::{
    hooks::{Hook, SkLookupHook},
    pins::{MAPS, PinDirectory},
    refuse::RefuseSockets,
    table::Table,
    tc::TcHook,
};
use super::{BackEnd, GroupSocket, NumberedRule, Plan, Steering};
use crate::sys;

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
}

/// A BPF back end at work.
pub struct Bpf {
    hook: Box<dyn Hook>,
    table: Table,
    rules: BpfHashMap<MapData, [u8; size_of::<RuleKey>()], [u8; size_of::<RuleEntry>()]>,
    counts: PerCpuArray<MapData, [u64; 3]>,
    sockets: SockMap<MapData>,
    /// What the maps beside the table hold.
    held: Held,
    pins: PinDirectory,
    /// Handles for pinning the maps, in the order of [`MAPS`], until that is done.
    unpinned_maps: Vec<MapData>,
    #[expect(dead_code, reason = "keeps the sockets open that a hook needs which can't refuse by itself")]
    refuse: Option<RefuseSockets>,
}

#[derive(Default)]
struct Held {
    entries: HashMap<RuleKey, RuleEntry>,
    numbers: HashSet<u32>,
    sockets: HashMap<u32, GroupSocket>,
}

impl fmt::Debug for Bpf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Bpf").field("hook", &self.hook).finish_non_exhaustive()
    }
}

impl Bpf {
    /// Loads and attaches the programs. They steer nothing before the first plan, and the pins of an earlier daemon
    /// stay in force until then.
    ///
    /// # Errors
    /// What the kernel refused. Nothing is left behind.
    pub fn open(back_end: BackEnd, options: &Options) -> anyhow::Result<Self> {
        // Gives back what it took when it is dropped, as it is where something fails below.
        let pins = PinDirectory::open(&options.bpffs)?;
        let mut ebpf = load(options.debug)?;
        if options.debug {
            forward_log(&mut ebpf)?;
        }
        let control = take_map(&mut ebpf, names::CONTROL)?;
        let table = take_map(&mut ebpf, names::TABLE)?;
        let rules = take_map(&mut ebpf, names::RULES)?;
        let counts = take_map(&mut ebpf, names::COUNTS)?;
        let sockets = take_map(&mut ebpf, names::SOCKETS)?;
        let unpinned_maps =
            [&control, &table, &rules, &counts, &sockets].into_iter().map(duplicate).collect::<anyhow::Result<_>>()?;
        let mut sockets = SockMap::try_from(sockets)?;
        let mut refuse = None;
        // Filters have no pins to replace, and those of a daemon that was killed go by the names that ours will have.
        tc::remove_leftovers()?;
        let hook: Box<dyn Hook> = match back_end {
            BackEnd::SkLookup => Box::new(SkLookupHook::attach(ebpf)?),
            BackEnd::Tc => {
                refuse = Some(RefuseSockets::open(&mut ebpf, &mut sockets)?);
                Box::new(TcHook::attach(ebpf, options.interfaces.clone(), None)?)
            }
            BackEnd::Tproxy => bail!("tproxy works without BPF"),
        };
        Ok(Self {
            hook,
            table: Table::new(table, control)?,
            rules: BpfHashMap::try_from(rules)?,
            counts: PerCpuArray::try_from(counts)?,
            sockets,
            held: Held::default(),
            pins,
            unpinned_maps,
            refuse,
        })
    }

    /// Removes what a daemon left in the kernel that had no chance to do so.
    ///
    /// # Errors
    /// A daemon is at work with the same directory, or the kernel refused.
    pub fn remove_leftovers(bpffs: &Path) -> anyhow::Result<()> {
        tc::remove_leftovers()?;
        pins::remove_leftovers(bpffs)
    }
}

impl Steering for Bpf {
    fn back_end(&self) -> BackEnd {
        self.hook.back_end()
    }

    /// What a generation needs is there before it is in force, and what only the former one needs goes afterwards.
    fn apply(&mut self, plan: &Plan) -> anyhow::Result<()> {
        let words = compile::compile(plan)?;
        let entries = entries(plan)?;
        self.add_sockets(plan)?;
        self.reset_counters(plan)?;
        self.add_entries(&entries)?;
        self.table.publish(&words)?;
        self.remove_entries(&entries)?;
        self.remove_sockets(plan)?;
        self.hook.refresh()?;
        self.pin()
    }

    fn refresh(&mut self) -> anyhow::Result<()> {
        self.hook.refresh()?;
        self.hook.pin(&self.pins)
    }

    fn interfaces(&self) -> Vec<String> {
        self.hook.interfaces()
    }

    fn degraded(&self) -> Vec<String> {
        self.hook.degraded()
    }

    fn counters(&self) -> anyhow::Result<HashMap<u32, Counters>> {
        let mut counters = HashMap::with_capacity(self.held.numbers.len());
        for number in &self.held.numbers {
            let by_cpu = self.counts.get(number, 0).context("read the counters of a rule")?;
            let mut sum = Counters::default();
            for [steered, no_socket, assign_error] in by_cpu.iter() {
                sum.steered += steered;
                sum.no_socket += no_socket;
                sum.assign_error += assign_error;
            }
            counters.insert(*number, sum);
        }
        Ok(counters)
    }

    fn detach(self: Box<Self>) -> anyhow::Result<()> {
        let Self { hook, pins, .. } = *self;
        let detached = hook.detach();
        detached.and(pins.remove())
    }
}

impl Bpf {
    fn add_sockets(&mut self, plan: &Plan) -> anyhow::Result<()> {
        for service in &plan.services {
            for (offset, group) in (0..).zip(&service.groups) {
                let index = u32::from(service.slot) * SOCKETS_PER_SERVICE + offset;
                let Some(group) = group else { continue };
                if self.held.sockets.get(&index).is_some_and(|held| Arc::ptr_eq(&held.socket, &group.socket)) {
                    continue;
                }
                self.sockets.set(index, &group.socket.as_raw_fd(), 0).with_context(|| {
                    format!("put the socket {} of service {} into the BPF map", group.bound, service.name)
                })?;
                self.held.sockets.insert(index, group.clone());
            }
        }
        Ok(())
    }

    fn remove_sockets(&mut self, plan: &Plan) -> anyhow::Result<()> {
        let wanted: HashSet<u32> = plan
            .services
            .iter()
            .flat_map(|service| {
                let first = u32::from(service.slot) * SOCKETS_PER_SERVICE;
                (first..).zip(&service.groups).filter(|(_, group)| group.is_some()).map(|(index, _)| index)
            })
            .collect();
        let unwanted = self.held.sockets.extract_if(|index, _| !wanted.contains(index));
        for (index, _) in unwanted {
            self.sockets.clear_index(&index).context("take a socket out of the BPF map")?;
        }
        Ok(())
    }

    /// A number that was another rule's before begins at zero.
    fn reset_counters(&mut self, plan: &Plan) -> anyhow::Result<()> {
        let numbers: HashSet<u32> = plan.rules.iter().map(|it| it.number).collect();
        let cpus = nr_cpus().map_err(|(_, error)| error).context("count the CPUs")?;
        for number in numbers.difference(&self.held.numbers) {
            let zeros = PerCpuValues::try_from(vec![[0; 3]; cpus]).context("reset the counters of a rule")?;
            self.counts.set(*number, zeros, 0).context("reset the counters of a rule")?;
        }
        self.held.numbers = numbers;
        Ok(())
    }

    fn add_entries(&mut self, wanted: &HashMap<RuleKey, RuleEntry>) -> anyhow::Result<()> {
        for (key, entry) in wanted {
            if self.held.entries.get(key) != Some(entry) {
                self.rules
                    .insert(bytemuck::cast::<_, [u8; _]>(*key), bytemuck::cast::<_, [u8; _]>(*entry), 0)
                    .context("write a rule into the BPF map of rules")?;
                self.held.entries.insert(*key, *entry);
            }
        }
        Ok(())
    }

    fn remove_entries(&mut self, wanted: &HashMap<RuleKey, RuleEntry>) -> anyhow::Result<()> {
        let unwanted = self.held.entries.extract_if(|key, _| !wanted.contains_key(key));
        for (key, _) in unwanted {
            self.rules.remove(&bytemuck::cast(key)).context("remove a rule from the BPF map of rules")?;
        }
        Ok(())
    }

    /// Puts this daemon's pins in the place of those of an earlier one, once.
    fn pin(&mut self) -> anyhow::Result<()> {
        if !self.unpinned_maps.is_empty() {
            self.pins.clear()?;
            for (name, map) in MAPS.iter().zip(self.unpinned_maps.drain(..)) {
                let path = self.pins.map(name);
                map.pin(&path).with_context(|| format!("pin a map as {}", path.display()))?;
            }
        }
        self.hook.pin(&self.pins)
    }
}

fn load(debug: bool) -> anyhow::Result<Ebpf> {
    // Before Linux 5.11 maps count against this limit; later it does not matter, nor whether it can be raised.
    setrlimit(Resource::RLIMIT_MEMLOCK, RLIM_INFINITY, RLIM_INFINITY).ok();
    let log_level = if debug { u8::MAX } else { 0 };
    EbpfLoader::new()
        .override_global(aya_log::LEVEL, &log_level, true)
        .load(OBJECT)
        .context("load the BPF maps (needs CAP_BPF and CAP_NET_ADMIN, or root)")
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
    let (Map::Array(data) | Map::HashMap(data) | Map::PerCpuArray(data) | Map::SockMap(data)) = map else {
        bail!("the BPF object has a map of an unexpected type: {map:?}");
    };
    let fd = data.fd().as_fd().try_clone_to_owned().context("duplicate the descriptor of a BPF map")?;
    MapData::from_fd(fd).context("duplicate the handle of a BPF map")
}

/// The rule set as an operator reads it in the map of rules.
fn entries(plan: &Plan) -> anyhow::Result<HashMap<RuleKey, RuleEntry>> {
    let mut entries = HashMap::new();
    for numbered in &plan.rules {
        let slot = plan.service(&numbered.rule.service)?.slot;
        entries.extend(
            (0..).zip(entries_of(numbered, slot)).map(|(part, entry)| (RuleKey { rule: numbered.number, part }, entry)),
        );
    }
    if entries.len() > MAX_RULE_ENTRIES as usize {
        bail!(
            "the rules have {} port ranges, counted for each transport; the limit is {MAX_RULE_ENTRIES}",
            entries.len()
        );
    }
    Ok(entries)
}

fn entries_of(NumberedRule { rule, .. }: &NumberedRule, slot: u16) -> impl Iterator<Item = RuleEntry> {
    let mut prefix = [0; 16];
    let address = rule.prefix.address();
    let ip_version = match address {
        std::net::IpAddr::V4(address) => {
            prefix[..4].copy_from_slice(&address.octets());
            4
        }
        std::net::IpAddr::V6(address) => {
            prefix = address.octets();
            6
        }
    };
    let ranges = [(ACTION_EXCEPT, &rule.except), (ACTION_STEER, &rule.ports)];
    rule.protocol.transports().iter().flat_map(move |transport| {
        ranges.into_iter().flat_map(move |(action, ports)| {
            ports.ranges().iter().map(move |(first_port, last_port)| RuleEntry {
                prefix,
                ip_version,
                prefix_len: rule.prefix.len(),
                protocol: transport.number(),
                action,
                first_port: *first_port,
                last_port: *last_port,
                service: slot.into(),
            })
        })
    })
}

#[cfg(test)]
mod tests {
    use std::{path::Path, process::Command, thread};

    use aya::programs::Program;
    use nix::{
        mount::{MsFlags, mount},
        sched::{CloneFlags, unshare},
    };

    use super::{PinDirectory, load};

    /// Runs on a thread that has a network namespace of its own, with `lo` up, and mounts of its own.
    pub(super) fn in_new_namespace(test: impl FnOnce() + Send + 'static) {
        let thread = thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).unwrap();
            mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>).unwrap();
            output("ip", "link set lo up");
            test();
        });
        thread.join().unwrap();
    }

    /// Runs with a directory of pins on a BPF file system of its own, at this path.
    pub(super) fn with_pins(test: impl FnOnce(PinDirectory, &Path) + Send + 'static) {
        in_new_namespace(|| {
            let parent = tempfile::tempdir().unwrap();
            let path = parent.path().join("bpf");
            test(PinDirectory::open(&path).unwrap(), &path);
        });
    }

    pub(super) fn output(program: &str, arguments: &str) -> String {
        let output = Command::new(program).args(arguments.split(' ')).output().unwrap();
        assert!(output.status.success(), "{program} {arguments}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// With and without the log calls, which are dead code when logging is off.
    #[test]
    fn the_verifier_takes_every_program() {
        for debug in [false, true] {
            let mut ebpf = load(debug).unwrap();
            let mut names: Vec<String> = Vec::new();
            for (name, program) in ebpf.programs_mut() {
                let loaded = match program {
                    Program::SkLookup(program) => program.load(),
                    Program::SchedClassifier(program) => program.load(),
                    Program::SkReuseport(program) => program.load(),
                    other => panic!("{name} is an unexpected {:?}", other.prog_type()),
                };
                loaded.unwrap_or_else(|error| panic!("{name}, debug {debug}: {error}"));
                names.push(name.to_owned());
            }
            names.sort();
            assert_eq!(names, ["anyport_eth", "anyport_ip", "anyport_refuse", "anyport_sk"]);
        }
    }
}
