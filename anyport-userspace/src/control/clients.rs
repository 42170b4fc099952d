//! Who is connected to the control socket. One user's clients never keep another's out, however many there are and whatever they do not say.

use std::{
    collections::BTreeMap,
    os::fd::AsFd as _,
    pin::pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use axum::{Extension, Router, extract::ConnectInfo};
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use nix::unistd::Uid;
use tokio::{net::UnixStream, sync::watch, time::timeout};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::{debug, warn};

use super::stream::ClientStream;
use crate::api::Peer;

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
const NO_ROOM: &[u8] =
    b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nconnection: close\r\n\r\n\
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
    under_way: Arc<AtomicUsize>,
    has_asked: CancellationToken,
    close: CancellationToken,
}

/// While this lives the connection is not closed for another one.
pub(super) struct Busy(Arc<AtomicUsize>);

impl Client {
    pub(super) fn busy(&self) -> Busy {
        self.under_way.fetch_add(1, Relaxed);
        self.has_asked.cancel();
        Busy(Arc::clone(&self.under_way))
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
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
            drop(ClientStream::new(stream, peer.uid.as_raw()));
            return;
        };
        let client = admitted.client.clone();
        let stream = ClientStream::new(stream, peer.uid.as_raw());
        let api = api.clone().layer(Extension(client.clone())).layer(Extension(ConnectInfo(peer)));
        let mut http = http1::Builder::new();
        http.timer(TokioTimer::new()).header_read_timeout(HEAD_TIME).max_buf_size(LARGEST_HEAD);
        let connection = http.serve_connection(TokioIo::new(stream), TowerToHyperService::new(api));
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
                () = client.close.cancelled() => return,
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
        let is_idle = |it: &Entry| it.client.under_way.load(Relaxed) == 0;
        let (oldest, _) = self.connected.iter().find(|(_, it)| is_one(it) && is_idle(it))?;
        let oldest = self.connected.remove(&oldest.clone())?;
        oldest.client.close.cancel();
        Some(())
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

    use super::{Clients, OF_OTHERS, PER_USER};

    #[test]
    fn the_oldest_idle_connection_makes_room() {
        let clients = Clients::default();
        let user = Uid::from_raw(7);
        let admitted: Vec<_> = (0..PER_USER).map(|_| clients.admit(user, true).unwrap()).collect();
        let busy: Vec<_> = admitted[1..].iter().map(|it| it.client.busy()).collect();
        let _one_more = clients.admit(user, true).unwrap();
        let closed: Vec<_> = admitted.iter().map(|it| it.client.close.is_cancelled()).collect();
        assert!(closed[0] && closed[1..].iter().all(|closed| !closed), "{closed:?}");
        let _busy = clients.table().connected.values().last().unwrap().client.busy();
        assert!(clients.admit(user, true).is_none(), "all are busy");
        assert!(clients.admit(Uid::from_raw(8), true).is_some());
        drop(busy);
        assert!(clients.admit(user, true).is_some());
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
