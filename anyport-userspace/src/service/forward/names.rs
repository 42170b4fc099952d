//! Upstreams that are names.

use std::{collections::BTreeMap, net::IpAddr, sync::Arc};

use super::{
    config::{Host, UpstreamAddress},
    upstream::Upstream,
};

/// So many upstreams that are gone are remembered.
const MOST_GONE: usize = 64;

/// Names and what they were resolved to last.
#[derive(Debug, Default)]
pub(super) struct Names {
    answers: BTreeMap<String, Answer>,
    /// Upstreams that were taken out, or that no name leads to any more, the latest last: one that comes back is as it was,
    /// down where checks failed.
    gone: Vec<Arc<Upstream>>,
}

#[derive(Clone, Debug, Default)]
struct Answer {
    /// Whether it has been asked for.
    was_asked: bool,
    /// Of the last answer that had some.
    addresses: Vec<IpAddr>,
    /// Why the last question brought none.
    failure: Option<String>,
}

impl Names {
    /// The names among these, none of them resolved yet.
    pub(super) fn of(upstreams: &[UpstreamAddress]) -> Self {
        let names = upstreams.iter().filter_map(|upstream| match &upstream.host {
            Host::Name(name) => Some((name.clone(), Answer::default())),
            Host::Address(_) => None,
        });
        Self { answers: names.collect(), gone: Vec::new() }
    }

    /// The names among these for a service that replaces this one, which takes over what is known.
    pub(super) fn succeeded_by(&self, upstreams: &[UpstreamAddress]) -> Self {
        let mut names = Self::of(upstreams);
        for (name, answer) in &mut names.answers {
            if let Some(known) = self.answers.get(name) {
                answer.clone_from(known);
            }
        }
        names.gone.clone_from(&self.gone);
        names
    }

    /// Upstreams that were taken out, or that no name leads to any more.
    pub(super) fn gone(&self) -> impl Iterator<Item = &Arc<Upstream>> {
        self.gone.iter()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.answers.is_empty()
    }

    /// Whether each has been asked for once.
    pub(super) fn are_answered(&self) -> bool {
        self.answers.values().all(|answer| answer.was_asked)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &String> {
        self.answers.keys()
    }

    /// Takes an answer into account; whether it differs from the previous one. After a failure the addresses stay.
    pub(super) fn answered(&mut self, name: &str, answer: Result<Vec<IpAddr>, String>) -> bool {
        let Some(known) = self.answers.get_mut(name) else { return false };
        known.was_asked = true;
        match answer {
            Ok(mut addresses) => {
                known.failure = None;
                addresses.sort_unstable();
                addresses.dedup();
                let is_new = known.addresses != addresses;
                known.addresses = addresses;
                is_new
            }
            Err(why) => {
                known.failure = Some(why);
                false
            }
        }
    }

    /// Which names don't resolve.
    pub(super) fn complaints(&self) -> Vec<String> {
        let complaint = |(name, answer): (&String, &Answer)| {
            let why = answer.failure.as_ref()?;
            let instead = match answer.addresses.len() {
                0 => "it has no addresses yet".to_owned(),
                count => format!("its last {count} addresses stay in use"),
            };
            Some(format!("the name {name} does not resolve, {instead}: {why}"))
        };
        self.answers.iter().filter_map(complaint).collect()
    }

    /// The upstreams, each address and port once; those that were there `before`, or earlier, are the same ones.
    pub(super) fn upstreams(&mut self, configured: &[UpstreamAddress], before: &[Arc<Upstream>]) -> Vec<Arc<Upstream>> {
        let mut upstreams: Vec<Arc<Upstream>> = Vec::new();
        for UpstreamAddress { host, port } in configured {
            let (addresses, name) = match host {
                Host::Address(address) => (std::slice::from_ref(address), None),
                Host::Name(name) => (self.answers.get(name).map_or(&[][..], |answer| &answer.addresses), Some(name)),
            };
            for address in addresses {
                let is_it = |it: &&Arc<Upstream>| it.address == *address && it.port == *port;
                if !upstreams.iter().any(|it| is_it(&it)) {
                    let known =
                        before.iter().chain(&self.gone).find(|it| is_it(it) && it.name.as_ref() == name).cloned();
                    upstreams.push(known.unwrap_or_else(|| Arc::new(Upstream::new(*address, *port, name.cloned()))));
                }
            }
        }
        let is_here = |it: &Arc<Upstream>| upstreams.iter().any(|here| Arc::ptr_eq(here, it));
        self.gone.retain(|it| !is_here(it));
        self.gone.extend(before.iter().filter(|it| !is_here(it)).cloned());
        let too_many = self.gone.len().saturating_sub(MOST_GONE);
        self.gone.drain(..too_many);
        upstreams
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::{MOST_GONE, Names};

    #[test]
    fn upstreams_stay_while_their_address_does() {
        let configured = ["198.51.100.1:80", "a.example:80", "b.example:*"].map(|it| it.parse().unwrap());
        let mut names = Names::of(&configured);
        let shown = |all: &[Arc<_>]| all.iter().map(ToString::to_string).collect::<Vec<_>>();
        let first = names.upstreams(&configured, &[]);
        assert_eq!(shown(&first), ["198.51.100.1:80"]);
        let answer = |last: &[u8]| Ok(last.iter().map(|last| [198, 51, 100, *last].into()).collect());
        assert!(names.answered("a.example", answer(&[3, 2, 1, 2])));
        assert!(!names.answered("a.example", answer(&[1, 2, 3])));
        assert!(names.answered("b.example", answer(&[1])));
        let second = names.upstreams(&configured, &first);
        assert_eq!(shown(&second), ["198.51.100.1:80", "198.51.100.2:80", "198.51.100.3:80", "198.51.100.1:*"]);
        assert!(Arc::ptr_eq(&first[0], &second[0]));

        assert!(!names.answered("a.example", Err("no such name".to_owned())));
        assert_eq!(names.upstreams(&configured, &second).len(), 4);
        let complaint = "the name a.example does not resolve, its last 3 addresses stay in use: no such name";
        assert_eq!(names.complaints(), [complaint]);
        assert!(names.answered("a.example", answer(&[3])));
        let third = names.upstreams(&configured, &second);
        assert_eq!(shown(&third), ["198.51.100.1:80", "198.51.100.3:80", "198.51.100.1:*"]);
        assert!(Arc::ptr_eq(&second[2], &third[1]) && names.complaints().is_empty());

        // What comes back is the one that went, with all that is known of it.
        assert!(names.answered("a.example", answer(&[2, 3])));
        let fourth = names.upstreams(&configured, &third);
        assert!(Arc::ptr_eq(&second[1], &fourth[1]) && names.gone.is_empty());
        for last in 0..=u8::MAX {
            names.answered("a.example", answer(&[last]));
            let before = names.upstreams(&configured, &[]);
            names.answered("a.example", answer(&[]));
            names.upstreams(&configured, &before);
        }
        assert_eq!(names.gone.len(), MOST_GONE);
    }

    #[test]
    fn names_are_answered_one_by_one() {
        let mut names = Names::of(&["a.example:80", "b.example:80"].map(|it| it.parse().unwrap()));
        assert!(!names.are_answered());
        names.answered("b.example", Ok(vec![[198, 51, 100, 1].into()]));
        assert!(!names.are_answered());
        names.answered("a.example", Err("no such name".to_owned()));
        assert!(names.are_answered());
    }
}
