//! What becomes of a packet, and why.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::bail;
use anyport_common::flow::{Flow, Transport};
use nix::net::if_::if_nametoindex;

use super::Engine;
use crate::{
    api::{
        AnswerView, Considered, Endpoint, Explain, Explanation, ListenerView, Problem, ProblemKind, Reason, RouteView,
        SocketView, Verdict,
    },
    host::{self, Owner},
    routes::{AnswerWay, ROUTE_PROTOCOL, Route},
    rules::{self, Decision, Prefix, Protocol, RuleRef, ServiceName, SourceLists, decide, to_address},
    service::{Family, Mark},
    steering::{BackEnd, Decided, Fate},
};

/// An ephemeral port, for a packet that comes from nowhere in particular.
const SOURCE_PORT: u16 = 40_000;
/// How many rules are explained.
const EXPLAINED: usize = 200;

impl Engine {
    /// Asks the kernel what it would do with a packet, and says why. Nothing is counted.
    ///
    /// # Errors
    /// See [`crate::api::ProblemKind`].
    pub async fn explain(&self, request: Explain) -> Result<Explanation, Problem> {
        request.validate()?;
        let Explain { protocol, to: Endpoint(to), from, via } = request;
        if let Some(via) = &via {
            expect_interface(via)?;
        }
        let transport = if protocol == Protocol::Udp { Transport::Udp } else { Transport::Tcp };
        let from_assumed = from.is_none();
        let Endpoint(from) = from.unwrap_or_else(|| Endpoint((loopback(to.is_ipv4()), SOURCE_PORT).into()));
        let flow = Flow { source: to_address(from.ip()), address: to_address(to.ip()), transport, port: to.port() };

        let (decided, rule) = self.decided(&flow)?;
        let sources =
            rule.as_ref().map_or(SourceLists::EVERYBODY, |rule| self.services.sources_of(&rule.terms.service));
        let is_filtered = match &via {
            Some(via) => !from_assumed && self.kernel.is_filtered(from.ip(), to.ip(), via).await?,
            None => false,
        };
        let is_watched = |via: &String| self.kernel.interfaces().contains(via);
        let (verdict, reason) = match decided.fate {
            _ if is_filtered => (Verdict::Drop, Reason::Filtered),
            _ if self.kernel.back_end() == BackEnd::Tc && !via.iter().all(is_watched) => {
                (Verdict::Host, Reason::Unwatched)
            }
            // Such as with tproxy, where the service sees to it.
            Fate::Steer if !sources.allows(from.ip()) => (Verdict::Drop, Reason::Denied),
            Fate::Deny => (Verdict::Drop, Reason::Denied),
            Fate::Steer => (Verdict::Steer, Reason::Steered),
            Fate::Host => (Verdict::Host, Reason::Excepted),
            Fate::Unmatched => (Verdict::Host, Reason::Unmatched),
            Fate::Drop => (Verdict::Drop, Reason::NoSocket),
        };
        let mut notes: Vec<String> = self.doubt(&decided, transport, from.ip(), to).into_iter().collect();
        let mut considered: Vec<Considered> = Vec::new();
        let mut left_out = 0;
        let mut is_about_some = false;
        for it in rules::considered(self.desired.rules(), &flow) {
            is_about_some |= it.terms.source.is_some();
            if considered.len() == EXPLAINED {
                left_out += 1;
                continue;
            }
            considered.push(Considered { rule: (&it).into(), why: rules::why(&it, &flow, rule.as_ref()) });
        }
        if from_assumed && is_about_some {
            notes
                .push("some of these rules are about certain clients only: --from says which client to ask for".into());
        }
        if from_assumed && !sources.is_empty() {
            notes.push("the service takes certain clients only: --from says which client to ask for".into());
        }
        if let Some(rule) = rule.as_ref().filter(|rule| self.desired.drains().include(&rule.prefix, rule.terms)) {
            notes.push(format!("the rule of {} is drained: anyportctl undrain ends that", rule.prefix));
        }
        let service = rule.filter(|_| verdict != Verdict::Host).map(|rule| rule.terms.service.clone());
        let socket = match (&service, verdict) {
            (Some(service), Verdict::Steer) => Some(self.socket(service, &decided, protocol, to.is_ipv4())),
            _ => None,
        };
        if socket.as_ref().is_some_and(|it| it.local.is_none()) {
            notes.push("the socket that the kernel holds for the service is none that the service knows of".into());
        }
        let route = self.route(to.ip(), rule.as_ref()).await?;
        let answered_from = route.local.then_some(to.ip());
        let answer = if from_assumed {
            None
        } else {
            Some(self.answer(from.ip(), answered_from, service.as_ref(), via.as_deref()).await?)
        };
        let (shadowed, listeners) = match verdict {
            Verdict::Steer | Verdict::Drop => (listeners(transport, to, true)?, Vec::new()),
            Verdict::Host if route.local => (Vec::new(), listeners(transport, to, false)?),
            Verdict::Host => (Vec::new(), Vec::new()),
        };
        Ok(Explanation {
            verdict,
            reason,
            protocol,
            to: Endpoint(to),
            from: Endpoint(from),
            from_assumed,
            rule: rule.as_ref().map(Into::into),
            sources: service.as_ref().filter(|_| !sources.is_empty()).map(|_| text_of(sources, from.ip())),
            service,
            socket,
            considered,
            left_out,
            route,
            answer,
            shadowed,
            held: if verdict == Verdict::Steer { self.held(transport, to.port())? } else { None },
            listeners,
            backend: self.kernel.back_end(),
            generation: decided.generation.unwrap_or(self.kernel.generation()),
            notes,
        })
    }

    /// What the kernel decides, with the rule that it names.
    fn decided(&self, flow: &Flow) -> anyhow::Result<(Decided, Option<RuleRef<'_>>)> {
        let mut unknown = 0;
        // An answer may come from a generation that is being replaced.
        for _ in 0..2 {
            let decided = self.kernel.decide(flow)?;
            let Some(number) = decided.rule else { return Ok((decided, None)) };
            if let Some(rule) = rules::considered(self.desired.rules(), flow).find(|it| it.number == number) {
                return Ok((decided, Some(rule)));
            }
            unknown = number;
        }
        bail!("the kernel decides by rule {unknown}, which is none of those around the address; status may say more")
    }

    /// What to say where the kernel decides otherwise than the rules demand.
    pub(super) fn doubt(
        &self,
        decided: &Decided,
        transport: Transport,
        source: IpAddr,
        to: SocketAddr,
    ) -> Option<String> {
        let (demanded, number) = match decide(self.desired.rules(), to.ip(), transport, to.port(), source) {
            Decision::Unmatched => (&[Fate::Unmatched][..], None),
            Decision::Host(rule) => (&[Fate::Host][..], Some(rule.number)),
            Decision::Steer(rule)
                if !self.services.context().sees_to_sources
                    && !self.services.sources_of(&rule.terms.service).allows(source) =>
            {
                (&[Fate::Deny][..], Some(rule.number))
            }
            Decision::Steer(rule) => (&[Fate::Steer, Fate::Drop][..], Some(rule.number)),
        };
        let is_right = demanded.contains(&decided.fate) && (decided.rule == number || decided.rule.is_none());
        (!is_right).then(|| {
            "the kernel decides otherwise than the rules demand; this is an error of anyport or a change by another program"
                .to_owned()
        })
    }

    /// The socket that the kernel found, and the process that serves it.
    fn socket(&self, service: &ServiceName, decided: &Decided, protocol: Protocol, is_ipv4: bool) -> SocketView {
        let family = if is_ipv4 { Family::Ipv4 } else { Family::Ipv6 };
        let running = self.services.get(service);
        let fallback = running.and_then(|it| self.services.get(it.config().fallback.as_ref()?));
        let sockets: Vec<_> = running.into_iter().chain(fallback).flat_map(|it| self.services.sockets_of(it)).collect();
        let of_kind = || sockets.iter().filter(|it| it.family == family && it.protocol == protocol);
        let found = match (decided.cookie, decided.bound) {
            (Some(cookie), _) => of_kind().find(|it| it.cookie == cookie),
            (None, Some(bound)) => of_kind().find(|it| is_found_at(it.local, bound)),
            // The kernel has been given the first one of the group.
            (None, None) => of_kind().next(),
        };
        SocketView {
            family,
            protocol,
            local: found.map(|it| it.local),
            cookie: decided.cookie.or(found.map(|it| it.cookie)),
            group: found.map_or(1, |found| of_kind().filter(|it| it.local == found.local).count()),
            pid: found.map(|it| it.pid),
            process: found.and_then(|it| host::process_name(it.pid)),
        }
    }

    /// Who is in the way of a server of the host that is bound to the wildcard address and this port.
    fn held(&self, transport: Transport, port: u16) -> anyhow::Result<Option<String>> {
        let rules = self.desired.rules();
        let is_steered = |address| rules.around(Prefix::host(address)).next().is_some();
        Ok(host::held(transport, port, is_steered)?.in_the_way(transport, port))
    }

    /// The way of an answer of a service, or of the host.
    async fn answer(
        &self,
        client: IpAddr,
        from: Option<IpAddr>,
        service: Option<&ServiceName>,
        via: Option<&str>,
    ) -> anyhow::Result<AnswerView> {
        let mark = service.and_then(|name| self.services.get(name)).and_then(|running| running.config().mark);
        let way = self.kernel.way_of_answer(client, from, mark.map_or(0, Mark::number)).await?;
        let marked = mark.map(|mark| format!(", with the mark {mark}")).unwrap_or_default();
        let (text, interface) = match way {
            AnswerWay::By { interface, block } => {
                let name = interface.as_deref().unwrap_or("one of several interfaces");
                let other = match via {
                    Some(via) if interface.as_deref() != Some(via) => {
                        format!("; the packet comes by {via}, so what stands between must take answers another way")
                    }
                    _ => String::new(),
                };
                (format!("leave by {name}, by the route to {block}{marked}{other}"), interface)
            }
            AnswerWay::Stopped(why) => {
                (format!("don't leave: {why}{marked}; see `ip rule` and `ip route get {client}`"), None)
            }
        };
        Ok(AnswerView { interface, mark, text })
    }

    async fn route(&self, address: IpAddr, rule: Option<&RuleRef<'_>>) -> anyhow::Result<RouteView> {
        let route = self.kernel.route_to(address).await?;
        let is_ours = self.kernel.covers(&Prefix::host(address));
        let text = match route {
            Some(Route { block, is_local: true, protocol: ROUTE_PROTOCOL }) => {
                format!("{block} is local by anyport's own route")
            }
            Some(Route { block, is_local: true, protocol }) => {
                format!("{block} is local by a route that is not anyport's (protocol {protocol})")
            }
            _ => {
                // The kernel drops what has a socket and is not for this host (`ip_forward` in net/ipv4/ip_forward.c).
                let back_end = self.kernel.back_end();
                let has_socket = rule.is_some() && back_end != BackEnd::SkLookup;
                let instead = match route {
                    Some(Route { block, .. }) if has_socket => format!(
                        "no local route: {back_end} counts such packets and gives them a socket, and then they are dropped \
                         instead of going on by the route to {block}"
                    ),
                    Some(Route { block, .. }) => format!("no local route: such packets go on by the route to {block}"),
                    None => "no local route, nor any other".to_owned(),
                };
                let advice = if is_ours {
                    "another program removed anyport's own, which the next change of a rule of the prefix puts back"
                        .to_owned()
                } else if let Some(rule) = rule {
                    let (v6, prefix) = (if address.is_ipv4() { "" } else { "-6 " }, rule.prefix);
                    let source = loopback(address.is_ipv4());
                    format!(
                        "the rule came with --no-route: remove it and add it again without, or run \
                         `ip {v6}route add local {prefix} dev lo src {source}`"
                    )
                } else {
                    "add-prefix makes a prefix local".to_owned()
                };
                format!("{instead}; {advice}")
            }
        };
        Ok(RouteView {
            local: route.is_some_and(|it| it.is_local),
            block: route.map(|it| it.block),
            protocol: route.map(|it| it.protocol),
            text,
        })
    }
}

/// Refuses an interface that this host lacks.
fn expect_interface(name: &str) -> Result<(), Problem> {
    let unknown = |errno| Problem::new(ProblemKind::NotFound, format!("there is no interface {name}: {errno}"));
    if_nametoindex(name).map(drop).map_err(|errno| unknown(errno).hint("`ip link` lists the interfaces"))
}

/// Whether a socket that is bound to `local` is found at `at`: TPROXY finds one at a wildcard address by loopback's.
fn is_found_at(local: SocketAddr, at: SocketAddr) -> bool {
    local == at || (local.ip().is_unspecified() && at.ip().is_loopback() && local.port() == at.port())
}

/// What lists say of a source.
fn text_of(sources: &SourceLists, source: IpAddr) -> String {
    match sources.deciding(source) {
        Some(prefix) if sources.allows(source) => format!("{source} is allowed by source-allow {prefix}"),
        Some(prefix) => format!("{source} is denied by source-deny {prefix}"),
        None if sources.allows(source) => format!("{source} is not in source-deny"),
        None => format!("{source} is not in source-allow"),
    }
}

pub(super) fn loopback(is_ipv4: bool) -> IpAddr {
    if is_ipv4 { Ipv4Addr::LOCALHOST.into() } else { Ipv6Addr::LOCALHOST.into() }
}

/// The sockets that the host would choose from by itself; where they are shadowed, those of anyport itself are left
/// out.
fn listeners(transport: Transport, to: SocketAddr, are_shadowed: bool) -> anyhow::Result<Vec<ListenerView>> {
    let listeners = host::reached(transport, to, host::listeners()?);
    let owners = host::owners(&listeners.iter().map(|it| it.inode).collect());
    let others = listeners.iter().filter(|it| !(are_shadowed && host::is_own(it, owners.get(&it.inode))));
    let mut views: Vec<ListenerView> = Vec::new();
    for listener in others {
        let owner: Option<&Owner> = owners.get(&listener.inode);
        let (pid, process) = (owner.map(|it| it.pid), owner.map(|it| it.name.clone()));
        // The sockets of a group that one process holds are one to people.
        if !views.iter().any(|it| it.local == listener.local && it.pid == pid) {
            views.push(ListenerView {
                protocol: transport.into(),
                local: listener.local,
                inode: listener.inode,
                pid,
                process,
            });
        }
    }
    Ok(views)
}
