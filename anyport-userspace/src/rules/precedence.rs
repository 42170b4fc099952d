//! Which of several rules that match a packet decides.

use std::cmp::Reverse;

use super::{Rule, RuleSpec};

impl Rule {
    /// Sorts rules so that the first one that matches a packet decides: longer prefixes first,
    /// and within a prefix as [`RuleSpec::precedence`] says.
    pub fn precedence(&self) -> impl Ord + use<'_> {
        (self.prefix, self.terms.precedence())
    }
}

impl RuleSpec {
    /// Sorts the rules of a prefix so that the first one that matches a packet decides: those with fewer ports first, and among
    /// them those with a longer source. What follows only makes the order total, so that it never depends on which one came first.
    pub fn precedence(&self) -> impl Ord + use<'_> {
        // Where nothing is excepted, which is the rule, no set has to be made to count it.
        let ports = if self.except.is_empty() { self.ports.count() } else { self.matched_ports().count() };
        (ports, Reverse(self.source_len()), self.protocol, &self.ports, &self.except, self.source, &self.service)
    }

    /// How specific the source is: -1 without one.
    pub(super) fn source_len(&self) -> i16 {
        self.source.map_or(-1, |it| i16::from(it.len()))
    }
}
