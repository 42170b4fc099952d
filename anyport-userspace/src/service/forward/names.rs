//! Upstreams that are names.

use std::{collections::BTreeMap, net::IpAddr, sync::Arc};

use super::{
    config::{Host, UpstreamAddress},
    upstream::Upstream,
};

/// Names and what they were resolved to last.
#[derive(Debug, Default)]
pub(super) struct Names(BTreeMap<String, Answer>);

#[derive(Debug, Default)]
struct Answer {
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
        Self(names.collect())
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &String> {
        self.0.keys()
    }

    /// Takes an answer into account; whether it differs from the previous one. After a failure the addresses stay.
    pub(super) fn answered(&mut self, name: &str, answer: Result<Vec<IpAddr>, String>) -> bool {
        let Some(known) = self.0.get_mut(name) else { return false };
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
        self.0.iter().filter_map(complaint).collect()
    }
}

/// The upstreams, each address and port once; those that were there `before` are the same ones.
pub(super) fn upstreams(configured: &[UpstreamAddress], names: &Names, before: &[Arc<Upstream>]) -> Vec<Arc<Upstream>> {
    let mut upstreams: Vec<Arc<Upstream>> = Vec::new();
    for UpstreamAddress { host, port } in configured {
        let (addresses, name) = match host {
            Host::Address(address) => (std::slice::from_ref(address), None),
            Host::Name(name) => (names.0.get(name).map_or(&[][..], |answer| &answer.addresses), Some(name)),
        };
        for address in addresses {
            let is_it = |it: &&Arc<Upstream>| it.address == *address && it.port == *port;
            if !upstreams.iter().any(|it| is_it(&it)) {
                let known = before.iter().find(is_it).cloned();
                upstreams.push(known.unwrap_or_else(|| Arc::new(Upstream::new(*address, *port, name.cloned()))));
            }
        }
    }
    upstreams
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::{Names, upstreams};

    #[test]
    fn upstreams_stay_while_their_address_does() {
        let configured = ["198.51.100.1:80", "a.example:80", "b.example:*"].map(|it| it.parse().unwrap());
        let mut names = Names::of(&configured);
        let shown = |all: &[Arc<_>]| all.iter().map(ToString::to_string).collect::<Vec<_>>();
        let first = upstreams(&configured, &names, &[]);
        assert_eq!(shown(&first), ["198.51.100.1:80"]);
        let answer = |last: &[u8]| Ok(last.iter().map(|last| [198, 51, 100, *last].into()).collect());
        assert!(names.answered("a.example", answer(&[3, 2, 1, 2])));
        assert!(!names.answered("a.example", answer(&[1, 2, 3])));
        assert!(names.answered("b.example", answer(&[1])));
        let second = upstreams(&configured, &names, &first);
        assert_eq!(shown(&second), ["198.51.100.1:80", "198.51.100.2:80", "198.51.100.3:80", "198.51.100.1:*"]);
        assert!(Arc::ptr_eq(&first[0], &second[0]));

        assert!(!names.answered("a.example", Err("no such name".to_owned())));
        assert_eq!(upstreams(&configured, &names, &second).len(), 4);
        let complaint = "the name a.example does not resolve, its last 3 addresses stay in use: no such name";
        assert_eq!(names.complaints(), [complaint]);
        assert!(names.answered("a.example", answer(&[3])));
        let third = upstreams(&configured, &names, &second);
        assert_eq!(shown(&third), ["198.51.100.1:80", "198.51.100.3:80", "198.51.100.1:*"]);
        assert!(Arc::ptr_eq(&second[2], &third[1]) && names.complaints().is_empty());
    }
}
