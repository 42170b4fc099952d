//! The users and groups that may register sockets for a service.

use std::fmt;

use nix::unistd::{Group, User};

use crate::{as_text::as_text, rules::InvalidText};

/// Who may register sockets for a service: `user:NAME`, `user:UID`, `group:NAME` or `group:GID`.
///
/// Names are looked up when a process registers a socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Registrant {
    /// A user, by name or number.
    User(String),
    /// The members of a group, by name or number.
    Group(String),
}

impl Registrant {
    /// Whether a process of this user, with these groups, is meant.
    pub fn is_meant(&self, uid: u32, groups: &[u32]) -> bool {
        match self {
            Self::User(name) => name.parse().ok().or_else(|| user(name)) == Some(uid),
            Self::Group(name) => name.parse().ok().or_else(|| group(name)).is_some_and(|gid| groups.contains(&gid)),
        }
    }

    /// Whether no user or group has this name now. Numbers need none.
    pub fn is_unknown(&self) -> bool {
        match self {
            Self::User(name) => name.parse::<u32>().is_err() && matches!(User::from_name(name), Ok(None)),
            Self::Group(name) => name.parse::<u32>().is_err() && matches!(Group::from_name(name), Ok(None)),
        }
    }
}

fn user(name: &str) -> Option<u32> {
    Some(User::from_name(name).ok()??.uid.as_raw())
}

fn group(name: &str) -> Option<u32> {
    Some(Group::from_name(name).ok()??.gid.as_raw())
}

impl std::str::FromStr for Registrant {
    type Err = InvalidText;

    fn from_str(text: &str) -> Result<Self, InvalidText> {
        match text.split_once(':') {
            Some(("user", name)) if !name.is_empty() => Ok(Self::User(name.to_owned())),
            Some(("group", name)) if !name.is_empty() => Ok(Self::Group(name.to_owned())),
            _ => Err(InvalidText(format!("{text:?} is no owner; user:NAME, user:UID, group:NAME and group:GID are"))),
        }
    }
}

as_text!(Registrant, such as "user:root");

impl fmt::Display for Registrant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::User(name) => write!(f, "user:{name}"),
            Self::Group(name) => write!(f, "group:{name}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Registrant;
    use crate::as_text::expect_same_json;

    #[test]
    fn users_and_groups_go_by_name_or_number() {
        let is_meant = |text: &str, uid, groups: &[u32]| text.parse::<Registrant>().unwrap().is_meant(uid, groups);
        assert!(is_meant("user:root", 0, &[]) && !is_meant("user:root", 1, &[0]));
        assert!(is_meant("user:1234", 1234, &[]) && !is_meant("user:1234", 123, &[1234]));
        assert!(is_meant("group:root", 1, &[5, 0]) && !is_meant("group:root", 0, &[5]));
        assert!(is_meant("group:77", 1, &[77]) && !is_meant("group:77", 77, &[]));
        assert!(!is_meant("user:nobody-of-this-name", u32::MAX, &[]));
        for text in ["root", "user:", "uid:0", ""] {
            assert!(text.parse::<Registrant>().unwrap_err().to_string().contains("user:NAME"));
        }
        let is_unknown = |text: &str| text.parse::<Registrant>().unwrap().is_unknown();
        assert!(is_unknown("user:nobody-of-this-name") && is_unknown("group:nobody-of-this-name"));
        assert!(!["user:root", "group:root", "user:4711"].into_iter().any(is_unknown));
        expect_same_json::<Registrant>(&["user:www-data", "user:33", "group:web", "group:77"]);
    }
}
