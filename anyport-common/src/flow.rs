//! What a packet is judged by.

/// An IP version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Version {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

/// An IPv4 or IPv6 address as a number in host byte order; IPv4 takes the first 32 bits, so that prefixes of both
/// versions are ranges of the same kind.
///
/// Two halves, since the BPF target has no 128-bit arithmetic. And not an enum of both versions: where the compiler
/// merges the branches of one it moves registers that only the other has written, which the verifier refuses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Address {
    /// The version.
    pub version: Version,
    /// The first 64 bits.
    pub high: u64,
    /// The last 64 bits; 0 for IPv4.
    pub low: u64,
}

impl Address {
    /// An IPv4 address.
    #[inline(always)]
    pub const fn v4(address: u32) -> Self {
        Self { version: Version::V4, high: (address as u64) << 32, low: 0 }
    }

    /// An IPv6 address.
    #[inline(always)]
    pub const fn v6(high: u64, low: u64) -> Self {
        Self { version: Version::V6, high, low }
    }
}

/// A transport protocol that anyport steers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Transport {
    /// TCP, protocol number 6.
    Tcp,
    /// UDP, protocol number 17.
    Udp,
}

impl Transport {
    /// Both transports, in the order in which tables hold them.
    pub const ALL: [Self; 2] = [Self::Tcp, Self::Udp];

    /// The IP protocol number.
    #[inline(always)]
    pub const fn number(self) -> u8 {
        match self {
            Self::Tcp => 6,
            Self::Udp => 17,
        }
    }

    /// The transport with this IP protocol number, if anyport steers it.
    #[inline(always)]
    pub const fn from_number(number: u8) -> Option<Self> {
        match number {
            6 => Some(Self::Tcp),
            17 => Some(Self::Udp),
            _ => None,
        }
    }
}

/// The original destination of a packet, and its source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Flow {
    /// The client's address, of the same version.
    pub source: Address,
    /// The destination address.
    pub address: Address,
    /// The transport protocol.
    pub transport: Transport,
    /// The destination port in host byte order.
    pub port: u16,
}

impl Flow {
    /// Which of a service's four sockets serves this flow, as an offset into its block of
    /// [`crate::maps::SOCKETS_PER_SERVICE`] entries: TCP and UDP over IPv4, then TCP and UDP over IPv6.
    #[inline(always)]
    pub const fn socket_offset(&self) -> u32 {
        let family = match self.address.version {
            Version::V4 => 0,
            Version::V6 => 2,
        };
        let transport = match self.transport {
            Transport::Tcp => 0,
            Transport::Udp => 1,
        };
        family + transport
    }
}
