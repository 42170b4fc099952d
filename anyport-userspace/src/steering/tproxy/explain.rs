//! What the kernel would do with a packet, read from its own lines and asked of its own sets.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context as _, bail};
use anyport_common::flow::{Flow, Transport, Version};

use super::{
    Tproxy,
    chain_rules::{self, COMMENT, LineTarget, REFUSE_MARK},
    chains::Chains,
    groups::number,
    mangle_table::{self, UNMATCHED},
    sets,
};
use crate::rules::{Prefix, from_address};

/// What the kernel does with a packet at this moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Live {
    /// What becomes of it; nothing if no line matches it.
    pub(super) verdict: Option<LineTarget>,
    /// The number of the rule by which that is so.
    pub(super) rule: Option<u32>,
}

impl Tproxy {
    /// What the lines and sets that the kernel holds now say of the first packet of a flow.
    ///
    /// # Errors
    /// Lines or sets can't be read, or another program put lines among ours.
    pub(super) fn decide_live(&self, flow: &Flow) -> anyhow::Result<Live> {
        let chains = match (flow.address.version, &self.v6) {
            (Version::V4, _) => &self.v4,
            (Version::V6, Ok(v6)) => v6,
            (Version::V6, Err(_)) => return Ok(Live { verdict: None, rule: None }),
        };
        let saved = chains.table.save()?;
        for text in mangle_table::rules_lines(&saved).filter(|line| !line.contains(UNMATCHED)) {
            let line = LiveLine::read(text).with_context(|| format!("reading the line {text:?} of our chain"))?;
            if line.matches(flow)? {
                let rule = self.rule(chains, &line, from_address(flow.address));
                return Ok(Live { verdict: Some(line.verdict), rule });
            }
        }
        Ok(Live { verdict: None, rule: None })
    }

    fn rule(&self, chains: &Chains, line: &LiveLine, address: IpAddr) -> Option<u32> {
        let Some(set) = &line.set else { return line.rule };
        let key = chains.key_of(set)?;
        number(self.rules.view(), Prefix::host(address).truncated(key.len), key)
    }
}

/// A line of our chain as `iptables-save` shows it.
#[derive(Debug, PartialEq, Eq)]
struct LiveLine {
    source: Option<Prefix>,
    destination: Option<Prefix>,
    set: Option<String>,
    transport: Option<Transport>,
    ports: Option<Vec<(u16, u16)>>,
    rule: Option<u32>,
    verdict: LineTarget,
}

impl LiveLine {
    fn read(text: &str) -> anyhow::Result<Self> {
        let (mut source, mut destination, mut set, mut transport) = (None, None, None, None);
        let (mut ports, mut rule, mut target) = (None, None, None);
        let (mut to_ip, mut to_port, mut is_refused) = (None, None, false);
        // What is in quotes is one word.
        let mut words = text.split('"').enumerate().flat_map(|(i, part)| match i % 2 {
            0 => part.split_ascii_whitespace().collect::<Vec<_>>(),
            _ => vec![part],
        });
        while let Some(word) = words.next() {
            let mut value = || words.next().with_context(|| format!("{word} has no value"));
            match word {
                "-s" => source = Some(value()?.parse()?),
                "-d" => destination = Some(value()?.parse()?),
                "-p" => {
                    let name = value()?;
                    transport = Transport::ALL.into_iter().find(|it| chain_rules::name(*it) == name);
                    transport.with_context(|| format!("{name} is no protocol of ours"))?;
                }
                "--dport" | "--dports" => ports = Some(read_ports(value()?)?),
                "--match-set" => {
                    set = Some(value()?.to_owned());
                    if value()? != "dst" {
                        bail!("the set is not about destinations");
                    }
                }
                "--comment" => rule = value()?.strip_prefix(COMMENT).map(str::parse).transpose()?,
                "-j" => target = Some(value()?),
                "--on-ip" => to_ip = Some(value()?.parse()?),
                "--on-port" => to_port = Some(value()?.parse()?),
                "!" if value()? == "--update-counters" => {}
                "--tproxy-mark" => is_refused = value()? == REFUSE_MARK,
                "-m" => drop(value()?),
                _ => bail!("{word} is not from us"),
            }
        }
        let verdict = match (target, to_ip.zip(to_port)) {
            (Some("TPROXY"), Some((ip, port))) if is_refused => LineTarget::Refuse(SocketAddr::new(ip, port)),
            (Some("TPROXY"), Some((ip, port))) => LineTarget::Tproxy(SocketAddr::new(ip, port)),
            (Some("DROP"), _) => LineTarget::Drop,
            (Some("RETURN"), _) => LineTarget::Return,
            _ => bail!("it has no target of ours"),
        };
        Ok(Self { source, destination, set, transport, ports, rule, verdict })
    }

    /// Whether the packet meets all that the line asks for. The kernel is asked about sets.
    fn matches(&self, flow: &Flow) -> anyhow::Result<bool> {
        let Self { source, destination, set, transport, ports, .. } = self;
        let address = from_address(flow.address);
        let matches = transport.is_none_or(|it| it == flow.transport)
            && source.is_none_or(|it| it.contains(from_address(flow.source)))
            && destination.is_none_or(|it| it.contains(address))
            && ports.as_ref().is_none_or(|it| it.iter().any(|(first, last)| (*first..=*last).contains(&flow.port)));
        match set {
            Some(set) if matches => sets::contains(set, address),
            _ => Ok(matches),
        }
    }
}

/// Reads `80,443,8000:8999`.
fn read_ports(text: &str) -> anyhow::Result<Vec<(u16, u16)>> {
    let range = |part: &str| {
        let (first, last) = part.split_once(':').unwrap_or((part, part));
        Ok((first.parse()?, last.parse()?))
    };
    text.split(',').map(range).collect()
}

#[cfg(test)]
mod tests {
    use super::{LineTarget, LiveLine, Transport};

    #[test]
    fn lines_are_read_as_iptables_shows_them() {
        let line = LiveLine::read(
            "-s 198.51.100.0/24 -d 192.0.2.7/32 -p udp -m multiport --dports 7,9:10 -m comment \
             --comment \"anyport rule 7\" -j TPROXY --on-port 99 --on-ip 127.0.0.1 --tproxy-mark 0x0/0x0",
        );
        let expected = LiveLine {
            source: Some("198.51.100.0/24".parse().unwrap()),
            destination: Some("192.0.2.7".parse().unwrap()),
            set: None,
            transport: Some(Transport::Udp),
            ports: Some(vec![(7, 7), (9, 10)]),
            rule: Some(7),
            verdict: LineTarget::Tproxy("127.0.0.1:99".parse().unwrap()),
        };
        assert_eq!(line.unwrap(), expected);
        let line =
            LiveLine::read("-p tcp -m tcp --dport 22 -m set --match-set anyport-4-0 dst ! --update-counters -j RETURN");
        let expected = LiveLine {
            source: None,
            destination: None,
            set: Some("anyport-4-0".to_owned()),
            transport: Some(Transport::Tcp),
            ports: Some(vec![(22, 22)]),
            rule: None,
            verdict: LineTarget::Return,
        };
        assert_eq!(line.unwrap(), expected);
    }

    #[test]
    fn what_is_not_from_us_is_not_guessed_at() {
        for line in [
            "-p icmp -j RETURN",
            "! -d 192.0.2.0/24 -j RETURN",
            "-i eth0 -p tcp -j DROP",
            "-p tcp -m set --match-set theirs src -j DROP",
            "-p tcp -j ACCEPT",
            "-p tcp",
            "-d",
        ] {
            assert!(LiveLine::read(line).is_err(), "{line}");
        }
    }
}
