//! IPv4 and IPv6 prefixes, their order, and addresses as the lookup table has them.

use std::{
    cmp::{Ordering, Reverse},
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    str::FromStr,
};

use anyport_common::flow::{Address, Version};

use super::InvalidText;
use crate::as_text::as_text;

/// An IPv4 or IPv6 block without host bits. IPv4-mapped IPv6 addresses are refused: they never stand in a packet.
///
/// Sorted as rules are: IPv4 first, longer prefixes first, then by address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Prefix {
    first: Address,
    len: u8,
}

#[expect(clippy::len_without_is_empty, reason = "the length is that of the mask; no prefix is empty")]
impl Prefix {
    /// The prefix of a single address.
    pub fn host(address: IpAddr) -> Self {
        Self { first: to_address(address), len: if address.is_ipv4() { 32 } else { 128 } }
    }

    /// The prefix that begins with this address as a number. Bits behind the length are cleared.
    pub fn from_bits(is_ipv4: bool, first: u128, len: u8) -> Self {
        let bits = if is_ipv4 { 32 } else { 128 };
        let len = len.min(bits);
        let first = first.checked_shr(u32::from(bits - len)).map_or(0, |it| it << (bits - len));
        Self { first: if is_ipv4 { Address::v4(low_half(first)) } else { v6(first) }, len }
    }

    /// The first address.
    pub fn address(&self) -> IpAddr {
        from_address(self.first)
    }

    /// The first address as the lookup table takes it.
    pub fn first(&self) -> Address {
        self.first
    }

    /// The prefix length in bits.
    pub fn len(&self) -> u8 {
        self.len
    }

    /// Whether this is the whole address space of its family.
    pub fn is_everything(&self) -> bool {
        self.len == 0
    }

    /// Whether this is an IPv4 prefix.
    pub fn is_ipv4(&self) -> bool {
        self.first.version == Version::V4
    }

    /// Whether the address lies inside; never across families.
    pub fn contains(&self, address: IpAddr) -> bool {
        Self::host(address).is_within(self)
    }

    /// Whether all of this lies inside the other; never across families.
    pub fn is_within(&self, outer: &Self) -> bool {
        self.len >= outer.len && self.truncated(outer.len) == *outer && self.is_ipv4() == outer.is_ipv4()
    }

    /// The block of this length around the first address.
    #[must_use]
    pub fn truncated(&self, len: u8) -> Self {
        Self::from_bits(self.is_ipv4(), self.bounds().0, len)
    }

    /// The first and the last address as numbers.
    pub fn bounds(&self) -> (u128, u128) {
        let first = u128::from(self.first.high) << 64 | u128::from(self.first.low);
        let (first, bits) = if self.is_ipv4() { (first >> 96, 32) } else { (first, 128) };
        let hosts = 1_u128.checked_shl(u32::from(bits - self.len)).map_or(u128::MAX, |size| size - 1);
        (first, first | hosts)
    }
}

impl Ord for Prefix {
    fn cmp(&self, other: &Self) -> Ordering {
        let key = |it: &Self| (!it.is_ipv4(), Reverse(it.len), it.first.high, it.first.low);
        key(self).cmp(&key(other))
    }
}

impl PartialOrd for Prefix {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

/// An address as the lookup table takes it.
pub fn to_address(address: IpAddr) -> Address {
    match address {
        IpAddr::V4(address) => Address::v4(address.to_bits()),
        IpAddr::V6(address) => v6(address.to_bits()),
    }
}

/// An address of the lookup table in the usual notation.
pub fn from_address(address: Address) -> IpAddr {
    let bits = u128::from(address.high) << 64 | u128::from(address.low);
    match address.version {
        Version::V4 => IpAddr::V4(Ipv4Addr::from_bits(low_half(bits >> 96))),
        Version::V6 => IpAddr::V6(Ipv6Addr::from_bits(bits)),
    }
}

#[expect(clippy::cast_possible_truncation, reason = "halves are what is asked for")]
fn v6(bits: u128) -> Address {
    Address::v6((bits >> 64) as u64, bits as u64)
}

#[expect(clippy::cast_possible_truncation, reason = "IPv4 addresses have 32 bits")]
fn low_half(bits: u128) -> u32 {
    bits as u32
}

impl fmt::Display for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address(), self.len)
    }
}

impl FromStr for Prefix {
    type Err = InvalidText;

    fn from_str(text: &str) -> Result<Self, InvalidText> {
        let invalid = |why: String| InvalidText(format!("prefix {text:?}: {why}"));
        let (address, length) = match text.split_once('/') {
            Some((address, length)) => (address, Some(length)),
            None => (text, None),
        };
        let address: IpAddr = address.parse().map_err(|_| {
            invalid("not an IP address; write ADDRESS/LENGTH, such as 192.0.2.0/24 or 2001:db8::/32".into())
        })?;
        let bits = if address.is_ipv4() { 32 } else { 128 };
        let length = match length {
            None => bits,
            Some(length) => match length.parse() {
                Ok(number) if number <= bits && length.bytes().all(|b| b.is_ascii_digit()) => number,
                _ => {
                    return Err(invalid(format!("the length {length:?} is not a number from 0 to {bits}")));
                }
            },
        };
        if let IpAddr::V6(address) = address
            && let Some(mapped) = address.to_ipv4_mapped()
            && length >= 96
        {
            return Err(invalid(format!(
                "IPv4-mapped addresses never stand in a packet; write {mapped}/{}",
                length - 96
            )));
        }
        let host = Self::host(address);
        let prefix = host.truncated(length);
        if prefix.first != host.first {
            return Err(invalid(format!("has bits set behind its length; did you mean {prefix} or {host}?")));
        }
        Ok(prefix)
    }
}

as_text!(Prefix, such as "192.0.2.0/24");

#[cfg(test)]
mod tests {
    use super::Prefix;

    #[test]
    fn reads_what_people_write() {
        for (text, shown) in [
            ("192.0.2.0/24", "192.0.2.0/24"),
            ("192.0.2.7", "192.0.2.7/32"),
            ("0.0.0.0/0", "0.0.0.0/0"),
            ("2001:DB8::/32", "2001:db8::/32"),
            ("2001:db8::1", "2001:db8::1/128"),
            ("::/0", "::/0"),
        ] {
            assert_eq!(text.parse::<Prefix>().unwrap().to_string(), shown);
        }
    }

    #[test]
    fn refuses_and_says_why() {
        for (text, why) in [
            ("", "not an IP address"),
            ("127.1", "not an IP address"),
            ("192.0.2.0/", "length \"\""),
            ("192.0.2.0/33", "0 to 32"),
            ("192.0.2.0/+8", "length \"+8\""),
            ("192.0.2.0/24/24", "length \"24/24\""),
            ("192.0.2.7/24", "did you mean 192.0.2.0/24 or 192.0.2.7/32?"),
            ("2001:db8::1/64", "did you mean 2001:db8::/64"),
            ("::ffff:192.0.2.7", "write 192.0.2.7/32"),
            ("fe80::1%eth0", "not an IP address"),
            (" 192.0.2.0/24", "not an IP address"),
        ] {
            let error = text.parse::<Prefix>().unwrap_err().to_string();
            assert!(error.contains(why), "{text:?}: {error}");
        }
    }
}
