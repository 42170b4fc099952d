//! The checks, one a file.

mod attached;
mod back_ends;
mod backlog;
mod bridge_netfilter;
mod conntrack;
mod daemon;
mod descriptors;
mod firewall;
mod held_port;
mod ipv6;
mod local_routes;
mod loopback;
mod modules;
mod netkit;
mod nonlocal_bind;
mod on_link;
mod policy_routing;
mod rp_filter;
mod sk_lookup_programs;
mod src_valid_mark;
mod tc_order;
mod time_wait;
mod tools;

#[cfg(test)]
mod tests;

use super::Check;

/// All of them. Where two would report the same fault, the more fundamental comes first.
pub(super) const ALL: &[Check] = &[
    Check { name: "daemon", look: daemon::look },
    Check { name: "back-ends", look: back_ends::look },
    Check { name: "modules", look: modules::look },
    Check { name: "attached", look: attached::look },
    Check { name: "loopback", look: loopback::look },
    Check { name: "ipv6", look: ipv6::look },
    Check { name: "local-routes", look: local_routes::look },
    Check { name: "on-link", look: on_link::look },
    Check { name: "policy-routing", look: policy_routing::look },
    Check { name: "rp-filter", look: rp_filter::look },
    Check { name: "src-valid-mark", look: src_valid_mark::look },
    Check { name: "bridge-netfilter", look: bridge_netfilter::look },
    Check { name: "firewall", look: firewall::look },
    Check { name: "held-port", look: held_port::look },
    Check { name: "sk-lookup-programs", look: sk_lookup_programs::look },
    Check { name: "tc-order", look: tc_order::look },
    Check { name: "netkit", look: netkit::look },
    Check { name: "conntrack", look: conntrack::look },
    Check { name: "nonlocal-bind", look: nonlocal_bind::look },
    Check { name: "backlog", look: backlog::look },
    Check { name: "descriptors", look: descriptors::look },
    Check { name: "time-wait", look: time_wait::look },
    Check { name: "tools", look: tools::look },
];
