use std::{fmt, net::IpAddr, str::FromStr};

use ipnet::IpNet;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};

use super::InvalidText;

/// An IPv4 or IPv6 block without host bits. IPv4-mapped IPv6 addresses are refused: they never stand in a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Prefix(IpNet);

#[expect(clippy::len_without_is_empty, reason = "the length is that of the mask; no prefix is empty")]
impl Prefix {
    /// The prefix of a single address.
    pub fn host(address: IpAddr) -> Self {
        Self(IpNet::from(address))
    }

    /// The first address.
    pub fn address(&self) -> IpAddr {
        self.0.network()
    }

    /// The prefix length in bits.
    pub fn len(&self) -> u8 {
        self.0.prefix_len()
    }

    /// Whether this is the whole address space of its family.
    pub fn is_everything(&self) -> bool {
        self.0.prefix_len() == 0
    }

    /// Whether this is an IPv4 prefix.
    pub fn is_ipv4(&self) -> bool {
        self.0.addr().is_ipv4()
    }

    /// Whether the address lies inside; never across families.
    pub fn contains(&self, address: IpAddr) -> bool {
        self.0.contains(&address)
    }

    /// The first and the last address as numbers.
    pub fn bounds(&self) -> (u128, u128) {
        match self.0 {
            IpNet::V4(net) => (u128::from(net.network().to_bits()), u128::from(net.broadcast().to_bits())),
            IpNet::V6(net) => (net.network().to_bits(), net.broadcast().to_bits()),
        }
    }
}

impl fmt::Display for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
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
        let net = IpNet::new(address, length).map_err(|error| invalid(error.to_string()))?;
        if net.trunc() != net {
            return Err(invalid(format!(
                "has bits set behind its length; did you mean {} or {}?",
                net.trunc(),
                IpNet::from(address)
            )));
        }
        Ok(Self(net))
    }
}

impl Serialize for Prefix {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Prefix {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(D::Error::custom)
    }
}

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
