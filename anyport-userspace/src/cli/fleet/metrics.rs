//! `anyportctl fleet status --metrics`: the operator's view of the fleet, for a monitoring system.

use std::fmt::Write as _;

use super::nodes::RingView;

/// All metrics, in the text format of Prometheus.
pub(super) fn text(rings: &[RingView]) -> String {
    let mut text = String::new();
    family(
        &mut text,
        "anyport_fleet_ring_sequence",
        "Sequence of the ring's pointer; 0 where there is none",
        rings,
        |it| vec![(String::new(), it.pointer.as_ref().map_or(0, |pointer| pointer.sequence))],
    );
    family(&mut text, "anyport_fleet_ring_readable", "Whether the ring's pointer can be read", rings, |it| {
        vec![(String::new(), u64::from(it.error.is_none()))]
    });
    family(&mut text, "anyport_fleet_ring_nodes", "Nodes of the ring by what they make of its pointer", rings, |it| {
        let it = it.summary;
        let states = [
            ("current", it.current),
            ("behind", it.behind),
            ("refused", it.refused),
            ("ahead", it.ahead),
            ("missing", it.missing),
        ];
        states.map(|(state, count)| (format!(",state=\"{state}\""), count as u64)).into()
    });
    family(&mut text, "anyport_fleet_ring_degraded_nodes", "Nodes of the ring that are degraded", rings, |it| {
        vec![(String::new(), it.summary.degraded as u64)]
    });
    family(
        &mut text,
        "anyport_fleet_ring_skipped_records",
        "Records of the ring that could not be read or are not by the node at whose place they stand",
        rings,
        |it| vec![(String::new(), it.skipped.len() as u64)],
    );
    text.trim_end().to_owned()
}

/// A gauge with a value for each ring, or several that further labels distinguish. Names of rings need no escaping.
fn family(
    text: &mut String,
    name: &str,
    help: &str,
    rings: &[RingView],
    values: impl Fn(&RingView) -> Vec<(String, u64)>,
) {
    // Writing to a string does not fail.
    write!(text, "# HELP {name} {help}\n# TYPE {name} gauge\n").ok();
    for ring in rings {
        for (labels, value) in values(ring) {
            writeln!(text, "{name}{{ring=\"{}\"{labels}}} {value}", ring.ring).ok();
        }
    }
}
