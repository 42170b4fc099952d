//! The command line of the daemon.

use std::path::PathBuf;

use clap::Parser;

use super::Settings;
use crate::usage::When;

/// Lets one socket answer for every address and every port of whole prefixes.
///
/// Without any configuration it starts, steers nothing, and says what to type next. Each option may also stand
/// under [daemon] in the configuration file, by its long name.
#[expect(rustdoc::broken_intra_doc_links, reason = "it is the text of --help, in which brackets are no links")]
#[derive(Debug, Parser)]
#[command(
    name = "anyportd",
    version,
    after_help = "Exit status: 0 ended by SIGTERM or SIGINT; 1 failed; 2 wrong usage or configuration."
)]
pub struct Options {
    /// Configuration file [default: /etc/anyport/anyport.toml, which may be absent]
    #[arg(long, env = "ANYPORT_CONFIG", value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Only say whether options and configuration are right; needs no privileges, and touches nothing
    #[arg(long)]
    pub check: bool,
    /// Take over from the anyportd that runs, without losing a connection: what serves from then on is this program, with the options of
    /// that one
    #[arg(long, conflicts_with = "check")]
    pub takeover: bool,
    /// Withdraw everything that is announced, where no anyportd is there to do it. The unit runs this after a stop; it does nothing where
    /// systemd says that the service ended well
    #[arg(long, conflicts_with_all = ["check", "takeover"])]
    pub withdraw: bool,
    /// Whether the log is in colours
    #[arg(long, value_enum, value_name = "WHEN", default_value_t)]
    pub color: When,
    /// What may stand in the file, too.
    #[command(flatten)]
    pub settings: Settings,
}
