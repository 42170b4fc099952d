//! Answers that owners of registered UDP sockets have us send, from the address and port that the client wrote to.
//!
//! No owner gets a socket that is bound there. If that were transparent, it could send from any address at all
//! (`IP_PKTINFO`, `udp_sendmsg`); and if it were not, still from every address of the host, from a port that may take
//! privileges. It could also hold the port for ever. So owners hand over the answers, and each is judged.

use std::{net::SocketAddr, sync::Arc};

use rustix::io::Errno;
use tokio::{io::unix::AsyncFd, task::yield_now};
use tracing::{debug, warn};

use super::{
    AnswerGuard, LoopGuard,
    reply::UdpWorker,
    udp::{Refusal, refusal},
    witness::Witness,
};
use crate::{
    closing::{self, PassedFd},
    datagram::{Ends, LARGEST},
    hops::next_hops,
    log_limit::LogLimit,
    rules::ServiceName,
};

/// Connections for answers of one service: each process that owns a socket has one, and those that drain.
pub(super) const MAX_ANSWERING: usize = 64;
/// Bytes of the longest line with both ends.
const LONGEST_LINE: usize = 128;
/// Answers taken before other tasks run.
const BATCH: usize = 64;

/// The answers of one owner.
pub(super) struct Answering {
    pub(super) owner: AsyncFd<PassedFd>,
    pub(super) worker: Arc<UdpWorker>,
    pub(super) is_ours: AnswerGuard,
    pub(super) loop_guard: LoopGuard,
    pub(super) witness: Arc<Witness>,
    pub(super) service: ServiceName,
}

impl Answering {
    /// Sends answers until the owner closes the connection.
    pub(super) async fn run(self) {
        let mut buffer = vec![0; LONGEST_LINE + LARGEST];
        let log_limit = LogLimit::of_counted();
        loop {
            let Ok(mut ready) = self.owner.readable().await else { return };
            for _ in 0..BATCH {
                let owner = self.owner.get_ref();
                match closing::receive_into(owner, &mut buffer, owner.sender()) {
                    Ok(0) => return,
                    Ok(length) => self.send(&buffer[..length], &log_limit),
                    Err(Errno::AGAIN) => {
                        ready.clear_ready();
                        break;
                    }
                    Err(error) => return debug!("receive answers of an owner: {error}"),
                }
            }
            yield_now().await;
        }
    }

    fn send(&self, message: &[u8], log_limit: &LogLimit) {
        let counts = &self.worker.counts;
        let Some((ends, answer)) = parse(message) else {
            return counts.unanswerable.raise();
        };
        // How much larger than the question it may be, the witness knows.
        match refusal(ends, answer.len(), answer.len(), &self.loop_guard) {
            Some(Refusal::Loop) => counts.refused_loop.raise(),
            Some(_) => counts.unanswerable.raise(),
            None if !(self.is_ours)(ends) => counts.unanswerable.raise(),
            None => self.answer(ends, answer, log_limit),
        }
    }

    fn answer(&self, ends: Ends, answer: &[u8], log_limit: &LogLimit) {
        let counts = &self.worker.counts;
        let Some(asked) = self.witness.spend(ends, answer.len()) else {
            counts.refused_unsolicited.raise();
            if let Some(left_out) = log_limit.next() {
                let (service, Ends { client, dialled }) = (&self.service, ends);
                warn!(
                    "service {service}: its owner's answer from {dialled} to {client} is not sent, as are others that are counted \
                     (refused_unsolicited): that client has not asked for so much lately{left_out}"
                );
            }
            return;
        };
        let Some(hops) = next_hops(asked) else { return counts.refused_loop.raise() };
        match self.worker.answer(ends, answer, hops) {
            Ok(()) => counts.note_answer(answer),
            Err(error) => {
                counts.unsent.raise();
                debug!("send the answer of an owner, {ends:?}: {error}");
            }
        }
    }
}

/// Reads a line `DIALLED CLIENT`, which is followed by the answer.
fn parse(message: &[u8]) -> Option<(Ends, &[u8])> {
    let end = message.iter().take(LONGEST_LINE).position(|byte| *byte == b'\n')?;
    let (dialled, client) = str::from_utf8(&message[..end]).ok()?.split_once(' ')?;
    let (dialled, client): (SocketAddr, SocketAddr) = (dialled.parse().ok()?, client.parse().ok()?);
    (dialled.is_ipv4() == client.is_ipv4()).then_some((Ends { client, dialled }, &message[end + 1..]))
}

#[cfg(test)]
mod tests {
    use super::parse;
    use crate::datagram::Ends;

    #[test]
    fn answers_begin_with_both_ends() {
        for (dialled, client) in [("192.0.2.1:53", "198.51.100.1:9"), ("[2001:db8::1]:53", "[2001:db8::2%3]:9")] {
            let ends = Ends { client: client.parse().unwrap(), dialled: dialled.parse().unwrap() };
            for answer in ["", "yes", "two\nlines"] {
                let message = format!("{dialled} {client}\n{answer}");
                assert_eq!(parse(message.as_bytes()), Some((ends, answer.as_bytes())));
            }
        }
        let long = format!("192.0.2.1:53 {}198.51.100.1:9\n", " ".repeat(200));
        for message in [
            "",
            "\n",
            "192.0.2.1:53 198.51.100.1:9",
            "192.0.2.1:53\n",
            "192.0.2.1 198.51.100.1:9\n",
            "192.0.2.1:53  198.51.100.1:9\n",
            "192.0.2.1:53 [2001:db8::1]:9\n",
            "\u{ff}:53 198.51.100.1:9\n",
            &long,
        ] {
            assert_eq!(parse(message.as_bytes()), None, "{message:?}");
        }
    }
}
