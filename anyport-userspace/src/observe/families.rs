//! Every metric, its help, and where its values come from.

use super::{
    metrics::{Family, Metric, Number, Source, Values},
    text::MetricType,
};
use crate::{
    api::AnnounceState,
    api::{DrainState, DrainView, FleetView},
    service::UpstreamState,
};

const fn counter(name: &'static str, labels: &'static [&'static str], help: &'static str, values: Values) -> Family {
    Family { metric: Metric { name, kind: MetricType::Counter, labels, help }, values }
}

const fn gauge(name: &'static str, labels: &'static [&'static str], help: &'static str, values: Values) -> Family {
    Family { metric: Metric { name, kind: MetricType::Gauge, labels, help }, values }
}

const fn histogram(name: &'static str, help: &'static str, values: Values) -> Family {
    Family { metric: Metric { name, kind: MetricType::Histogram, labels: SERVICE, help }, values }
}

const SERVICE: &[&str] = &["service"];
const UPSTREAM: &[&str] = &["service", "upstream"];
const PREFIX: &[&str] = &["prefix", "protocol", "service"];

fn fleet<'a>(source: &Source<'a>) -> Option<&'a FleetView> {
    source.sample.observed.status.fleet.as_ref()
}

pub(super) static FAMILIES: &[Family] = &[
    gauge(
        "anyport_build_info",
        &["version"],
        "1; the version is that of the process that serves",
        Values::Some(|it| vec![(vec![it.observed.status.version.clone()], Number::Whole(1))]),
    ),
    gauge(
        "anyport_back_end_info",
        &["back_end"],
        "1 for the back end in use",
        Values::Some(|it| vec![(vec![it.observed.status.backend.to_string()], Number::Whole(1))]),
    ),
    gauge(
        "anyport_back_end_usable",
        &["back_end"],
        "Whether a back end that was tried works here",
        Values::Some(|it| {
            let tried = it.observed.status.backends.iter();
            tried.filter_map(|it| Some((vec![it.name.to_string()], it.usable?.into()))).collect()
        }),
    ),
    gauge(
        "anyport_ready",
        &[],
        "Whether `/readyz` says so",
        Values::One(|it| Some(it.sample.observed.unready.is_none().into())),
    ),
    gauge(
        "anyport_degraded",
        &[],
        "How many things do not work as they should; `anyportctl status` names them",
        Values::One(|it| Some(it.sample.observed.status.degraded.len().into())),
    ),
    gauge(
        "anyport_unconfirmed",
        &[],
        "Whether what was applied is rolled back unless it is confirmed",
        Values::One(|it| Some(it.sample.observed.status.unconfirmed.is_some().into())),
    ),
    gauge(
        "anyport_fleet_info",
        &["ring", "node", "set"],
        "1 for the set of the fleet that is active",
        Values::Some(|it| {
            let fleet = it.observed.status.fleet.iter();
            let labels = |it: &FleetView| vec![it.ring.clone(), it.node.clone(), it.set.clone().unwrap_or_default()];
            fleet.map(|it| (labels(it), Number::Whole(1))).collect()
        }),
    ),
    gauge(
        "anyport_fleet_sequence",
        &[],
        "Sequence of the ring's active pointer",
        Values::One(|it| Some(Number::Whole(fleet(it)?.sequence))),
    ),
    gauge(
        "anyport_fleet_seen_sequence",
        &[],
        "Highest sequence of the ring's pointer that was seen, also where it was refused",
        Values::One(|it| Some(Number::Whole(fleet(it)?.seen))),
    ),
    gauge(
        "anyport_fleet_refused",
        &[],
        "Whether the ring's pointer is not followed; `anyportctl status` says why",
        Values::One(|it| Some(fleet(it)?.refused.is_some().into())),
    ),
    gauge("anyport_fleet_connected", &[], "Whether etcd answers", Values::One(|it| Some(fleet(it)?.connected.into()))),
    gauge(
        "anyport_fleet_reports",
        &[],
        "Whether this node's report stands in etcd; `anyportctl status` says why not",
        Values::One(|it| Some(fleet(it)?.report_error.is_none().into())),
    ),
    gauge(
        "anyport_fleet_contact_age_seconds",
        &[],
        "How long ago etcd has answered last, if it has since the process began to serve",
        Values::One(|it| Some(Number::Real(fleet(it)?.contact_age?))),
    ),
    gauge(
        "anyport_generation",
        &[],
        "Generation of the rules that the kernel holds",
        Values::One(|it| Some(Number::Whole(it.sample.observed.status.generation))),
    ),
    gauge("anyport_rules", &[], "Rules", Values::One(|it| Some(it.sample.observed.status.rules.into()))),
    gauge(
        "anyport_rules_limit",
        &[],
        "How many rules there may be",
        Values::One(|it| Some(it.sample.observed.status.max_rules.into())),
    ),
    gauge("anyport_services", &[], "Services", Values::One(|it| Some(it.sample.observed.services.len().into()))),
    gauge(
        "anyport_workers",
        &[],
        "Threads that serve connections, and sockets in each group",
        Values::One(|it| Some(it.sample.observed.status.workers.into())),
    ),
    gauge(
        "anyport_interfaces",
        &[],
        "Interfaces that are watched, with tc",
        Values::One(|it| Some(it.sample.observed.status.interfaces.len().into())),
    ),
    gauge(
        "anyport_draining_addresses",
        &[],
        "Addresses that keep their route for connections whose rule is gone",
        Values::One(|it| Some(it.sample.observed.status.draining.len().into())),
    ),
    gauge(
        "anyport_drains",
        &["state"],
        "How much was drained by commands: announcements are being withdrawn (`withdrawing`), the withdrawal is converging (`waiting`), new connections are refused (`refusing`)",
        Values::Some(|it| {
            let states = [
                (DrainState::Withdrawing, "withdrawing"),
                (DrainState::Waiting, "waiting"),
                (DrainState::Refusing, "refusing"),
            ];
            let drained = &it.observed.status.drained;
            let count = |state| drained.iter().filter(|it| it.state == state).count();
            states.into_iter().map(|(state, label)| (vec![label.to_owned()], count(state).into())).collect()
        }),
    ),
    gauge(
        "anyport_node_drained",
        &[],
        "Whether the whole node was drained by a command, for which `/readyz` is not ready",
        Values::One(|it| {
            let is_all = |it: &DrainView| it.service.is_none() && it.prefix.is_none();
            Some(it.sample.observed.status.drained.iter().any(is_all).into())
        }),
    ),
    gauge(
        "anyport_announce_told",
        &[],
        "Whether the router has been told what is to be announced, where something is",
        Values::One(|it| Some(it.sample.observed.status.announce.as_ref()?.told.into())),
    ),
    gauge(
        "anyport_announce_prefixes",
        &["state"],
        "Prefixes that are `announced`, or not, since they are served but not for long enough (`held`), `unserved` or `drained`",
        Values::Some(|it| {
            let states = [
                (AnnounceState::Announced, "announced"),
                (AnnounceState::Held, "held"),
                (AnnounceState::Unserved, "unserved"),
                (AnnounceState::Drained, "drained"),
            ];
            let Some(announce) = &it.observed.status.announce else { return Vec::new() };
            let count = |state| announce.prefixes.iter().filter(|it| it.state == state).count();
            states.into_iter().map(|(state, label)| (vec![label.to_owned()], count(state).into())).collect()
        }),
    ),
    counter(
        "anyport_announce_changes_total",
        &["change"],
        "How often prefixes were `announced` and `withdrawn`",
        Values::Some(|it| {
            let Some(announce) = &it.observed.status.announce else { return Vec::new() };
            let changes = [("announced", announce.announcements), ("withdrawn", announce.withdrawals)];
            changes.into_iter().map(|(label, count)| (vec![label.to_owned()], Number::Whole(count))).collect()
        }),
    ),
    gauge(
        "anyport_kernel_memory_bytes",
        &[],
        "Memory of the kernel that rules and counters take",
        Values::One(|it| Some(Number::Whole(it.sample.observed.status.bytes))),
    ),
    gauge(
        "anyport_client_descriptors",
        &[],
        "File descriptors that clients take",
        Values::One(|it| {
            let observed = &it.sample.observed;
            Some((observed.descriptors - observed.free_descriptors).into())
        }),
    ),
    gauge(
        "anyport_client_descriptors_limit",
        &[],
        "File descriptors that clients may take: the limit of open files less what anyportd needs itself",
        Values::One(|it| Some(it.sample.observed.descriptors.into())),
    ),
    counter(
        "anyport_no_route_total",
        &[],
        "Packets of the host, answers among them, to which there was no route",
        Values::One(|it| Some(Number::Whole(it.sample.observed.status.totals.no_route))),
    ),
    counter(
        "anyport_queue_full_total",
        &[],
        "Attempts to connect that found a queue full, of any server of the host",
        Values::One(|it| Some(Number::Whole(it.sample.observed.status.totals.queue_full))),
    ),
    counter(
        "anyport_unmatched_packets_total",
        &[],
        "Packets that the back end has seen and no rule matched",
        Values::One(|it| Some(Number::Whole(it.sample.observed.status.totals.unmatched))),
    ),
    counter(
        "anyport_repairs_total",
        &[],
        "How often something in the kernel was put back that another program had removed; `anyportctl status` says what",
        Values::One(|it| Some(Number::Whole(it.sample.observed.status.mended.iter().map(|it| it.times).sum()))),
    ),
    counter(
        "anyport_server_starts_total",
        &[],
        "Processes that have begun to serve since the keeper was started: the first, and one for each restart, upgrade and crash",
        Values::One(|it| Some(Number::Whole(it.sample.servers.started))),
    ),
    counter(
        "anyport_server_crashes_total",
        &[],
        "Processes that served and ended by a failure",
        Values::One(|it| Some(Number::Whole(it.sample.servers.crashed))),
    ),
    gauge(
        "anyport_sample_age_seconds",
        &[],
        "How old the numbers of this scrape are; those of the process are read for each scrape",
        Values::One(|it| Some(Number::Real(it.sample.age().as_secs_f64()))),
    ),
    gauge(
        "anyport_sample_duration_seconds",
        &[],
        "How long it took to read them; they are read again after 20 times that, and 0.9 s at least",
        Values::One(|it| Some(Number::Real(it.sample.took.as_secs_f64()))),
    ),
    gauge(
        "anyport_service_info",
        &["service", "handler", "origin"],
        "1 for each service",
        Values::Some(|it| {
            let views = it.observed.services.iter().map(|it| &it.view);
            let labels = views.map(|it| vec![it.name.to_string(), it.handler.to_string(), it.origin.to_string()]);
            labels.map(|it| (it, Number::Whole(1))).collect()
        }),
    ),
    gauge(
        "anyport_service_rules",
        SERVICE,
        "Rules that steer to the service",
        Values::Service(|it| it.view.rules as u64),
    ),
    gauge("anyport_service_sockets", SERVICE, "Its sockets", Values::Service(|it| it.view.sockets.len() as u64)),
    counter(
        "anyport_service_steered_packets_total",
        SERVICE,
        "Packets that rules handed to a socket of the service: the first of each connection, and each datagram",
        Values::Service(|it| it.view.steered),
    ),
    counter(
        "anyport_service_dropped_packets_total",
        &["service", "reason"],
        "Packets of its rules that were dropped: `no_socket`, none was live; `assign_error`, the kernel would not assign it; `denied`, the service does not take the source",
        Values::ServiceBy(&[
            ("no_socket", |it| it.counters.no_socket),
            ("assign_error", |it| it.counters.assign_error),
            ("denied", |it| it.counters.denied),
        ]),
    ),
    gauge(
        "anyport_service_connections_active",
        SERVICE,
        "Connections that are open",
        Values::Service(|it| it.view.stats.active),
    ),
    counter(
        "anyport_service_connections_accepted_total",
        SERVICE,
        "Connections accepted, those that were then refused included",
        Values::Service(|it| it.view.stats.accepted),
    ),
    counter(
        "anyport_service_refused_total",
        &["service", "reason"],
        "Connections and flows of datagrams refused: over the limit of the daemon (`total`), of the `service`, of the `source`, or the source's `rate`; or of a source that the service does not take (`denied`, where the back end leaves that to it)",
        Values::ServiceBy(&[
            ("total", |it| it.view.stats.refused_total),
            ("service", |it| it.view.stats.refused_service),
            ("source", |it| it.view.stats.refused_source),
            ("rate", |it| it.view.stats.refused_rate),
            ("denied", |it| it.denied),
        ]),
    ),
    counter(
        "anyport_service_accept_errors_total",
        SERVICE,
        "Failed attempts to accept",
        Values::Service(|it| it.view.stats.accept_errors),
    ),
    counter(
        "anyport_service_bad_proxy_headers_total",
        SERVICE,
        "Connections closed since their peer had to send a PROXY header and did not",
        Values::Service(|it| it.view.stats.bad_headers),
    ),
    counter(
        "anyport_service_unforwarded_total",
        SERVICE,
        "Connections closed, and datagrams lost, since no upstream took them",
        Values::Service(|it| it.view.stats.unforwarded),
    ),
    counter(
        "anyport_service_received_bytes_total",
        SERVICE,
        "Bytes of clients, without headers; an open connection may lack up to 1 MiB",
        Values::Service(|it| it.view.stats.bytes_from_clients),
    ),
    counter(
        "anyport_service_sent_bytes_total",
        SERVICE,
        "Bytes for clients, likewise",
        Values::Service(|it| it.view.stats.bytes_to_clients),
    ),
    counter(
        "anyport_service_datagrams_total",
        SERVICE,
        "Datagrams received",
        Values::Service(|it| it.view.stats.datagrams),
    ),
    counter(
        "anyport_service_datagrams_answered_total",
        SERVICE,
        "Datagrams answered, or sent back to clients",
        Values::Service(|it| it.view.stats.answered),
    ),
    counter(
        "anyport_service_datagrams_unanswered_total",
        &["service", "reason"],
        "Datagrams not answered: the source is steered itself, or the hop limit is used up (`loop`), the source seems to be a service that answers answers (`conversation`), no client has asked an owner for so much lately (`unsolicited`), the answer is too large for the question (`size`), there is no usable source or destination (`unanswerable`), the kernel would not send (`unsent`), it came to a socket for answers (`strayed`)",
        Values::ServiceBy(&[
            ("loop", |it| it.view.stats.refused_loop),
            ("conversation", |it| it.view.stats.refused_conversation),
            ("unsolicited", |it| it.view.stats.refused_unsolicited),
            ("size", |it| it.view.stats.refused_size),
            ("unanswerable", |it| it.view.stats.unanswerable),
            ("unsent", |it| it.view.stats.unsent),
            ("strayed", |it| it.view.stats.strayed),
        ]),
    ),
    counter(
        "anyport_service_flows_total",
        SERVICE,
        "Flows of datagrams that were forwarded",
        Values::Service(|it| it.view.stats.flows),
    ),
    counter(
        "anyport_service_flows_evicted_total",
        SERVICE,
        "Flows that had to go for others",
        Values::Service(|it| it.view.stats.evicted),
    ),
    counter(
        "anyport_service_listen_drops_total",
        SERVICE,
        "Attempts to connect that the kernel dropped, mostly since the queue of those that wait was full, or since there was no route to the client (anyport_no_route_total)",
        Values::Service(|it| it.view.stats.listen_drops),
    ),
    counter(
        "anyport_service_receive_drops_total",
        SERVICE,
        "Datagrams that the kernel dropped since the buffer was full",
        Values::Service(|it| it.view.stats.receive_drops),
    ),
    histogram(
        "anyport_service_accept_wait_seconds",
        "From the end of the handshake to accepting, to the kernel's jiffy. By samples, each of which counts for all connections since the previous one: at most 200 a second for each listening socket, every connection where fewer come",
        Values::Times(|it| &it.waits),
    ),
    histogram(
        "anyport_service_connection_duration_seconds",
        "From accepting to closing, of connections that have ended",
        Values::Times(|it| &it.durations),
    ),
    gauge(
        "anyport_upstream_up",
        UPSTREAM,
        "Whether clients are connected to the upstream: it is neither down nor ejected; no value for one that is gone",
        // One that was taken out has nothing to be well for.
        Values::Upstream(|it| (it.state != UpstreamState::Gone).then(|| (it.state == UpstreamState::Up).into())),
    ),
    gauge(
        "anyport_upstream_connections_active",
        UPSTREAM,
        "Connections and flows that are open",
        Values::Upstream(|it| Some(it.active)),
    ),
    counter(
        "anyport_upstream_connections_total",
        UPSTREAM,
        "Connections and flows that came to be",
        Values::Upstream(|it| Some(it.connections)),
    ),
    counter(
        "anyport_upstream_failures_total",
        UPSTREAM,
        "Connections that did not",
        Values::Upstream(|it| Some(it.failures)),
    ),
    counter(
        "anyport_upstream_sent_bytes_total",
        UPSTREAM,
        "Bytes for the upstream",
        Values::Upstream(|it| Some(it.bytes_to)),
    ),
    counter(
        "anyport_upstream_received_bytes_total",
        UPSTREAM,
        "Bytes of the upstream",
        Values::Upstream(|it| Some(it.bytes_from)),
    ),
    gauge(
        "anyport_prefixes",
        &[],
        "Prefixes, counted once for each protocol and service",
        Values::One(|it| Some(it.sample.prefixes.into())),
    ),
    gauge(
        "anyport_prefixes_omitted",
        &[],
        "Of these, those that have no values below: there are values for the 100 with most packets",
        Values::One(|it| Some((it.sample.prefixes - it.sample.busiest.len()).into())),
    ),
    counter(
        "anyport_prefix_steered_packets_total",
        PREFIX,
        "Packets that rules of the prefix handed to a socket",
        Values::Prefix(|it| it.counts.steered),
    ),
    counter(
        "anyport_prefix_dropped_packets_total",
        PREFIX,
        "Packets of its rules that were dropped",
        Values::Prefix(|it| it.counts.dropped),
    ),
    counter("process_cpu_seconds_total", &[], "Time on CPUs", Values::One(|it| real(it, |it| it.process.cpu_seconds))),
    gauge(
        "process_start_time_seconds",
        &[],
        "When the process was started, since 1970",
        Values::One(|it| real(it, |it| it.process.start_seconds)),
    ),
    gauge(
        "process_resident_memory_bytes",
        &[],
        "Memory in use",
        Values::One(|it| real(it, |it| it.process.resident_bytes)),
    ),
    gauge(
        "process_virtual_memory_bytes",
        &[],
        "Memory mapped",
        Values::One(|it| real(it, |it| it.process.virtual_bytes)),
    ),
    gauge("process_threads", &[], "Threads", Values::One(|it| real(it, |it| it.process.threads))),
    gauge("process_open_fds", &[], "Files open", Values::One(|it| real(it, |it| it.process.open_files))),
    gauge("process_max_fds", &[], "How many files may be open", Values::One(|it| real(it, |it| it.process.max_files))),
];

fn real(source: &Source<'_>, number: impl Fn(&Source<'_>) -> Option<f64>) -> Option<Number> {
    number(source).map(Number::Real)
}
