//! Who is connected to the control socket. One user's clients never keep another's out, however many there are and whatever they do not say.

use std::{
    collections::BTreeMap,
    os::fd::AsFd as _,
    pin::pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use axum::{Router, extract::ConnectInfo};
use hyper::{
    Request,
    body::Incoming,
    server::conn::http1,
    service::{Service as _, service_fn},
};
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use nix::unistd::Uid;
use tokio::{net::UnixStream, sync::watch, time::timeout};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::{debug, warn};

use super::{budget::Taken, stream::ClientStream};
use crate::{api::Peer, write_timeout::WriteTimeout};

/// Connections of one user at a time. At this limit a new one replaces the one that has been without a request for longest.
const PER_USER: usize = 64;
/// As above, of all users together who are not in control.
const OF_OTHERS: usize = 512;
/// How long a connection may be there before the head of its next request is complete.
const HEAD_TIME: Duration = Duration::from_secs(15);
/// How long a client that has just come has for its first request when the daemon stops. It is answered like others then, be it with that.
const FIRST_TIME: Duration = Duration::from_secs(1);
/// What a head may have, in bytes.
const LARGEST_HEAD: usize = 64 << 10;
/// For who can't have a connection, since all of that user's carry requests at this moment.
const NO_ROOM: &[u8] = b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nconnection: close\r\n\
    content-length: 94\r\n\r\n\
    {\"error\":\"too many requests of this user are under way\",\"hint\":\"try again when they are done\"}";

/// Those who are connected, in the order in which they came.
#[derive(Clone, Debug, Default)]
pub(super) struct Clients(Arc<Mutex<Connections>>);

#[derive(Debug, Default)]
struct Connections {
    next: u64,
    connected: BTreeMap<u64, Entry>,
}

#[derive(Debug)]
struct Entry {
    uid: Uid,
    is_in_control: bool,
    client: Client,
}

/// A connection, as its requests see it.
#[derive(Clone, Debug, Default)]
pub(super) struct Client {
    state: Arc<State>,
    has_asked: CancellationToken,
    close: CancellationToken,
}

/// Whether a connection may be closed for another one.
#[derive(Debug, Default)]
struct State {
    /// Requests whose answers are not complete yet; or [`CLOSED`].
    under_way: AtomicUsize,
    unsent: Arc<Unsent>,
}

/// No request is begun any more.
const CLOSED: usize = usize::MAX / 2;

/// Answers that are complete, and whose last bytes have not left yet, with what they take of the budget.
#[derive(Debug, Default)]
pub(super) struct Unsent(Mutex<Vec<Option<Taken>>>);

impl Unsent {
    fn answers(&self) -> MutexGuard<'_, Vec<Option<Taken>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All of them have left.
    pub(super) fn have_left(&self) {
        self.answers().clear();
    }
}

/// While this lives the connection is not closed for another one, nor from then on until the last byte of the answer has left.
pub(super) struct Busy {
    state: Arc<State>,
    taken: Option<Taken>,
}

impl Busy {
    /// What the answer takes of the budget.
    pub(super) fn keep(&mut self, taken: Taken) {
        self.taken = Some(taken);
    }
}

impl Client {
    /// None if the connection is being closed for another one.
    pub(super) fn busy(&self) -> Option<Busy> {
        self.has_asked.cancel();
        let count = |under_way| (under_way < CLOSED).then_some(under_way + 1);
        self.state.under_way.fetch_update(SeqCst, SeqCst, count).ok()?;
        Some(Busy { state: Arc::clone(&self.state), taken: None })
    }

    /// Has the connection closed, if no request is under way and no answer on its way.
    fn close_if_idle(&self) -> bool {
        // No answer is added meanwhile.
        let unsent = self.state.unsent.answers();
        let is_idle = unsent.is_empty() && self.state.under_way.compare_exchange(0, CLOSED, SeqCst, SeqCst).is_ok();
        if is_idle {
            self.close.cancel();
        }
        is_idle
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        let mut unsent = self.state.unsent.answers();
        unsent.push(self.taken.take());
        self.state.under_way.fetch_sub(1, SeqCst);
    }
}

impl Clients {
    /// Answers what comes over a connection, until one side closes it or all are to end.
    pub(super) fn serve(&self, stream: UnixStream, api: &Router, stop: &watch::Receiver<bool>, tasks: &TaskTracker) {
        let peer = match Peer::of(stream.as_fd()) {
            Ok(peer) => peer,
            Err(error) => return warn!("ask the kernel who is at the control socket: {error}"),
        };
        let Some(admitted) = self.admit(peer.uid, peer.is_in_control()) else {
            // A client that does not read this has asked for too much already.
            stream.try_write(NO_ROOM).ok();
            drop(ClientStream::new(stream, peer.uid.as_raw(), Arc::default()));
            return;
        };
        let client = admitted.client.clone();
        let stream = ClientStream::new(stream, peer.uid.as_raw(), Arc::clone(&client.state.unsent));
        let api = TowerToHyperService::new(api.clone());
        let asking = client.clone();
        // Cheap for each connection, since many may wait before one that has something to say.
        let service = service_fn(move |mut request: Request<Incoming>| {
            request.extensions_mut().insert(asking.clone());
            request.extensions_mut().insert(ConnectInfo(peer.clone()));
            api.call(request)
        });
        let mut http = http1::Builder::new();
        http.timer(TokioTimer::new()).header_read_timeout(HEAD_TIME).max_buf_size(LARGEST_HEAD);
        let socket = TokioIo::new(WriteTimeout::new(stream.clone()));
        let connection = http.serve_connection(socket, service);
        let mut stop = stop.clone();
        tasks.spawn(async move {
            let _admitted = admitted;
            let mut connection = pin!(connection);
            let stopped = async {
                // The sender goes only with the daemon itself.
                drop(stop.wait_for(|stop| *stop).await);
                timeout(FIRST_TIME, client.has_asked.cancelled()).await.ok();
            };
            let ended = tokio::select! {
                ended = connection.as_mut() => ended,
                () = client.close.cancelled() => {
                    // For a request that is on its way: nothing was done.
                    stream.try_write(NO_ROOM).ok();
                    return;
                }
                () = stopped => {
                    connection.as_mut().graceful_shutdown();
                    connection.await
                }
            };
            if let Err(error) = ended {
                debug!("a client at the control socket: {error}");
            }
        });
    }

    /// None if the limit is reached and no connection can be closed.
    fn admit(&self, uid: Uid, is_in_control: bool) -> Option<Admitted> {
        let mut table = self.table();
        table.make_room(PER_USER, |it| it.uid == uid)?;
        if !is_in_control {
            table.make_room(OF_OTHERS, |it| !it.is_in_control)?;
        }
        let number = table.next;
        table.next += 1;
        let client = Client::default();
        table.connected.insert(number, Entry { uid, is_in_control, client: client.clone() });
        Some(Admitted { clients: self.clone(), number, client })
    }

    fn table(&self) -> MutexGuard<'_, Connections> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Connections {
    /// Has fewer than `limit` of some, if need be by closing the connection of the oldest of them that carries no request.
    fn make_room(&mut self, limit: usize, is_one: impl Fn(&Entry) -> bool) -> Option<()> {
        if self.connected.values().filter(|it| is_one(it)).count() < limit {
            return Some(());
        }
        let is_closed = |(_, it): &(&u64, &Entry)| is_one(it) && it.client.close_if_idle();
        let (oldest, _) = self.connected.iter().find(is_closed)?;
        let oldest = *oldest;
        self.connected.remove(&oldest).map(drop)
    }
}

/// A client that counts towards the limits until this is dropped.
struct Admitted {
    clients: Clients,
    number: u64,
    client: Client,
}

impl Drop for Admitted {
    fn drop(&mut self) {
        self.clients.table().connected.remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use nix::unistd::Uid;

    use super::{Clients, NO_ROOM, OF_OTHERS, PER_USER};

    #[test]
    fn the_oldest_idle_connection_makes_room() {
        let clients = Clients::default();
        let user = Uid::from_raw(7);
        let admitted: Vec<_> = (0..PER_USER).map(|_| clients.admit(user, true).unwrap()).collect();
        let busy: Vec<_> = admitted[1..].iter().map(|it| it.client.busy().unwrap()).collect();
        let _one_more = clients.admit(user, true).unwrap();
        let closed: Vec<_> = admitted.iter().map(|it| it.client.close.is_cancelled()).collect();
        assert!(closed[0] && closed[1..].iter().all(|closed| !closed), "{closed:?}");
        let _busy = clients.table().connected.values().last().unwrap().client.busy().unwrap();
        assert!(clients.admit(user, true).is_none(), "all are busy");
        assert!(clients.admit(Uid::from_raw(8), true).is_some());
        drop(busy);
        // The ends of their answers have not left yet.
        assert!(clients.admit(user, true).is_none());
        for it in &admitted {
            it.client.state.unsent.have_left();
        }
        assert!(clients.admit(user, true).is_some());
        assert!(admitted[0].client.busy().is_none(), "a request on a connection that is closed");
    }

    #[test]
    fn a_refusal_says_how_long_it_is() {
        let text = str::from_utf8(NO_ROOM).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        assert!(head.ends_with(&format!("content-length: {}", body.len())), "{text}");
    }

    #[test]
    fn strangers_never_have_more_than_their_part() {
        let clients = Clients::default();
        let uids = (0_u32..2_000).map(|uid| Uid::from_raw(1_000 + uid));
        let admitted: Vec<_> = uids.map(|uid| clients.admit(uid, false).unwrap()).collect();
        assert_eq!(clients.table().connected.len(), OF_OTHERS);
        assert_eq!(admitted.iter().filter(|it| it.client.close.is_cancelled()).count(), 2_000 - OF_OTHERS);
    }
}
