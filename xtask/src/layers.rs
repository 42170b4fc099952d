//! The layers of the daemon's modules: a module imports only those that come before it in the list of its parent, so
//! that there is no circle.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};
use proc_macro2::{Delimiter, TokenStream, TokenTree};

const SOURCES: &str = "anyport-userspace/src";

/// The modules of a parent, the lowest first.
struct Layers {
    /// Its path from the crate's root.
    parent: &'static [&'static str],
    /// The modules; those of a line know nothing of each other, either.
    order: &'static [&'static str],
}

const LAYERS: &[Layers] = &[
    Layers {
        parent: &[],
        order: &[
            "as_text",
            "back_end",
            "complaint",
            "journal",
            "log_limit",
            "paths",
            "plain_words",
            "problem",
            "rules",
            "scm_rights",
            "socket_file",
            "sys",
            "text",
            "usage",
            "write_timeout",
            // Rules are known from here on.
            "datagram",
            "hops",
            "host",
            "human_duration",
            "privileges",
            "closing",
            "lock",
            "table",
            "events",
            "register",
            "routes",
            // Packets reach sockets.
            "steering",
            "keeper",
            "service",
            // Rules and services are known from here on.
            "rule_file",
            "store",
            "api",
            "fleet",
            "config",
            "announce",
            "logging",
            // What the daemon is put together from.
            "engine",
            "observe",
            "control",
            "daemon",
            // What talks to the daemon.
            "owner",
            "doctor",
            "cli",
        ],
    },
    Layers {
        parent: &["engine"],
        order: &[
            "progress",
            "difference",
            "desired",
            "past",
            "services",
            "kernel",
            "kept",
            "views",
            "observed",
            "explain",
            "decisions",
            "served",
            "dropping",
            "answers",
            "record",
            "safety",
            "reload",
            "change",
            "shadow",
            "register",
            "drain",
            "snapshot",
            "listing",
            "shared",
            "published",
            "apply",
            "fleet",
            "commands",
            "start",
        ],
    },
    Layers {
        parent: &["service"],
        order: &[
            "counts",
            "complaints",
            "conversations",
            "descriptors",
            "histogram",
            "mark",
            "limits",
            "stats",
            "socket_options",
            "witness",
            "sockets",
            "raw",
            "reply",
            "event_loop",
            "registrant",
            "log",
            "handlers",
            "forward",
            "config",
            "tcp",
            "workers",
            "udp",
            "answers",
        ],
    },
];

/// Checks every source file.
pub(crate) fn check(root: &Path) -> Result<()> {
    let sources = root.join(SOURCES);
    let mut wrong = Vec::new();
    for file in files(&sources)? {
        let path = file.strip_prefix(&sources).context("a path below the sources")?;
        let text = fs::read_to_string(&file).with_context(|| format!("read {}", file.display()))?;
        wrong.extend(upward(path, &text)?);
    }
    if wrong.is_empty() {
        return Ok(());
    }
    bail!("modules import what is above them; move what they need down, or themselves up:\n{}", wrong.join("\n"))
}

fn files(directory: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(directory).with_context(|| format!("read {}", directory.display()))? {
        let path = entry?.path();
        if path.is_dir() {
            files.extend(self::files(&path)?);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

/// The imports of a file that point upward, in words.
fn upward(file: &Path, text: &str) -> Result<Vec<String>> {
    let module = module_of(file);
    let parsed = text.parse::<TokenStream>().map_err(|error| anyhow::anyhow!("read {}: {error}", file.display()))?;
    let mut imports = BTreeSet::new();
    collect(parsed, &module, &mut imports);
    let mut wrong = Vec::new();
    for Layers { parent, order } in LAYERS {
        let child = |path: &[String]| -> Option<String> {
            let is_below = path.len() > parent.len() && path.iter().zip(*parent).all(|(one, other)| one == other);
            is_below.then(|| path[parent.len()].clone())
        };
        let Some(own) = child(&module) else { continue };
        let place = |name: &str| order.iter().position(|it| *it == name);
        let Some(own_place) = place(&own) else {
            // The programs, the root itself and what only tests have stand above all.
            if own == "tests" || parent.is_empty() && ["bin", "lib"].contains(&own.as_str()) {
                continue;
            }
            wrong.push(format!("  {}: {own} is in no layer: add it to xtask/src/layers.rs", file.display()));
            continue;
        };
        for import in &imports {
            if child(import).and_then(|it| place(&it)).is_some_and(|it| it > own_place) {
                wrong.push(format!("  {}: crate::{}", file.display(), import.join("::")));
            }
        }
    }
    Ok(wrong)
}

/// Where a file stands: `service/tcp/builtin.rs` is `service::tcp::builtin`.
fn module_of(file: &Path) -> Vec<String> {
    let mut module: Vec<String> = file.with_extension("").iter().map(|it| it.to_string_lossy().into_owned()).collect();
    if module.last().is_some_and(|it| it == "mod") {
        module.pop();
    }
    module
}

/// Adds all paths that begin with `crate`, `super` or `self`, from the crate's root.
fn collect(tokens: TokenStream, module: &[String], imports: &mut BTreeSet<Vec<String>>) {
    let tokens: Vec<TokenTree> = tokens.into_iter().collect();
    let mut at = 0;
    while at < tokens.len() {
        match &tokens[at] {
            TokenTree::Ident(word) if word == "mod" => {
                // An inline module is one step further from the root.
                if let (Some(TokenTree::Ident(name)), Some(TokenTree::Group(body))) =
                    (tokens.get(at + 1), tokens.get(at + 2))
                {
                    let inner: Vec<String> = module.iter().cloned().chain([name.to_string()]).collect();
                    collect(body.stream(), &inner, imports);
                    at += 2;
                }
            }
            TokenTree::Ident(word) if is_path(&tokens, at + 1) && !is_path_end(&tokens, at) => {
                let base = match word.to_string().as_str() {
                    "crate" => Some(Vec::new()),
                    "self" => Some(module.to_vec()),
                    "super" => Some(parent_of(module)),
                    _ => None,
                };
                if let Some(base) = base {
                    follow(&tokens, at + 3, base, imports);
                }
            }
            TokenTree::Group(group) => collect(group.stream(), module, imports),
            _ => {}
        }
        at += 1;
    }
}

/// The rest of a path, after `::`.
fn follow(tokens: &[TokenTree], mut at: usize, mut path: Vec<String>, imports: &mut BTreeSet<Vec<String>>) {
    loop {
        match tokens.get(at) {
            Some(TokenTree::Ident(word)) if word == "super" => path = parent_of(&path),
            Some(TokenTree::Ident(word)) if word == "self" => {}
            Some(TokenTree::Ident(word)) => path.push(word.to_string()),
            Some(TokenTree::Group(group)) if group.delimiter() == Delimiter::Brace => {
                let inner: Vec<TokenTree> = group.stream().into_iter().collect();
                for branch in inner.split(|token| matches!(token, TokenTree::Punct(it) if it.as_char() == ',')) {
                    follow(branch, 0, path.clone(), imports);
                }
                return;
            }
            _ => break,
        }
        if !is_path(tokens, at + 1) {
            break;
        }
        at += 3;
    }
    imports.insert(path);
}

fn parent_of(path: &[String]) -> Vec<String> {
    path.split_last().map(|(_, rest)| rest.to_vec()).unwrap_or_default()
}

fn is_colon(token: Option<&TokenTree>) -> bool {
    matches!(token, Some(TokenTree::Punct(it)) if it.as_char() == ':')
}

/// Whether `::` stands there.
fn is_path(tokens: &[TokenTree], at: usize) -> bool {
    is_colon(tokens.get(at)) && is_colon(tokens.get(at + 1))
}

/// Whether `::` stands before, so that a path goes on.
fn is_path_end(tokens: &[TokenTree], at: usize) -> bool {
    at >= 2 && is_path(tokens, at - 2)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::{check, upward};
    use crate::process;

    fn upward_in(file: &str, text: &str) -> Vec<String> {
        upward(Path::new(file), text).unwrap()
    }

    #[test]
    fn upward_imports_are_found() {
        for (file, text, found) in [
            ("rules/set.rs", "use crate::engine::Engine;", "crate::engine::Engine"),
            ("rules/set.rs", "use crate::{sys, rules::Rule, steering::{bpf::Bpf, Plan}};", "crate::steering::bpf::Bpf"),
            ("rules/set.rs", "use super::super::cli;", "crate::cli"),
            ("rules/mod.rs", "use super::cli::{self};", "crate::cli"),
            ("rules/set.rs", "fn f() { crate::cli::run() }", "crate::cli::run"),
            ("rules/set.rs", "#[cfg(test)] mod tests { use super::super::super::daemon::run; }", "crate::daemon::run"),
            ("service/forward/relay.rs", "use crate::service::{tcp::Acceptor};", "crate::service::tcp::Acceptor"),
            ("service/event_loop/mod.rs", "use super::{forward, tcp};", "crate::service::forward"),
            ("new_room.rs", "", "new_room is in no layer"),
        ] {
            let wrong = upward_in(file, text).join("\n");
            assert!(wrong.contains(found), "{file}: {text}: {wrong}");
        }
    }

    #[test]
    fn other_imports_are_not() {
        for (file, text) in [
            ("engine/start.rs", "use crate::{rules::Rule, service::Service}; use super::Engine; use std::io;"),
            (
                "rules/set.rs",
                "// use crate::engine::Engine;\nconst A: &str = \"crate::engine\"; use super::rule::Rule;",
            ),
            ("lib.rs", "pub use self::owner::tokio;"),
            ("bin/anyportd.rs", "use anyport::daemon;"),
            ("service/mod.rs", "use self::tcp::Acceptor; mod tests { use super::tcp; }"),
        ] {
            assert_eq!(upward_in(file, text), Vec::<String>::new(), "{file}: {text}");
        }
    }

    #[test]
    fn the_daemon_has_no_circle() {
        check(&process::workspace().unwrap()).unwrap();
    }
}
