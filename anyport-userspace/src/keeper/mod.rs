//! No connection is lost when the daemon restarts: a process that does nothing else keeps its sockets.
//!
//! `anyportd` is two processes. The *keeper* is the one that was started; it holds the listening sockets, and starts
//! the *server*, which does everything else. When the server is killed, connections wait in the sockets' queues until
//! the keeper has started another one, which goes on with the same sockets; steering is pinned in the kernel meanwhile.
//! For an upgrade the keeper starts a server from another executable. That reads its configuration first; then the previous
//! server stops accepting, gives its locks back and serves the connections that it has, to their end or a deadline.
//!
//! Both communicate over a pair of sockets, in messages of JSON with descriptors beside them: `Report` and `Order`. They may be of
//! different versions of anyport, so what is unknown is ignored, and what is there keeps its meaning.

mod executable;
mod host;
mod link;
mod server;
mod systemd;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

pub use self::{
    host::keep,
    link::{Begin, Command, Commands, Link},
};
use crate::steering::choose::Remembered;

/// The name under which a service manager passes the control socket, which it has bound. None of a service's sockets has such a name.
pub const CONTROL: &str = "@control";

/// The server finds the keeper at its standard input, if this variable has the value [`AT_STDIN`].
const VARIABLE: &str = "ANYPORT_KEEPER";
const AT_STDIN: &str = "stdin";

/// What the threads of a server are called that carry out commands.
pub const CONTROL_THREADS: &str = "anyport-control";

/// What a server says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Report {
    /// It could start: its configuration is good. It touches nothing before [`Order::Begin`].
    Prepared,
    /// The socket with this message is to be kept under this name.
    Keep(String),
    /// It is not needed any more.
    Forget(String),
    /// It serves, and steering is active.
    Ready,
    /// It accepts nothing any more and holds no lock; connections that it has go on.
    Left,
    /// It goes on: said every second from the time on when it serves.
    Alive,
    /// It can't start, or not go on.
    Failed(String),
    /// Another executable is to take over.
    Replace(PathBuf),
    /// What it found out about the back ends, for the next server of this executable.
    Remember(Remembered),
}

/// What the keeper says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Order {
    /// The sockets with this message are kept under these names.
    Kept(Vec<String>),
    /// Start.
    Begin(Begin),
    /// Leave the rest to another server.
    Leave,
    /// The server that was to take over could not start: why.
    NotReplaced(String),
}
