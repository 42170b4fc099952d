//! Why the kernel did not answer, by the counters of the thread's network namespace: those of a socket don't tell.

use std::fs;

use anyhow::Context as _;

/// What got no answer since the namespace came to be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Unanswered {
    /// Attempts to connect that found a queue full.
    pub queue_full: u64,
    /// Packets of this host to which there was no route.
    pub no_route: u64,
}

impl Unanswered {
    /// As it is now.
    ///
    /// # Errors
    /// The kernel does not tell.
    pub fn now() -> anyhow::Result<Self> {
        let read = |file: &str| {
            let path = format!("/proc/thread-self/net/{file}");
            fs::read_to_string(&path).with_context(|| format!("read {path}"))
        };
        let (netstat, snmp) = (read("netstat")?, read("snmp")?);
        // A kernel without IPv6 has no such file.
        let snmp6 = read("snmp6").unwrap_or_default();
        let v6 = snmp6.lines().filter_map(|line| line.strip_prefix("Ip6OutNoRoutes")?.trim().parse::<u64>().ok());
        Ok(Self {
            queue_full: of_table(&netstat, "TcpExt", "ListenOverflows")
                + of_table(&netstat, "TcpExt", "TCPReqQFullDrop"),
            no_route: of_table(&snmp, "Ip", "OutNoRoutes") + v6.sum::<u64>(),
        })
    }

    /// What has come since.
    #[must_use]
    pub fn since(self, before: Self) -> Self {
        Self {
            queue_full: self.queue_full.saturating_sub(before.queue_full),
            no_route: self.no_route.saturating_sub(before.no_route),
        }
    }
}

/// A counter of a file that has a line of names and one of values for each group; 0 where the kernel has none.
pub(crate) fn of_table(text: &str, group: &str, name: &str) -> u64 {
    let mut lines = text.lines().filter_map(|line| line.strip_prefix(group)?.strip_prefix(':'));
    let (names, values) = (lines.next().unwrap_or_default(), lines.next().unwrap_or_default());
    let place = names.split_ascii_whitespace().position(|it| it == name);
    let value = place.and_then(|place| values.split_ascii_whitespace().nth(place));
    value.and_then(|it| it.parse().ok()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::{Unanswered, of_table};

    #[test]
    fn counters_are_found_by_name() {
        let text = "Ip: Forwarding OutNoRoutes\nIp: 1 7\nIpExt: OutNoRoutes\nIpExt: 9\n";
        assert_eq!([of_table(text, "Ip", "OutNoRoutes"), of_table(text, "Ip", "Else")], [7, 0]);
        let now = Unanswered::now().unwrap();
        assert_eq!(now.since(now), Unanswered::default());
    }
}
