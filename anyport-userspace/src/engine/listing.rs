//! The list of rules as JSON, piece by piece, so that no long list is ever whole in memory.

use std::{collections::HashMap, sync::Arc};

use anyhow::Context as _;
use anyport_common::maps::Counters;

use super::snapshot::{Reader, Snapshot};
use crate::{
    api::{ListPrefixes, PrefixView, Problem},
    rules::{Prefix, PrefixRules, RuleRef, RuleSpec},
};

/// Bytes of a piece, after which it ends.
const PIECE: usize = 64 << 10;
/// Rules that are looked at for a piece, listed or not, so that none takes long.
const LOOKS: usize = 4096;

/// Rules in order of precedence, with what became of their packets: an array of [`PrefixView`], in pieces. All of them are about
/// the rules of one moment.
#[derive(Debug)]
pub struct Listing {
    snapshot: Arc<Snapshot>,
    query: ListPrefixes,
    /// The last prefix that was looked at to its end, and how many rules of the next one were looked at.
    after: Option<Prefix>,
    of_next: usize,
    /// How many rules are listed at most from here on.
    left: usize,
    state: State,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Begin,
    /// Whether a rule was listed.
    Within(bool),
    End,
}

/// A piece in the making.
#[derive(Default)]
struct Piece<'a> {
    json: Vec<u8>,
    looks: usize,
    /// Many rules say the same, which becomes text once.
    texts: HashMap<*const RuleSpec, [String; 2]>,
    counters: Option<Reader<'a>>,
}

impl Listing {
    /// Of the rules that are asked for.
    pub fn new(snapshot: Arc<Snapshot>, query: ListPrefixes) -> Self {
        let (after, left) = (query.after, query.limit.unwrap_or(usize::MAX));
        Self { snapshot, query, after, of_next: 0, left, state: State::Begin }
    }

    /// Whether all of it was read.
    pub fn is_over(&self) -> bool {
        self.state == State::End
    }

    /// The next piece, which may be empty where few rules are asked for; nothing behind the last one.
    ///
    /// # Errors
    /// The JSON can't be written.
    pub fn piece(&mut self) -> Result<Option<Vec<u8>>, Problem> {
        if self.is_over() {
            return Ok(None);
        }
        let snapshot = Arc::clone(&self.snapshot);
        let mut piece = Piece { counters: Some(snapshot.counts.reader()), ..Piece::default() };
        if self.state == State::Begin {
            piece.json.push(b'[');
            self.state = State::Within(false);
        }
        if self.fill(&snapshot, &mut piece)? {
            piece.json.push(b']');
            self.state = State::End;
        }
        Ok(Some(piece.json))
    }

    /// Returns whether nothing is left.
    fn fill<'a>(&mut self, snapshot: &'a Snapshot, piece: &mut Piece<'a>) -> Result<bool, Problem> {
        let rules = &snapshot.rules;
        let prefixes: Box<dyn Iterator<Item = (Prefix, &PrefixRules)>> = match self.query.within {
            Some(within) => Box::new(rules.within_after(within, self.after)),
            None => Box::new(rules.after(self.after)),
        };
        for (prefix, rules) in prefixes {
            for rule in rules.numbered(prefix).skip(self.of_next) {
                if self.left == 0 {
                    return Ok(true);
                }
                if piece.json.len() >= PIECE || piece.looks >= LOOKS {
                    return Ok(false);
                }
                piece.looks += 1;
                self.of_next += 1;
                if self.includes(&rule) {
                    self.left -= 1;
                    if self.state == State::Within(true) {
                        piece.json.push(b',');
                    }
                    self.state = State::Within(true);
                    piece.write(snapshot, &rule)?;
                }
            }
            (self.after, self.of_next) = (Some(prefix), 0);
        }
        Ok(true)
    }

    fn includes(&self, rule: &RuleRef<'_>) -> bool {
        let ListPrefixes { service, port, .. } = &self.query;
        service.as_ref().is_none_or(|it| rule.terms.service == *it)
            && port.is_none_or(|it| rule.terms.ports.contains(it.get()) || rule.terms.except.contains(it.get()))
    }
}

impl Piece<'_> {
    fn write(&mut self, snapshot: &Snapshot, rule: &RuleRef<'_>) -> Result<(), Problem> {
        let RuleSpec { protocol, ports, except, source, service, route } = &**rule.terms;
        let text = || [ports.to_string(), except.to_string()];
        let [ports, except] = self.texts.entry(Arc::as_ptr(rule.terms)).or_insert_with(text);
        let Counters { steered, no_socket, assign_error, denied } =
            self.counters.as_ref().map(|counters| counters(rule)).unwrap_or_default();
        let (prefix, source) = (rule.prefix.to_string(), source.map(|it| it.to_string()));
        let view = PrefixView {
            prefix: &prefix,
            protocol: *protocol,
            ports,
            except,
            source: source.as_deref(),
            service: service.as_str(),
            route: *route,
            origin: rule.origins.first(),
            steered,
            dropped: no_socket + assign_error + denied,
            no_socket,
            denied,
            drained: snapshot.drains.include(&rule.prefix, rule.terms),
        };
        Ok(serde_json::to_writer(&mut self.json, &view).context("write the rules as JSON")?)
    }
}
