//! Serving datagrams, and judging which to answer.

use std::{cell::RefCell, io, net::SocketAddr, sync::Arc, time::Duration};

use anyport_common::flow::Transport;
use tokio::{io::Interest, net::UdpSocket, task::yield_now, time::sleep};

use super::{
    HandlerKind, LoopGuard, ServiceConfig,
    conversations::Conversations,
    datagram::{self, Datagram, Ends},
    forward::UdpForwarder,
    handlers::TextLine,
    limits::{Gate, Refused},
    reply::UdpWorker,
};
use crate::{
    events::EventPublisher,
    hops::{next_hops, send_with_hops},
    log_limit::LogLimit,
};

/// Datagrams taken before other tasks run.
const BATCH: usize = 64;
/// An answer may be so many times the question, IP and UDP headers counted on both sides.
const AMPLIFICATION: usize = 4;
/// Pause after an error that is not of one datagram.
const PAUSE: Duration = Duration::from_millis(100);

thread_local! {
    /// One for all services of a worker.
    static CONVERSATIONS: RefCell<Conversations> = RefCell::default();
}

/// One UDP socket at work.
pub(super) struct Receiver {
    pub(super) socket: Arc<UdpSocket>,
    pub(super) bound: SocketAddr,
    pub(super) config: Arc<ServiceConfig>,
    pub(super) worker: Arc<UdpWorker>,
    pub(super) gate: Arc<Gate>,
    pub(super) loop_guard: LoopGuard,
    pub(super) publisher: Option<EventPublisher>,
    /// For `forward`.
    pub(super) forwarder: Option<UdpForwarder>,
}

impl Receiver {
    /// Receives and answers for ever.
    pub(super) async fn run(self) {
        let mut buffer = vec![0; datagram::LARGEST];
        let mut control = datagram::control_buffer();
        let log_limit = LogLimit::of_counted();
        loop {
            let batch = async {
                self.socket.readable().await?;
                for _ in 0..BATCH {
                    let receive = || datagram::receive(&self.socket, &mut buffer, &mut control);
                    let datagram = self.socket.try_io(Interest::READABLE, receive)?;
                    self.handle(&datagram, &buffer[..datagram.length], &log_limit);
                }
                io::Result::Ok(())
            };
            match batch.await {
                Ok(()) => yield_now().await,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => self.complain(&error).await,
            }
        }
    }

    async fn complain(&self, error: &io::Error) {
        tracing::warn!("service {}: receive: {error}", self.config.name);
        sleep(PAUSE).await;
    }

    fn handle(&self, datagram: &Datagram, question: &[u8], log_limit: &LogLimit) {
        let counts = &self.worker.counts;
        counts.datagrams.raise();
        let Some(ends) = datagram.ends else {
            return counts.unanswerable.raise();
        };
        let is_taken = self.gate.allows(ends.client.ip());
        if let Some(publisher) = self.publisher.as_ref().filter(|it| it.is_heard()) {
            publisher.publish(Transport::Udp, ends, !is_taken);
        }
        if !is_taken {
            return counts.refused.raise(Refused::Denied);
        }
        if self.config.handler != HandlerKind::Forward {
            counts.traffic.add(question.len() as u64, 0);
        }
        let line;
        let answer = match self.config.handler {
            HandlerKind::Discard | HandlerKind::Registered => return,
            HandlerKind::Forward => return self.forward(ends, question, datagram.hops),
            HandlerKind::Echo => question,
            HandlerKind::Hello => {
                line = TextLine::hello(ends.client, ends.dialled, Transport::Udp);
                line.as_bytes()
            }
        };
        let goes_on = || CONVERSATIONS.with_borrow_mut(|it| it.goes_on(ends, question));
        let refused = match refusal(ends, question.len(), answer.len(), &self.loop_guard) {
            Some(refusal) => Err(refusal),
            None => next_hops(datagram.hops)
                .ok_or(Refusal::Loop)
                .and_then(|hops| if goes_on() { Ok(hops) } else { Err(Refusal::Conversation) }),
        };
        match refused {
            Err(Refusal::Unanswerable) => counts.unanswerable.raise(),
            Err(Refusal::Loop) => counts.refused_loop.raise(),
            Err(Refusal::Size) => counts.refused_size.raise(),
            Err(Refusal::Conversation) => {
                counts.refused_conversation.raise();
                if let Some(left_out) = log_limit.next() {
                    let (service, Ends { client, dialled }) = (&self.config.name, ends);
                    tracing::warn!(
                        "service {service}: no answer from {dialled} to {client}, nor to others that are counted \
                         (refused_conversation): it seems to be a service that answers what it is answered{left_out}"
                    );
                }
            }
            Ok(hops) => match self.answer(ends, answer, hops) {
                Ok(()) => counts.note_answer(answer),
                Err(error) => {
                    counts.unsent.raise();
                    tracing::debug!("service {}: answer {ends:?}: {error}", self.config.name);
                }
            },
        }
    }

    fn answer(&self, ends: Ends, answer: &[u8], hops: u8) -> io::Result<()> {
        if ends.dialled == self.bound {
            // The group has that address and port already.
            return send_with_hops(&self.socket, ends.client, answer, hops);
        }
        self.worker.answer(ends, answer, hops)
    }

    /// How much the upstream answers is its own affair.
    fn forward(&self, ends: Ends, datagram: &[u8], hops: u8) {
        let counts = &self.worker.counts;
        match (refusal(ends, datagram.len(), 0, &self.loop_guard), &self.forwarder) {
            (Some(Refusal::Loop), _) => counts.refused_loop.raise(),
            (Some(_), _) | (None, None) => counts.unanswerable.raise(),
            (None, Some(forwarder)) => forwarder.take(ends, datagram, hops),
        }
    }
}

/// Why a datagram is not answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    Unanswerable,
    /// The source is steered itself, or the hop limit is used up.
    Loop,
    Size,
    /// The source seems to be a service.
    Conversation,
}

pub(super) fn refusal(ends: Ends, question: usize, answer: usize, loop_guard: &LoopGuard) -> Option<Refusal> {
    let Ends { client, dialled } = ends;
    let headers = if client.is_ipv4() { 20 + 8 } else { 40 + 8 };
    if client.port() == 0 {
        Some(Refusal::Unanswerable)
    } else if headers + answer > AMPLIFICATION * (headers + question) {
        Some(Refusal::Size)
    } else if client == dialled || loop_guard(client, dialled) {
        Some(Refusal::Loop)
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use std::{net::SocketAddr, sync::Arc};

    use anyport_common::flow::Transport;

    use super::{Ends, LoopGuard, Refusal, refusal};
    use crate::service::handlers::TextLine;

    fn ends(client: &str, dialled: &str) -> Ends {
        Ends { client: client.parse().unwrap(), dialled: dialled.parse().unwrap() }
    }

    fn steered(port: u16) -> LoopGuard {
        Arc::new(move |source: SocketAddr, _| source.port() == port)
    }

    #[test]
    fn the_longest_hello_may_answer_an_empty_question() {
        for end in ["255.255.255.255:65535", "[ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff]:65535"] {
            let ends = ends(end, end.replace("65535", "65534").as_str());
            let line = TextLine::hello(ends.client, ends.dialled, Transport::Udp);
            assert_eq!(refusal(ends, 0, line.as_bytes().len(), &steered(1)), None);
        }
    }

    #[test]
    fn answers_are_no_more_than_four_times_the_question() {
        for (client, dialled, headers) in
            [("198.51.100.1:9", "192.0.2.1:7", 28), ("[2001:db8::1]:9", "[2001:db8::2]:7", 48)]
        {
            for question in [0, 1, 100] {
                let most = 4 * (headers + question) - headers;
                let ends = ends(client, dialled);
                assert_eq!(refusal(ends, question, most, &steered(1)), None);
                assert_eq!(refusal(ends, question, most + 1, &steered(1)), Some(Refusal::Size));
            }
        }
    }

    #[test]
    fn nobody_talks_to_himself() {
        let guard = steered(7);
        for (client, dialled, expected) in [
            ("198.51.100.1:9", "192.0.2.1:7", None),
            ("192.0.2.2:7", "192.0.2.1:8", Some(Refusal::Loop)),
            ("192.0.2.1:8", "192.0.2.1:8", Some(Refusal::Loop)),
            ("[2001:db8::1]:7", "[2001:db8::1]:8", Some(Refusal::Loop)),
            ("198.51.100.1:0", "192.0.2.1:7", Some(Refusal::Unanswerable)),
        ] {
            assert_eq!(refusal(ends(client, dialled), 9, 9, &guard), expected, "{client} {dialled}");
        }
    }
}
