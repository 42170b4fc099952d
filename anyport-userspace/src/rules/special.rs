//! Addresses that are not single hosts', or that something else depends on.

use super::{InvalidText, Prefix};

/// What a range of addresses is.
struct Range {
    is_ipv4: bool,
    /// Its first address, and its length.
    first: u128,
    len: u8,
    what: &'static str,
}

const fn ipv4(first: u32, len: u8, what: &'static str) -> Range {
    Range { is_ipv4: true, first: first as u128, len, what }
}

const fn ipv6(first: u16, len: u8, what: &'static str) -> Range {
    Range { is_ipv4: false, first: (first as u128) << 112, len, what }
}

/// What no rule can steer. Linux hands multicast and broadcast to those who have joined or asked for it (`ip_route_input_slow`,
/// net/ipv4/route.c), and drops what comes from outside to `0.0.0.0/8` as martian; a local route to them would only take from the host
/// what it sends there.
const NEVER: [Range; 5] = [
    ipv4(0, 8, "0.0.0.0/8 stands for this host or network, and Linux drops packets for it as martian"),
    ipv4(0xe000_0000, 4, "224.0.0.0/4 are multicast groups, and no hosts"),
    ipv4(0xffff_ffff, 32, "255.255.255.255 is the broadcast address"),
    ipv6(0, 128, ":: stands for no address"),
    ipv6(0xff00, 8, "ff00::/8 are multicast groups, and no hosts"),
];

/// What the host itself depends on.
const NEEDED: [Range; 2] = [
    ipv4(
        0xa9fe_0000,
        16,
        "169.254.0.0/16 are link-local addresses, and clouds have their metadata services there (169.254.169.254)",
    ),
    ipv6(0xfe80, 10, "fe80::/10 are link-local addresses, by which IPv6 finds neighbours and routers"),
];

impl Range {
    fn prefix(&self) -> Prefix {
        Prefix::from_bits(self.is_ipv4, self.first, self.len)
    }
}

/// Checks that packets can come for the addresses of a prefix.
///
/// # Errors
/// None ever comes for any of them.
pub(super) fn expect_steerable(prefix: &Prefix) -> Result<(), InvalidText> {
    match NEVER.iter().find(|range| prefix.is_within(&range.prefix())) {
        None => Ok(()),
        Some(Range { what, .. }) => Err(InvalidText(format!("{prefix} can't be steered: {what}"))),
    }
}

/// What steering a prefix would break on this host, whatever its addresses are: a line each.
pub fn broken(prefix: &Prefix, has_route: bool) -> Vec<String> {
    // Of a prefix around them the rest may be steered, and a route to everything is refused for more than that.
    let takes = |range: &&Range| has_route && !prefix.is_everything() && range.prefix().is_within(prefix);
    let needed = NEEDED.iter().filter(|range| prefix.is_within(&range.prefix()) || takes(range));
    let mut lines: Vec<String> =
        needed.map(|Range { what, .. }| format!("{prefix} concerns addresses that the host needs: {what}")).collect();
    let taken = NEVER.iter().filter(takes);
    lines.extend(taken.map(|Range { what, .. }| {
        format!("the local route to {prefix} would take from the host what it sends there: {what}")
    }));
    lines
}

#[cfg(test)]
mod tests {
    use super::{broken, expect_steerable};
    use crate::rules::Prefix;

    fn prefix(text: &str) -> Prefix {
        text.parse().unwrap()
    }

    #[test]
    fn what_is_no_host_is_not_steered() {
        for (text, what) in [
            ("224.0.0.0/4", "multicast"),
            ("239.1.2.3", "multicast"),
            ("255.255.255.255/32", "broadcast"),
            ("0.0.0.0/8", "this host"),
            ("0.0.0.0", "this host"),
            ("ff00::/8", "multicast"),
            ("ff02::1", "multicast"),
            ("::", "no address"),
        ] {
            let error = expect_steerable(&prefix(text)).unwrap_err().to_string();
            assert!(error.contains(what), "{text}: {error}");
        }
        for text in
            ["0.0.0.0/0", "192.0.0.0/2", "240.0.0.0/4", "223.255.255.255", "1.0.0.0/8", "::/0", "::1", "fe00::/8"]
        {
            expect_steerable(&prefix(text)).unwrap();
        }
    }

    #[test]
    fn what_the_host_needs_is_named() {
        for (text, has_route, lines) in [
            ("169.254.0.0/16", false, 1),
            ("169.254.169.254", true, 1),
            ("fe80::/64", true, 1),
            ("0.0.0.0/0", true, 0),
            ("128.0.0.0/1", true, 3),
            ("128.0.0.0/1", false, 0),
            ("fe00::/7", true, 2),
            ("192.0.2.0/24", true, 0),
            ("2001:db8::/32", true, 0),
        ] {
            assert_eq!(broken(&prefix(text), has_route).len(), lines, "{text}: {:?}", broken(&prefix(text), has_route));
        }
    }
}
