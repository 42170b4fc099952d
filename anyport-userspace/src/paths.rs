//! Where the daemon keeps its files, unless told otherwise.

use std::{fs, io, os::unix::fs::DirBuilderExt as _, path::Path};

/// The socket of the control API.
pub const DEFAULT_SOCKET: &str = "/run/anyport/anyportd.sock";
/// The directory of the state: what was added by hand and what the fleet gave.
pub const DEFAULT_STATE_DIR: &str = "/var/lib/anyport";

/// Where locks are, wherever the sockets are.
pub(crate) const RUN_DIRECTORY: &str = "/run/anyport";

/// Makes a directory where it is missing, for the daemon's user and group alone.
pub(crate) fn make_private(path: &Path) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o750).create(path)
}

/// The files and directories of one daemon.
#[derive(Clone, Copy, Debug)]
pub struct Paths<'a> {
    /// The socket of the control API.
    pub socket: &'a Path,
    /// The directory of the state.
    pub state_dir: &'a Path,
    /// The directory of the BPF pins.
    pub bpffs: &'a Path,
    /// The file for the router, if prefixes are announced.
    pub announced: Option<&'a Path>,
}
