//! The few words with `nf_tables` that iptables has no command for: is a table there, and away with it if it is empty.

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
pub(super) struct Table {
    /// The netfilter family, which for IP is the address family.
    pub(super) family: i32,
    pub(super) name: &'static str,
}

impl Table {
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

fn existence(query: &[u8]) -> nix::Result<bool> {
    match talk(query) {
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
    talk(&bytes)
}

/// `struct nlmsghdr`, `struct nfgenmsg` and text attributes.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "the constants and lengths are small, whatever type libc gives them"
)]
fn message(kind: i32, flags: i32, family: i32, resource: i32, texts: &[(u16, &str)]) -> Vec<u8> {
    let mut body = vec![family as u8, 0];
    body.extend((resource as u16).to_be_bytes());
    for (attribute, text) in texts {
        // Header and the text with its final zero.
        body.extend((text.len() as u16 + 5).to_ne_bytes());
        body.extend(attribute.to_ne_bytes());
        body.extend(text.as_bytes());
        body.push(0);
        body.resize(body.len().next_multiple_of(4), 0);
    }
    let mut bytes = Vec::with_capacity(16 + body.len());
    bytes.extend((16 + body.len() as u32).to_ne_bytes());
    bytes.extend((kind as u16).to_ne_bytes());
    bytes.extend((flags as u16).to_ne_bytes());
    bytes.extend([0; 8]);
    bytes.extend(body);
    bytes
}

/// Sends the bytes and gives the first error among the kernel's answers.
fn talk(bytes: &[u8]) -> nix::Result<()> {
    let socket = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkNetFilter)?;
    send(socket.as_raw_fd(), bytes, MsgFlags::empty())?;
    let mut buffer = [0; 8192];
    loop {
        // The kernel has answered before `send` returns.
        let length = match recv(socket.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT) {
            Ok(length) => length,
            Err(Errno::EAGAIN) => return Ok(()),
            Err(error) => return Err(error),
        };
        if let Some(error) = first_error(&buffer[..length]) {
            return Err(error);
        }
    }
}

fn first_error(mut messages: &[u8]) -> Option<Errno> {
    while let Some((header, rest)) = messages.split_first_chunk::<16>() {
        let [a, b, c, d, kind_low, kind_high, ..] = *header;
        let length = u32::from_ne_bytes([a, b, c, d]) as usize;
        let kind = u16::from_ne_bytes([kind_low, kind_high]);
        if i32::from(kind) == libc::NLMSG_ERROR
            && let Some(code) = rest.first_chunk().copied().map(i32::from_ne_bytes)
            && code != 0
        {
            return Some(Errno::from_raw(-code));
        }
        messages = messages.get(length.max(16).next_multiple_of(4)..)?;
    }
    None
}
