//! Notices sources that answer what they are answered.
//!
//! One datagram with a forged source has two services of two hosts talk for ever, each answering the other (CVE-2024-2169).
//! Between anyports the hop limit ends that, see [`crate::hops::next_hops`]. A service of another program begins with a new
//! hop limit each time. What gives it away is either its port, as services are below 1024, where no client is, nor does NAT put
//! one there (inetd goes by that); or that what it says is what it was told, over and over. Clients number what they send, or
//! stop. One that does not loses one answer of very many, which ends what goes round by answers alone.

use std::{
    collections::hash_map::RandomState,
    hash::{BuildHasher as _, Hasher as _},
    net::IpAddr,
};

use nix::time::{ClockId, clock_gettime};

use crate::datagram::Ends;

/// Conversations that a worker remembers.
const SLOTS: usize = 4096;
/// Of the same content between two hosts each datagram with such a number is not answered.
const REPEATS: u32 = 8192;
/// A conversation is over after so many seconds without a datagram.
const PAUSE: u32 = 2;
/// Ports of services, by custom.
const SERVICE_PORTS: u16 = 1024;
/// Datagrams from those ports that are answered between two hosts.
const FROM_SERVICES: u32 = 1000;
/// Until there was none for so many seconds.
const SERVICE_PAUSE: u32 = 10;
/// Words of a content that distinguish it, beside its length.
const WORDS: usize = 16;

/// What a worker remembers of the datagrams that it answered: 48 KiB.
///
/// What is said often keeps its place: one that comes for the same place takes one off its count, and takes the place when
/// nothing is left (Misra and Gries 1982). So others can't drive it out by many contents, sources or ports.
#[derive(Debug)]
pub(super) struct Conversations {
    slots: Box<[Slot]>,
    hasher: RandomState,
}

#[derive(Clone, Copy, Debug, Default)]
struct Slot {
    tag: u32,
    count: u32,
    /// When it was counted last.
    second: u32,
}

impl Default for Conversations {
    fn default() -> Self {
        Self { slots: vec![Slot::default(); SLOTS].into(), hasher: RandomState::new() }
    }
}

impl Conversations {
    /// Whether a datagram is to be answered. It is counted.
    pub(super) fn goes_on(&mut self, ends: Ends, content: &[u8]) -> bool {
        let now = clock_gettime(ClockId::CLOCK_MONOTONIC_COARSE).map(|it| it.tv_sec()).unwrap_or_default();
        self.goes_on_at(u32::try_from(now).unwrap_or(u32::MAX), ends, content)
    }

    fn goes_on_at(&mut self, now: u32, Ends { client, dialled }: Ends, content: &[u8]) -> bool {
        let hosts = self.hash(client.ip(), dialled.ip());
        if client.port() < SERVICE_PORTS && self.count(now, hosts, SERVICE_PAUSE) > FROM_SERVICES {
            return false;
        }
        !self.count(now, mixed(hosts, content), PAUSE).is_multiple_of(REPEATS)
    }

    /// Both hosts, but not their ports: a service may answer at all of them.
    fn hash(&self, client: IpAddr, dialled: IpAddr) -> u64 {
        let mut hasher = self.hasher.build_hasher();
        for address in [client, dialled] {
            match address {
                IpAddr::V4(address) => hasher.write_u32(address.to_bits()),
                IpAddr::V6(address) => hasher.write_u128(address.to_bits()),
            }
        }
        hasher.finish()
    }

    /// How often it has been said without such a pause; 1 if it has no place.
    fn count(&mut self, now: u32, key: u64, pause: u32) -> u32 {
        let tag = u32::try_from(key >> 32).unwrap_or_default() | 1;
        let place = usize::try_from(key & 0xffff_ffff).unwrap_or_default() % SLOTS;
        let slot = &mut self.slots[place];
        let is_over = now.saturating_sub(slot.second) >= pause;
        if slot.tag == tag {
            slot.count = if is_over { 1 } else { slot.count.saturating_add(1) };
            slot.second = now;
            return slot.count;
        }
        // The other one's pause may be the longer one.
        if slot.count <= 1 || now.saturating_sub(slot.second) >= SERVICE_PAUSE {
            *slot = Slot { tag, count: 1, second: now };
        } else {
            slot.count -= 1;
        }
        1
    }
}

/// A number for a content between two hosts.
fn mixed(hosts: u64, content: &[u8]) -> u64 {
    let mix = |sum: u64, word: u64| {
        let product = (sum ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        product ^ product >> 32
    };
    let word = |bytes: &[u8]| bytes.iter().fold(0, |word, byte| word << 8 | u64::from(*byte));
    let sum = mix(hosts, content.len() as u64);
    if content.len() <= 8 * WORDS {
        return content.chunks(8).map(word).fold(sum, mix);
    }
    // Spread over all of it, the first and the last bytes among them.
    let at = |number: usize| &content[number * (content.len() - 8) / (WORDS - 1)..][..8];
    (0..WORDS).map(|number| word(at(number))).fold(sum, mix)
}

#[cfg(test)]
mod tests {
    use super::{Conversations, Ends, FROM_SERVICES, PAUSE, REPEATS, SERVICE_PAUSE};

    fn ends(client: &str, dialled: &str) -> Ends {
        Ends { client: client.parse().unwrap(), dialled: dialled.parse().unwrap() }
    }

    #[test]
    fn clients_that_say_something_new_are_always_answered() {
        let mut conversations = Conversations::default();
        let ends = ends("198.51.100.1:40000", "192.0.2.1:7");
        for length in [8, 100, 1400] {
            for number in 0..50_000_u64 {
                let mut content = vec![7; length];
                content[length - 8..].copy_from_slice(&number.to_be_bytes());
                assert!(conversations.goes_on_at(1, ends, &content));
            }
        }
    }

    #[test]
    fn what_goes_round_ends() {
        for (client, dialled) in [("198.51.100.1:", "192.0.2.1:"), ("[2001:db8::1]:", "[2001:db8::2]:")] {
            let mut conversations = Conversations::default();
            // Random ports do not help, nor do contents that others send meanwhile.
            let mut count = 0_u32;
            for port in (1024..u16::MAX).cycle() {
                count += 1;
                let noise = ends("203.0.113.1:9999", "192.0.2.9:7");
                assert!(conversations.goes_on_at(1, noise, &[count.to_be_bytes(), [0; 4]].concat()));
                if !conversations.goes_on_at(1, ends(&format!("{client}{port}"), &format!("{dialled}7")), b"again") {
                    break;
                }
            }
            assert!((REPEATS..2 * REPEATS).contains(&count), "{count}");
        }
    }

    #[test]
    fn a_client_that_repeats_itself_loses_one_of_many() {
        let mut conversations = Conversations::default();
        let ends = ends("198.51.100.1:40000", "192.0.2.1:7");
        let lost = (0..10 * REPEATS).filter(|_| !conversations.goes_on_at(1, ends, b"again")).count();
        assert_eq!(lost, 10);
        for second in 0..3 * REPEATS {
            assert!(conversations.goes_on_at(100 + PAUSE * second, ends, b"now and then"));
        }
    }

    #[test]
    fn services_are_answered_for_a_while() {
        let mut conversations = Conversations::default();
        let answered = |conversations: &mut Conversations, now, port| {
            let say = |number: &u32| {
                conversations.goes_on_at(
                    now,
                    ends(&format!("198.51.100.1:{port}"), "192.0.2.1:9"),
                    &number.to_be_bytes(),
                )
            };
            (0..2 * FROM_SERVICES).filter(say).count()
        };
        // One that shares its place takes some off its count.
        let some = FROM_SERVICES as usize..FROM_SERVICES as usize + 50;
        assert!(some.contains(&answered(&mut conversations, 1, 13)));
        assert_eq!(answered(&mut conversations, 2, 19), 0, "another port of the same host");
        assert!(some.contains(&answered(&mut conversations, 2 + SERVICE_PAUSE, 19)));
        assert_eq!(answered(&mut conversations, 1, 1024), 2 * FROM_SERVICES as usize);
    }
}
