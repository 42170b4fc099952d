//! `[daemon]` of the configuration file, whose settings may also come from the command line and the environment.

use std::{
    net::SocketAddr,
    num::{NonZeroU32, NonZeroUsize},
    path::PathBuf,
    thread,
    time::Duration,
};

use anyport_common::maps::MAX_RULES;

use super::{
    declare::{at_most, defaults, overlay, table},
    values::{LogFormat, LogLevel, Winner},
};
use crate::{
    api::Readers,
    back_end::Choice,
    human_duration::HumanDuration,
    paths::{DEFAULT_SOCKET, DEFAULT_STATE_DIR},
    privileges::User,
    service::Limits,
};

/// Far more than any machine has use for, and far less than makes the kernel's groups slow.
const MAX_WORKERS: usize = 1024;
/// Long enough for most that a person waits for; who keeps connections for days has to say so.
const DEFAULT_DRAIN_TIMEOUT: Duration = Duration::from_mins(10);
/// Half of what the kernel's maps can number: while rules are replaced, both sets are numbered.
const DEFAULT_MAX_RULES: usize = MAX_RULES as usize / 2;

/// What is made of the declaration below.
macro_rules! daemon {
    ($settings:tt) => {
        table! {
            /// `[daemon]` with all defaults filled in.
            #[derive(Clone, Debug)]
            pub struct DaemonConfig ("", "nothing") $settings
        }
        defaults! { DaemonConfig $settings }
        overlay! {
            /// The options, as the command line, the environment and `[daemon]` in the file give them.
            pub struct Settings of DaemonConfig $settings
        }
    };
}

daemon! {{
    /// Unix socket for anyportctl
    socket: PathBuf {
        value: "PATH",
        default: DEFAULT_SOCKET.into(),
        changes_by: Restart,
        sample: r#""/run/anyport/anyportd.sock""#,
    }

    /// Where rules and services that were added by hand are kept
    state_dir: PathBuf {
        value: "DIR",
        default: DEFAULT_STATE_DIR.into(),
        changes_by: Restart,
        sample: r#""/var/lib/anyport""#,
    }

    /// User to become when started by root: a name, or UID:GID
    user: User as Option<User> {
        value: "USER",
        default: None,
        in_words: "anyport if there is such a user, else root",
        empty: "by default",
        changes_by: Restart,
        sample: r#""anyport""#,
        see: "[Security](security.md)",
    }

    /// Who may look, beside those who may change: a group, or all
    readers: Readers as Option<Readers> {
        value: "GROUP",
        default: None,
        empty: "nobody",
        changes_by: Restart,
        sample: r#""all""#,
    }

    /// Where BPF maps and links are pinned; a BPF file system is mounted where there is none
    bpffs: PathBuf {
        value: "DIR",
        default: "/sys/fs/bpf/anyport".into(),
        changes_by: Restart,
        sample: r#""/sys/fs/bpf/anyport""#,
    }

    /// How packets reach the sockets
    steering: Choice {
        value: "BACK-END",
        default: Choice::Auto,
        changes_by: Restart,
        sample: r#""auto""#,
    }

    /// Interface that tc watches; may be repeated
    interface: Vec<String> {
        value: "NAME",
        default: Vec::new(),
        in_words: "every interface that is up, also later",
        empty: "all",
        changes_by: Restart,
        sample: r#"["eth0"]"#,
        arg: [value_delimiter = ','],
    }

    /// Listening sockets for each service, transport and family
    workers: NonZeroUsize {
        value: "N",
        default: thread::available_parallelism().unwrap_or(NonZeroUsize::MIN),
        in_words: "number of CPUs",
        changes_by: Restart,
        check: |it| at_most(it.get(), MAX_WORKERS),
        sample: "2",
    }

    /// Most connections and flows of datagrams at a time
    max_connections: NonZeroU32 as Option<NonZeroU32> {
        value: "N",
        default: None,
        in_words: "what the limit of open files allows",
        empty: "none",
        changes_by: Restart,
        sample: "100000",
        see: "[Limits](#limits)",
    }

    /// Most of them for one source, an IPv4 address or a /64 of IPv6
    max_connections_per_source: NonZeroU32 as Option<NonZeroU32> {
        value: "N",
        default: None,
        in_words: "four for each that is free",
        empty: "none",
        changes_by: Restart,
        sample: "1000",
        see: "[Limits](#limits)",
    }

    /// Most rules at a time; the programs can't number more
    max_rules: usize {
        value: "N",
        default: DEFAULT_MAX_RULES,
        changes_by: Reload,
        check: |it| at_most(*it, DEFAULT_MAX_RULES),
        sample: "1048576",
    }

    /// How long connections may go on after a restart or an upgrade has replaced the process that serves them
    drain_timeout: HumanDuration as Duration {
        value: "TIME",
        default: DEFAULT_DRAIN_TIMEOUT,
        changes_by: Reload,
        sample: r#""10m""#,
    }

    /// Leaves steering in the kernel at the end, where the next start takes it over: packets are refused meanwhile, rather than
    /// left to the host
    keep: bool {
        value: "BOOL",
        default: false,
        changes_by: Reload,
        sample: "false",
        arg: [num_args = 0..=1, default_missing_value = "true"],
    }

    /// Where metrics, health and a page about all of it are served over HTTP, to everybody who can connect
    metrics: SocketAddr as Option<SocketAddr> {
        value: "ADDR:PORT",
        default: None,
        empty: "nowhere",
        changes_by: Restart,
        sample: r#""127.0.0.1:9464""#,
        see: "[Watching](metrics.md#watching)",
    }

    /// Whether to put back what others remove from the kernel, and not only to say so
    mend: bool {
        value: "BOOL",
        default: true,
        changes_by: Reload,
        sample: "true",
        see: "[When others change things](operations.md#when-others-change-things)",
        arg: [num_args = 0..=1, default_missing_value = "true"],
    }

    /// Who gets packets to addresses of the host's interfaces that lie inside of a steered prefix, also those that come later:
    /// the rule, or the host, whose addresses then have rules of their own
    own_addresses: Winner {
        value: "WINNER",
        default: Winner::Rule,
        changes_by: Reload,
        sample: r#""rule""#,
        see: "[What comes later](real-hosts.md#what-comes-later)",
    }

    /// How much to log; from debug on, the BPF programs log too
    log_level: LogLevel {
        value: "LEVEL",
        default: LogLevel::Info,
        changes_by: Reload,
        sample: r#""info""#,
    }

    /// How to log
    log_format: LogFormat {
        value: "FORMAT",
        default: LogFormat::Text,
        changes_by: Restart,
        sample: r#""text""#,
    }
}}

impl DaemonConfig {
    /// The limits that hold for all services together.
    pub fn limits(&self) -> Limits {
        let &Self { max_connections, max_connections_per_source, .. } = self;
        Limits { max_connections, max_connections_per_source, accept_rate_per_source: None }
    }
}
