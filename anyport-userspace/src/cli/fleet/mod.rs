//! `anyportctl fleet`: what the machines of a fleet are to have, and what they make of it.

mod bar;
mod change;
mod examples;
mod history;
mod metrics;
mod nodes;
mod publish;
mod rollout;

use std::{
    fs,
    io::ErrorKind,
    path::{Path, PathBuf},
    time::Duration,
};

use clap::Subcommand;
use serde::Deserialize;

use super::{GLOBAL, Output};
use crate::{
    api::{Problem, ProblemKind},
    config::DEFAULT_FILE,
    fleet::{etcd::Etcd, settings::ConnectionSettings},
    text::from_toml,
};

/// Publishes rule sets to many machines through etcd, and shows what they make of them.
///
/// Nodes belong to rings, such as canary and main. Each ring has one set at a time. How to reach etcd is said by these options, or by
/// the table [fleet] of the configuration file.
#[expect(rustdoc::broken_intra_doc_links, reason = "it is the text of --help, in which brackets are no links")]
#[derive(Debug, clap::Args)]
pub(super) struct Fleet {
    #[command(flatten)]
    connection: ConnectionSettings,
    /// Configuration file with the table [fleet] [default: /etc/anyport/anyport.toml, which may be absent]
    #[arg(long, global = true, env = "ANYPORT_CONFIG", value_name = "FILE", help_heading = GLOBAL)]
    config: Option<PathBuf>,
    /// How long to wait for etcd
    #[arg(long, global = true, value_name = "TIME", value_parser = crate::human_duration::parse, default_value = "10s", help_heading = GLOBAL)]
    timeout: Duration,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Give a ring the rules of a file
    #[command(after_help = examples::PUBLISH)]
    Publish(publish::Publish),
    /// Give a ring the set that another one has
    #[command(after_help = examples::PROMOTE)]
    Promote(publish::Promote),
    /// Give a ring a set that it had before
    #[command(after_help = examples::ROLLBACK)]
    Rollback(publish::Rollback),
    /// Give several rings a set, one after the other, for as long as their nodes stay well
    #[command(after_help = examples::ROLLOUT)]
    Rollout(rollout::Rollout),
    /// Show what each node has, and which are behind, refuse or are missing
    #[command(after_help = examples::FLEET_STATUS)]
    Status(nodes::Status),
    /// Show what a ring had over time
    #[command(after_help = examples::HISTORY)]
    History(history::History),
    /// Do not miss nodes any more that are gone for good
    #[command(after_help = examples::FORGET)]
    Forget(nodes::Forget),
    /// Remove a ring that has no nodes any more
    #[command(after_help = examples::REMOVE)]
    Remove(nodes::Remove),
}

impl Fleet {
    pub(super) async fn run(self, out: &mut Output<'_>) -> Result<(), Problem> {
        let Self { connection, config, timeout, verb } = self;
        let settings = connection.or(of_file(config.as_deref())?);
        let connect = async || Etcd::connect(&settings.read()?, timeout).await;
        match verb {
            // What is wrong with a file is told before anybody is asked.
            Verb::Publish(publish) => publish.run(connect, out).await,
            Verb::Promote(promote) => promote.run(&connect().await?, out).await,
            Verb::Rollback(rollback) => rollback.run(&connect().await?, out).await,
            Verb::Rollout(rollout) => rollout.run(connect, out).await,
            Verb::Status(status) => status.run(&connect().await?, out).await,
            Verb::History(history) => history.run(&connect().await?, out).await,
            Verb::Forget(forget) => forget.run(&connect().await?, out).await,
            Verb::Remove(remove) => remove.run(&connect().await?, out).await,
        }
    }
}

/// The table `[fleet]` of the configuration file.
fn of_file(file: Option<&Path>) -> Result<ConnectionSettings, Problem> {
    #[derive(Default, Deserialize)]
    #[serde(default)]
    struct File {
        fleet: ConnectionSettings,
    }
    let path = file.unwrap_or(Path::new(DEFAULT_FILE));
    let invalid =
        |why: String| Problem::new(ProblemKind::Invalid, format!("read the configuration {}: {why}", path.display()));
    let text = match fs::read_to_string(path) {
        Ok(text) => text,
        // Who may not read it has to use the options, and is told so if there are too few.
        Err(error) if file.is_none() && matches!(error.kind(), ErrorKind::NotFound | ErrorKind::PermissionDenied) => {
            return Ok(ConnectionSettings::default());
        }
        Err(error) => return Err(invalid(error.to_string())),
    };
    let File { fleet } = from_toml(&text).map_err(invalid)?;
    Ok(fleet)
}
