//! The refusal of what has no live socket, as on the other back ends.
//!
//! TPROXY can give a packet a socket, but not answer it, and REJECT can answer, but stands in the table filter only. So the lines of
//! what is refused give it a socket of ours, which drops whatever reaches it, and a mark, by which a chain in filter/INPUT
//! recognizes it and refuses. Where a line of another program lets the packet pass before, the socket keeps it from the host's
//! listeners.

use std::net::SocketAddr;

use anyhow::Context as _;
use anyport_common::flow::Transport;
use socket2::{Domain, SockFilter, Socket, Type};

use super::{
    chain_rules::Family,
    ip_table::{IpTable, Layout},
};

const CHAIN: &str = "ANYPORT-REFUSE";

/// What of the table filter is ours.
pub(super) const FILTER: Layout = Layout {
    table: "filter",
    hook: "INPUT",
    // See `REFUSE_MARK`.
    condition: "-m mark --mark 0x1000/0x1000 ",
    entry: CHAIN,
    chains: &[CHAIN],
};

/// What refuses in one family.
#[derive(Debug)]
pub(super) struct Refusal {
    table: IpTable,
    /// TCP's and UDP's. They keep their ports, so that nothing else is found there.
    _sockets: [Socket; 2],
    pub(super) at: [SocketAddr; 2],
    /// Whether the chain was written and is not known to be lost.
    is_written: bool,
}

impl Refusal {
    /// Tries out whether the kernel takes the chain, and leaves no trace of that.
    pub(super) fn open(family: Family) -> anyhow::Result<Self> {
        let sockets = [open_socket(family, Transport::Tcp)?, open_socket(family, Transport::Udp)?];
        let address = |socket: &Socket| {
            let address = socket.local_addr().context("ask a socket for its address")?;
            address.as_socket().context("a socket has no address")
        };
        let at = [address(&sockets[0])?, address(&sockets[1])?];
        let table = IpTable::find(family, &FILTER)?.context("there is no iptables")?;
        let before = table.save()?;
        if FILTER.our_chains(&before).next().is_none() {
            let tried = table.write(&before, CHAIN, &[(CHAIN, &lines(family))], false);
            table.save().and_then(|saved| table.remove(&saved))?;
            tried?;
        }
        Ok(Self { table, _sockets: sockets, at, is_written: false })
    }

    /// Makes sure that the chain is there.
    pub(super) fn put_in_place(&mut self) -> anyhow::Result<()> {
        if !self.is_written {
            let saved = self.table.save()?;
            if !is_complete(&saved) {
                self.table.write(&saved, CHAIN, &[(CHAIN, &lines(self.table.family))], true)?;
            }
            self.is_written = true;
        }
        Ok(())
    }

    /// What another program has changed, in words.
    pub(super) fn lost(&self) -> anyhow::Result<Option<String>> {
        if !self.is_written || is_complete(&self.table.save()?) {
            return Ok(None);
        }
        Ok(Some(format!(
            "the chain {CHAIN} or the jump to it, before all that accepts, from {} of {:?} in the table filter",
            FILTER.hook, self.table.family
        )))
    }

    /// Has the chain written again.
    pub(super) fn forget(&mut self) {
        self.is_written = false;
    }

    /// Takes the chain out of the kernel.
    pub(super) fn remove(&mut self) -> anyhow::Result<()> {
        self.is_written = false;
        self.table.remove(&self.table.save()?)
    }
}

/// Removes the chain of an earlier daemon.
pub(super) fn remove_leftovers(family: Family) -> anyhow::Result<()> {
    let Some(table) = IpTable::find(family, &FILTER)? else { return Ok(()) };
    table.remove(&table.save()?)
}

fn lines(family: Family) -> [String; 2] {
    let unreachable = match family {
        Family::V4 => "icmp-port-unreachable",
        Family::V6 => "icmp6-port-unreachable",
    };
    ["-p tcp -j REJECT --reject-with tcp-reset".to_owned(), format!("-p udp -j REJECT --reject-with {unreachable}")]
}

/// Whether the chain and the jump to it are as they were written, given what [`IpTable::save`] showed. What is accepted before the
/// jump would not be refused any more: administrators insert such lines at the top of the chain. Jumps to chains of others are left
/// where they are, since some of those put theirs back at the top, too.
fn is_complete(saved: &str) -> bool {
    let jump = format!("-A {} {}", FILTER.hook, FILTER.jump());
    let of_hook = format!("-A {} ", FILTER.hook);
    let lines = || saved.lines().filter_map(|line| line.split_once("] ").map(|(_, line)| line));
    let mut reached =
        lines().filter(|line| line.starts_with(&of_hook)).take_while(|line| !line.ends_with(" -j ACCEPT"));
    let refusing = |protocol: &str| {
        let begin = format!("-A {CHAIN} -p {protocol} -j REJECT ");
        lines().filter(|line| line.starts_with(&begin)).count() == 1
    };
    reached.any(|line| line == jump) && refusing("tcp") && refusing("udp")
}

/// A socket that TPROXY finds and that drops whatever it is given.
fn open_socket(family: Family, transport: Transport) -> anyhow::Result<Socket> {
    /// For classic BPF: return a constant, which is how many bytes are kept.
    const RETURN: u16 = 0x06;
    let address = SocketAddr::new(family.loopback(), 0);
    let open = || {
        let kind = match transport {
            Transport::Tcp => Type::STREAM,
            Transport::Udp => Type::DGRAM,
        };
        let socket = Socket::new(Domain::for_address(address), kind.nonblocking(), None)?;
        socket.attach_filter(&[SockFilter::new(RETURN, 0, 0, 0)])?;
        match family {
            Family::V4 => socket.set_ip_transparent_v4(true)?,
            Family::V6 => socket.set_ip_transparent_v6(true)?,
        }
        socket.bind(&address.into())?;
        if transport == Transport::Tcp {
            socket.listen(1)?;
        }
        Ok::<_, std::io::Error>(socket)
    };
    open().with_context(|| format!("open a socket on {address} for what is refused"))
}

#[cfg(test)]
mod tests {
    use super::{super::chain_rules::REFUSE_MARK, FILTER, is_complete};

    #[test]
    fn a_changed_chain_is_recognized() {
        assert!(FILTER.condition.contains(REFUSE_MARK));
        let lines = [
            "[0:0] -A INPUT -m mark --mark 0x1000/0x1000 -j ANYPORT-REFUSE",
            "[0:0] -A ANYPORT-REFUSE -p tcp -j REJECT --reject-with tcp-reset",
            "[0:0] -A ANYPORT-REFUSE -p udp -j REJECT --reject-with icmp-port-unreachable",
        ];
        assert!(is_complete(&lines.join("\n")));
        for gone in 0..lines.len() {
            let mut left = lines.to_vec();
            left.remove(gone);
            assert!(!is_complete(&left.join("\n")), "{left:?}");
        }
        for (first, is_in_the_way) in [
            ("[0:0] -A INPUT -d 192.0.2.0/24 -j ACCEPT", true),
            ("[7:420] -A INPUT -i lo -m comment --comment \"-j ANYPORT-REFUSE\" -j ACCEPT", true),
            ("[0:0] -A INPUT -j ufw-before-input", false),
            ("[0:0] -A ufw-before-input -i lo -j ACCEPT", false),
        ] {
            let saved = [&[first][..], &lines].concat().join("\n");
            assert_eq!(!is_complete(&saved), is_in_the_way, "{first}");
        }
    }
}
