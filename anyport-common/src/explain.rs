//! What the program that explains is asked, and what it answers: both stand in the packet that it is run on, behind an Ethernet
//! header of zeros. So one question does not meet another, nor any real packet.

use bytemuck::{Pod, Zeroable};

use crate::flow::{Address, Flow, Transport, Version};

/// Where the question begins in the packet: behind the header.
pub const QUESTION_AT: usize = 14;
/// Where the answer begins.
pub const ANSWER_AT: usize = QUESTION_AT + size_of::<Question>();
/// How long the packet is.
pub const PACKET_BYTES: usize = ANSWER_AT + size_of::<Answer>();

/// A [`Flow`], as it stands in the packet.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct Question {
    source: [u64; 2],
    address: [u64; 2],
    port: u16,
    /// IP protocol number.
    protocol: u8,
    /// 4 or 6.
    ip_version: u8,
    reserved: u32,
}

impl Question {
    /// Asks about a flow.
    pub const fn new(flow: &Flow) -> Self {
        let Flow { source, address, transport, port } = flow;
        let ip_version = match address.version {
            Version::V4 => 4,
            Version::V6 => 6,
        };
        Self {
            source: [source.high, source.low],
            address: [address.high, address.low],
            port: *port,
            protocol: transport.number(),
            ip_version,
            reserved: 0,
        }
    }

    /// The flow that is asked about; nothing if that is none that anyport steers.
    #[inline(always)]
    pub const fn flow(&self) -> Option<Flow> {
        let version = match self.ip_version {
            4 => Version::V4,
            6 => Version::V6,
            _ => return None,
        };
        let Some(transport) = Transport::from_number(self.protocol) else { return None };
        let [high, low] = self.source;
        let source = Address { version, high, low };
        let [high, low] = self.address;
        Some(Flow { source, address: Address { version, high, low }, transport, port: self.port })
    }
}

/// What the rules decide, and what is there of it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Answer {
    /// The generation that judged.
    pub generation: u64,
    /// One of the constants below.
    pub outcome: u32,
    /// The deciding rule's number.
    pub rule: u32,
    /// The service's slot.
    pub service: u32,
    /// Nothing.
    pub reserved: u32,
}

/// In [`Answer`]: nothing was written.
pub const NOTHING: u32 = 0;
/// In [`Answer`]: no rule matches.
pub const UNMATCHED: u32 = 1;
/// In [`Answer`]: the rule leaves it to the host.
pub const HOST: u32 = 2;
/// In [`Answer`]: the rule steers to the service, which has a socket for this.
pub const STEER: u32 = 3;
/// In [`Answer`]: the rule steers to the service, which has no socket for this.
pub const NO_SOCKET: u32 = 4;
/// In [`Answer`]: the rule steers to the service, whose socket has been connected to a peer since it was put into the map.
pub const CONNECTED: u32 = 5;
/// In [`Answer`]: the rule steers to a service that does not take the source.
pub const DENIED: u32 = 6;

#[cfg(test)]
mod tests {
    use super::{Address, Flow, Question, Transport};

    #[test]
    fn a_question_says_the_flow() {
        let v4 = [Address::v4(0xc633_6401), Address::v4(0xc000_0207)];
        let v6 = [Address::v6(0x2001_0db8_0000_0009, 1), Address::v6(0x2001_0db8_0000_0000, u64::MAX)];
        for [source, address] in [v4, v6] {
            for transport in Transport::ALL {
                for port in [1, 443, u16::MAX] {
                    let flow = Flow { source, address, transport, port };
                    assert_eq!(Question::new(&flow).flow(), Some(flow));
                }
            }
        }
        let flow = Flow { source: v4[0], address: v4[1], transport: Transport::Tcp, port: 1 };
        assert_eq!(Question { protocol: 1, ..Question::new(&flow) }.flow(), None);
        assert_eq!(Question { ip_version: 0, ..Question::new(&flow) }.flow(), None);
    }
}
