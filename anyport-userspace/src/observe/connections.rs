//! Who is connected to the HTTP address: so many at a time, and a new one takes the place of the one that has been waiting for longest.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio_util::sync::CancellationToken;

/// Connections at a time.
const MOST: usize = 64;

/// Those who are connected, in the order in which they came.
#[derive(Clone, Debug, Default)]
pub(super) struct Connections(Arc<Mutex<Table>>);

#[derive(Debug, Default)]
struct Table {
    next: u64,
    connected: BTreeMap<u64, Connection>,
}

#[derive(Debug, Default)]
struct Connection {
    has_asked: bool,
    close: CancellationToken,
}

/// A connection, which counts until this is dropped.
#[derive(Debug)]
pub(super) struct Admitted {
    connections: Connections,
    number: u64,
    close: CancellationToken,
}

impl Connections {
    /// Makes room, if need be by closing the connection that has come first of those that have not asked, or of all where all have.
    pub(super) fn admit(&self) -> Admitted {
        let mut table = self.table();
        if table.connected.len() >= MOST {
            let silent = table.connected.iter().find(|(_, it)| !it.has_asked);
            let oldest = silent.or_else(|| table.connected.iter().next()).map(|(number, _)| *number);
            if let Some(oldest) = oldest.and_then(|oldest| table.connected.remove(&oldest)) {
                oldest.close.cancel();
            }
        }
        let (number, close) = (table.next, CancellationToken::new());
        table.next += 1;
        table.connected.insert(number, Connection { has_asked: false, close: close.clone() });
        Admitted { connections: self.clone(), number, close }
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Admitted {
    /// It has asked for something.
    pub(super) fn asks(&self) {
        if let Some(connection) = self.connections.table().connected.get_mut(&self.number) {
            connection.has_asked = true;
        }
    }

    /// Waits until it is to make room.
    pub(super) async fn closed(&self) {
        self.close.cancelled().await;
    }
}

impl Drop for Admitted {
    fn drop(&mut self) {
        self.connections.table().connected.remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::{Connections, MOST};

    #[test]
    fn who_says_nothing_makes_room_first() {
        let connections = Connections::default();
        let mut admitted: Vec<_> = (0..MOST).map(|_| connections.admit()).collect();
        admitted[0].asks();
        admitted.push(connections.admit());
        let closed = |it: &super::Admitted| it.close.is_cancelled();
        assert_eq!(admitted.iter().position(closed), Some(1));
        admitted.iter().for_each(super::Admitted::asks);
        admitted.push(connections.admit());
        assert!(closed(&admitted[0]), "where all have asked, the oldest");
        assert_eq!(connections.table().connected.len(), MOST);
    }
}
