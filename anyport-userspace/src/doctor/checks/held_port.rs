//! What keeps a server of the host from a port of the wildcard address.

use crate::{
    doctor::{Finding, Host, host::known},
    text::list_of,
};

pub(super) fn look(host: &Host) -> anyhow::Result<Vec<Finding>> {
    let findings = known(&host.held)?.iter().map(|held| {
        let owners: Vec<&String> = held.owners.iter().collect();
        let owners = if owners.is_empty() { String::new() } else { format!("; they belong to {}", list_of(&owners)) };
        let why = "The kernel lets no socket have a port of the wildcard address while another one has the same port of any \
                   address, unless both set SO_REUSEADDR, as all sockets of anyport do. Else it says \"Address already in use\".";
        Finding::warning(format!("{}{owners}", held.text), why)
            .by_hand("have the server set SO_REUSEADDR, or use an address of its own instead of the wildcard address")
            .by_hand(format!("or keep the port with --except {} in the rules, and wait for the end of what is there", held.port))
    });
    Ok(findings.collect())
}
