//! The few words with netfilter for which there is no command, or none that is quick: is a table there, and away with it if
//! it is empty; has anything changed; how much is in a set.

use nix::{
    errno::Errno,
    libc,
    sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket},
};
use std::os::fd::AsRawFd as _;

const REQUEST: i32 = libc::NLM_F_REQUEST | libc::NLM_F_ACK;
/// Deleting fails with EBUSY where something is inside.
const NON_RECURSIVE: i32 = 0x100;

const TABLE_NAME: u16 = 1;
const RULE_TABLE: u16 = 1;
const RULE_CHAIN: u16 = 2;
const CHAIN_TABLE: u16 = 1;
const CHAIN_NAME: u16 = 3;

/// A table of `nf_tables`, as iptables uses them.
#[derive(Clone, Copy, Debug)]
pub(super) struct NfTable {
    /// The netfilter family, which for IP is the address family.
    pub(super) family: i32,
    pub(super) name: &'static str,
}

impl NfTable {
    pub(super) fn exists(self) -> nix::Result<bool> {
        existence(&self.message(libc::NFT_MSG_GETTABLE, REQUEST))
    }

    pub(super) fn has_chain(self, chain: &str) -> nix::Result<bool> {
        existence(&self.chain_message(libc::NFT_MSG_GETCHAIN, REQUEST, chain))
    }

    /// Deletes a chain with its rules, then other chains and, on request, the table, which must be empty by then. All
    /// or nothing: says whether it was done, and not that something is still in use.
    pub(super) fn delete(self, chain: &str, empty_chains: &[&str], with_table: bool) -> nix::Result<bool> {
        let rules = libc::NFNL_SUBSYS_NFTABLES << 8 | libc::NFT_MSG_DELRULE;
        let mut messages =
            vec![message(rules, REQUEST, self.family, 0, &[(RULE_TABLE, self.name), (RULE_CHAIN, chain)])];
        let chains = [chain].into_iter().chain(empty_chains.iter().copied());
        messages.extend(chains.map(|chain| self.chain_message(libc::NFT_MSG_DELCHAIN, REQUEST | NON_RECURSIVE, chain)));
        if with_table {
            messages.push(self.message(libc::NFT_MSG_DELTABLE, REQUEST | NON_RECURSIVE));
        }
        match batch(&messages) {
            Ok(()) => Ok(true),
            Err(Errno::EBUSY) => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn message(self, kind: i32, flags: i32) -> Vec<u8> {
        let kind = libc::NFNL_SUBSYS_NFTABLES << 8 | kind;
        message(kind, flags, self.family, 0, &[(TABLE_NAME, self.name)])
    }

    fn chain_message(self, kind: i32, flags: i32, chain: &str) -> Vec<u8> {
        let kind = libc::NFNL_SUBSYS_NFTABLES << 8 | kind;
        let names = [(CHAIN_TABLE, self.name), (CHAIN_NAME, chain)];
        message(kind, flags, self.family, 0, &names)
    }
}

/// A number that grows with each change of any rule of this network namespace.
pub(super) fn generation() -> nix::Result<u32> {
    const GENERATION_ID: u16 = 1;
    let kind = libc::NFNL_SUBSYS_NFTABLES << 8 | libc::NFT_MSG_GETGEN;
    let mut generation = None;
    talk(&message(kind, libc::NLM_F_REQUEST, 0, 0, &[]), |body| {
        generation = generation.or(find(body, GENERATION_ID).and_then(number));
    })?;
    generation.ok_or(Errno::ENODATA)
}

/// How many elements a set of `ipset` has; nothing if there is no such set.
///
/// The numbers are those of `linux/netfilter/ipset/ip_set.h`.
pub(super) fn set_len(name: &str) -> nix::Result<Option<u32>> {
    const SUBSYSTEM: i32 = 6;
    const LIST: i32 = 7;
    const PROTOCOL: u16 = 1;
    const PROTOCOL_VERSION: u8 = 6;
    const SET_NAME: u16 = 2;
    const FLAGS: u16 = 6;
    const LIST_HEADER: u32 = 1 << 2;
    const DATA: u16 = 7;
    const ELEMENTS: u16 = 24;
    const BIG_ENDIAN: u16 = 1 << 14;
    let mut query = message(SUBSYSTEM << 8 | LIST, libc::NLM_F_REQUEST | libc::NLM_F_DUMP, libc::AF_INET, 0, &[]);
    put(&mut query, PROTOCOL, &[PROTOCOL_VERSION]);
    put(&mut query, SET_NAME, &[name.as_bytes(), &[0]].concat());
    put(&mut query, FLAGS | BIG_ENDIAN, &LIST_HEADER.to_be_bytes());
    set_length(&mut query);
    let mut len = None;
    let talked =
        talk(&query, |body| len = len.or(find(body, DATA).and_then(|data| find(data, ELEMENTS)).and_then(number)));
    match talked {
        Ok(()) => Ok(len),
        Err(Errno::ENOENT) => Ok(None),
        Err(error) => Err(error),
    }
}

fn existence(query: &[u8]) -> nix::Result<bool> {
    match talk(query, |_| ()) {
        Ok(()) => Ok(true),
        Err(Errno::ENOENT) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Has the messages take effect together or not at all.
fn batch(messages: &[Vec<u8>]) -> nix::Result<()> {
    let edge = |kind| message(kind, libc::NLM_F_REQUEST, 0, libc::NFNL_SUBSYS_NFTABLES, &[]);
    let mut bytes = edge(libc::NFNL_MSG_BATCH_BEGIN);
    bytes.extend(messages.concat());
    bytes.extend(edge(libc::NFNL_MSG_BATCH_END));
    talk(&bytes, |_| ())
}

/// `struct nlmsghdr`, `struct nfgenmsg` and text attributes.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "the constants and lengths are small, whatever type libc gives them"
)]
fn message(kind: i32, flags: i32, family: i32, resource: i32, texts: &[(u16, &str)]) -> Vec<u8> {
    let mut bytes = vec![0; 4];
    bytes.extend((kind as u16).to_ne_bytes());
    bytes.extend((flags as u16).to_ne_bytes());
    bytes.extend([0; 8]);
    bytes.extend([family as u8, 0]);
    bytes.extend((resource as u16).to_be_bytes());
    for (attribute, text) in texts {
        put(&mut bytes, *attribute, &[text.as_bytes(), &[0]].concat());
    }
    set_length(&mut bytes);
    bytes
}

/// Appends an attribute.
#[expect(clippy::cast_possible_truncation, reason = "attributes are short")]
fn put(bytes: &mut Vec<u8>, attribute: u16, content: &[u8]) {
    bytes.extend((content.len() as u16 + 4).to_ne_bytes());
    bytes.extend(attribute.to_ne_bytes());
    bytes.extend(content);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
}

/// Writes the length of a message into its header.
#[expect(clippy::cast_possible_truncation, reason = "messages are short")]
fn set_length(message: &mut [u8]) {
    let length = (message.len() as u32).to_ne_bytes();
    message[..4].copy_from_slice(&length);
}

/// The content of the first attribute of this kind.
fn find(mut attributes: &[u8], wanted: u16) -> Option<&[u8]> {
    /// The upper bits say that it is nested, or big-endian.
    const KIND: u16 = 0x3fff;
    while let Some(([a, b, c, d], _)) = attributes.split_first_chunk::<4>() {
        let length = usize::from(u16::from_ne_bytes([*a, *b])).max(4);
        if u16::from_ne_bytes([*c, *d]) & KIND == wanted {
            return attributes.get(4..length);
        }
        attributes = attributes.get(length.next_multiple_of(4)..)?;
    }
    None
}

/// As netfilter writes numbers.
fn number(content: &[u8]) -> Option<u32> {
    content.try_into().ok().map(u32::from_be_bytes)
}

/// Sends the bytes, hands over the attributes of the kernel's answers, and gives the first error among them.
fn talk(bytes: &[u8], mut heard: impl FnMut(&[u8])) -> nix::Result<()> {
    let socket = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkNetFilter)?;
    send(socket.as_raw_fd(), bytes, MsgFlags::empty())?;
    let mut buffer = [0; 8192];
    loop {
        // The kernel has answered before `send` returns, or does so in `recv`.
        let length = match recv(socket.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT) {
            Ok(length) => length,
            Err(Errno::EAGAIN) => return Ok(()),
            Err(error) => return Err(error),
        };
        read(&buffer[..length], &mut heard)?;
    }
}

fn read(mut messages: &[u8], heard: &mut impl FnMut(&[u8])) -> nix::Result<()> {
    /// `struct nlmsghdr` and `struct nfgenmsg`
    const HEADERS: usize = 20;
    while let Some((header, rest)) = messages.split_first_chunk::<16>() {
        let [a, b, c, d, kind_low, kind_high, ..] = *header;
        let length = u32::from_ne_bytes([a, b, c, d]) as usize;
        let kind = i32::from(u16::from_ne_bytes([kind_low, kind_high]));
        if [libc::NLMSG_ERROR, libc::NLMSG_DONE].contains(&kind) {
            let code = rest.first_chunk().copied().map_or(0, i32::from_ne_bytes);
            if code != 0 {
                return Err(Errno::from_raw(-code));
            }
        } else if let Some(attributes) = messages.get(HEADERS..length) {
            heard(attributes);
        }
        let Some(next) = messages.get(length.max(16).next_multiple_of(4)..) else { return Ok(()) };
        messages = next;
    }
    Ok(())
}
