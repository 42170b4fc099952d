//! The programs that `bench lookup` measures, each at work in a network namespace of its own.

use std::{
    fmt, fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd},
    path::Path,
    slice,
    sync::Arc,
};

use anyhow::{Context as _, Result, bail};
use anyport::{
    rules::{Change, Origin, Prefix, PrefixRules, Rule, RuleSet, RuleSpec, ServiceName},
    steering::{
        BackEnd, GroupSocket, Holder, Plan, ServiceSockets, Steering,
        bpf::{Bpf, Options},
    },
    sys::bpf::{create_array, set_inner, types_of},
};
use anyport_common::{
    flow::Transport,
    table::{LINE_WORDS, SEGMENT_WORDS},
};
use anyport_tests::{netns::Netns, prefixes::Space, prerequisites::BPFFS};
use aya::{
    Ebpf, EbpfLoader, include_bytes_aligned,
    maps::{LpmTrie, Map, SockMap, lpm_trie::Key},
    programs::{ProgramFd, SkLookup, links::PinnedLink, loaded_programs},
};
use socket2::{Domain, Socket, Type};

static BASELINES: &[u8] = include_bytes_aligned!("../../../../anyport-ebpf/prebuilt/baselines.o");

/// The service that all is steered to.
const SERVICE: u16 = 1;
/// Bits before the address in a key of the trie.
const BEFORE_ADDRESS: u32 = 8 + 16;

/// Rules that all say the same of different prefixes.
#[derive(Debug)]
pub(crate) struct Rules {
    pub(crate) space: Space,
    pub(crate) prefixes: Vec<Prefix>,
    pub(crate) terms: Arc<RuleSpec>,
}

impl Rules {
    /// The ports by which a trie has to know each prefix: 0 stands for all of them.
    pub(crate) fn trie_ports(&self) -> Vec<u16> {
        let RuleSpec { ports, except, .. } = &*self.terms;
        if ports.count() >= 65_535 {
            return vec![0];
        }
        let all = ports.ranges().iter().flat_map(|(first, last)| *first..=*last);
        all.filter(|port| !except.contains(*port)).collect()
    }
}

/// Which program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Program {
    /// Does nothing: shows what measuring costs.
    Empty,
    /// Asks an LPM trie.
    Trie,
    /// Makes a single load from as much memory as anyport's table takes.
    Load,
    /// anyport's.
    Anyport,
}

impl Program {
    pub(crate) const ALL: [Self; 4] = [Self::Empty, Self::Trie, Self::Load, Self::Anyport];
}

/// A program at work.
pub(crate) struct Subject {
    pub(crate) program: Program,
    pub(crate) namespace: Netns,
    fd: ProgramFd,
    pub(crate) sockets: Sockets,
    /// What steers, until it is taken out of the kernel.
    steering: Option<Box<dyn Steering>>,
    /// What ends with this.
    _loaded: Option<Ebpf>,
}

impl fmt::Debug for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Subject").field("program", &self.program).finish_non_exhaustive()
    }
}

impl Drop for Subject {
    fn drop(&mut self) {
        if let Some(steering) = self.steering.take() {
            // The process's end does the same.
            drop(self.namespace.enter(|| steering.detach()));
        }
    }
}

/// What receives.
#[derive(Debug)]
pub(crate) struct Sockets {
    pub(crate) tcp: Socket,
    udp: Socket,
    /// The one port that is answered where nothing is steered.
    pub(crate) port: Option<u16>,
}

impl Sockets {
    /// On one port of all addresses, or of the loopback address alone.
    fn open(space: Space, is_steered: bool) -> Result<Self> {
        let (domain, any, loopback) = if space.is_ipv4 {
            (Domain::IPV4, IpAddr::from(Ipv4Addr::UNSPECIFIED), Ipv4Addr::LOCALHOST.into())
        } else {
            (Domain::IPV6, IpAddr::from(Ipv6Addr::UNSPECIFIED), Ipv6Addr::LOCALHOST.into())
        };
        let [tcp, udp] = [Type::STREAM, Type::DGRAM].map(|kind| Socket::new(domain, kind, None));
        let (tcp, udp) = (tcp?, udp?);
        let address = if is_steered { loopback } else { any };
        // Where datagrams go does not matter here, so they may be lost.
        udp.set_recv_buffer_size(1)?;
        tcp.bind(&SocketAddr::new(address, 0).into())?;
        let bound = tcp.local_addr()?.as_socket().context("an address and port")?;
        udp.bind(&bound.into())?;
        tcp.listen(4096)?;
        Ok(Self { tcp, udp, port: (!is_steered).then_some(bound.port()) })
    }

    /// In the order of [`anyport_common::flow::Flow::socket_offset`].
    fn groups(&self, space: Space) -> Result<[Option<GroupSocket>; 4]> {
        let group = |socket: &Socket| {
            let bound = socket.local_addr()?.as_socket().context("an address and port")?;
            let cookie = socket.cookie()?;
            let holder = Holder::Us(Arc::new(OwnedFd::from(socket.try_clone()?)));
            anyhow::Ok(Some(GroupSocket { cookie, bound, holder }))
        };
        let (tcp, udp) = (group(&self.tcp)?, group(&self.udp)?);
        Ok(if space.is_ipv4 { [tcp, udp, None, None] } else { [None, None, tcp, udp] })
    }
}

impl Subject {
    /// Loads and attaches a program that steers by these rules.
    pub(crate) fn start(program: Program, rules: &Rules) -> Result<Self> {
        let namespace = Netns::new();
        if !rules.space.is_ipv4 {
            namespace.ip("-6 route add local 2001:db8::/32 dev lo");
        }
        namespace.clone().enter(|| {
            let sockets = Sockets::open(rules.space, program != Program::Empty)?;
            let (fd, loaded, steering) = match program {
                Program::Empty => {
                    let mut ebpf = EbpfLoader::new().load(BASELINES)?;
                    (attach(&mut ebpf, "baseline_empty")?, Some(ebpf), None)
                }
                Program::Trie => {
                    let mut ebpf = trie(rules, &sockets)?;
                    (attach(&mut ebpf, "baseline_lpm")?, Some(ebpf), None)
                }
                Program::Load => {
                    let mut ebpf = load(rules, &sockets)?;
                    (attach(&mut ebpf, "baseline_load")?, Some(ebpf), None)
                }
                Program::Anyport => {
                    let (fd, bpf) = anyport(rules, &sockets)?;
                    (fd, None, Some(Box::new(bpf) as Box<dyn Steering>))
                }
            };
            Ok(Self { program, namespace, fd, sockets, steering, _loaded: loaded })
        })
    }

    /// The loaded program.
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Nanoseconds that the program took and how often it ran, so far.
    pub(crate) fn ran(&self) -> Result<(u64, u64)> {
        let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", self.fd().as_raw_fd()))?;
        let field = |name: &str| -> Result<u64> {
            let value = info.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            Ok(value.with_context(|| format!("the kernel does not tell {name}"))?.trim().parse()?)
        };
        Ok((field("run_time_ns")?, field("run_cnt")?))
    }
}

fn attach(ebpf: &mut Ebpf, name: &str) -> Result<ProgramFd> {
    let program: &mut SkLookup = ebpf.program_mut(name).context("no such program")?.try_into()?;
    program.load()?;
    program.attach(fs::File::open("/proc/thread-self/ns/net")?)?;
    Ok(program.fd()?.try_clone()?)
}

/// Fills a trie.
fn trie(rules: &Rules, sockets: &Sockets) -> Result<Ebpf> {
    let Rules { space, prefixes, terms } = rules;
    let ports = rules.trie_ports();
    let transports = terms.protocol.transports();
    let entries = u32::try_from(prefixes.len() * ports.len() * transports.len())?;
    let mut ebpf = EbpfLoader::new().map_max_entries("baseline_trie", entries).load(BASELINES)?;
    let mut trie: LpmTrie<_, [u8; 20], [u32; 2]> = ebpf.map_mut("baseline_trie").context("no trie")?.try_into()?;
    for prefix in prefixes {
        let first = prefix.bounds().0;
        let (mapped, len) = if prefix.is_ipv4() { (0xffff_u128 << 32 | first, 96) } else { (first, 0) };
        let len = BEFORE_ADDRESS + len + u32::from(prefix.len());
        for transport in transports {
            for port in &ports {
                let mut key = [0; 20];
                key[0] = transport.number();
                key[1..3].copy_from_slice(&port.to_be_bytes());
                key[3..19].copy_from_slice(&mapped.to_be_bytes());
                trie.insert(&Key::new(len, key), [SERVICE.into(), len], 0)?;
            }
        }
    }
    put_sockets(&mut ebpf, *space, sockets)?;
    Ok(ebpf)
}

fn put_sockets(ebpf: &mut Ebpf, space: Space, sockets: &Sockets) -> Result<()> {
    let mut map: SockMap<_> = ebpf.map_mut("baseline_sock").context("no map of sockets")?.try_into()?;
    for (offset, group) in (0..).zip(sockets.groups(space)?) {
        if let Some(group) = group {
            map.set(u32::from(SERVICE) * 4 + offset, &group.descriptor()?.as_fd().as_raw_fd(), 0)?;
        }
    }
    Ok(())
}

/// Makes a table of as many lines as anyport's has, or up to twice as many.
fn load(rules: &Rules, sockets: &Sockets) -> Result<Ebpf> {
    // A prefix that is not beside another takes two ranges, of which four are in a line.
    let lines = (rules.prefixes.len() / 2).next_power_of_two();
    let mut ebpf = EbpfLoader::new().override_global("LINES", &u32::try_from(lines)?, true).load(BASELINES)?;
    let segments = (lines * LINE_WORDS as usize).div_ceil(SEGMENT_WORDS);
    let Some(Map::Array(typed)) = ebpf.map("baseline_type") else { bail!("no map that shows the type of words") };
    let types = types_of(typed.fd())?;
    let made = (0..u32::try_from(segments)?)
        .map(|number| Ok((number, create_array("baseline_words", SEGMENT_WORDS * 8, 1, &types)?)))
        .collect::<Result<Vec<_>>>()?;
    let Some(Map::ArrayOfMaps(words)) = ebpf.map("baseline_words") else { bail!("no map of words") };
    set_inner(words.fd(), &made)?;
    put_sockets(&mut ebpf, rules.space, sockets)?;
    Ok(ebpf)
}

/// Has anyport steer.
fn anyport(rules: &Rules, sockets: &Sockets) -> Result<(ProgramFd, Bpf)> {
    let Rules { space, prefixes, terms } = rules;
    let bpffs = Path::new(BPFFS).join("bench");
    let (readers, events) = (Arc::default(), Arc::default());
    let options = Options { bpffs: bpffs.clone(), interfaces: Vec::new(), debug: false, readers, events };
    let mut bpf = Bpf::open(BackEnd::SkLookup, &options)?;
    let mut sorted = prefixes.clone();
    sorted.sort_unstable();
    let mut added = Vec::with_capacity(sorted.len());
    for (number, prefix) in (1..).zip(sorted) {
        let mut one = PrefixRules::default();
        one.insert(&Rule { prefix, terms: Arc::clone(terms), origins: Origin::Applied.into() })?;
        one.first_number = number;
        added.push((prefix, one));
    }
    let mut set = RuleSet::default();
    set.apply(&Change { removed: Vec::new(), added });
    let service = ServiceSockets {
        slot: SERVICE,
        name: ServiceName::default_service(),
        groups: sockets.groups(*space)?,
        sources: Arc::default(),
    };
    let numbers = 1..u32::try_from(prefixes.len())? + 1;
    bpf.apply(&Plan {
        generation: 1,
        rules: set.view(),
        changed: None,
        fresh: slice::from_ref(&numbers),
        freed: &[],
        moved: &[],
        services: &[service],
    })?;
    // The library holds the link, so that the pin can go, which is the way to the link's number.
    let id = PinnedLink::from_pin(bpffs.join("link-sk-lookup"))?.unpin()?.info()?.program_id();
    let info = loaded_programs().flatten().find(|it| it.id() == id).context("the attached program is not loaded")?;
    Ok((info.fd()?, bpf))
}

/// What a program is asked in a test run.
pub(crate) fn question(target: SocketAddr, transport: Transport) -> anyport::sys::bpf::SkLookup {
    let mut context = anyport::sys::bpf::SkLookup {
        protocol: transport.number().into(),
        remote_port: 40_000_u16.to_be(),
        local_port: target.port().into(),
        ..Default::default()
    };
    let words = |address: Ipv6Addr| {
        let octets = address.octets();
        [0, 4, 8, 12].map(|at| u32::from_ne_bytes([octets[at], octets[at + 1], octets[at + 2], octets[at + 3]]))
    };
    match target.ip() {
        IpAddr::V4(address) => {
            context.family = 2;
            context.local_ip4 = u32::from_ne_bytes(address.octets());
            context.remote_ip4 = u32::from_ne_bytes(Ipv4Addr::LOCALHOST.octets());
        }
        IpAddr::V6(address) => {
            context.family = 10;
            context.local_ip6 = words(address);
            context.remote_ip6 = words(Ipv6Addr::LOCALHOST);
        }
    }
    context
}
