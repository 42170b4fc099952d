//! What a configuration names and this host lacks, which a start would not fail for.

use std::ffi::CString;

use nix::{net::if_::if_nametoindex, unistd::Group};

use super::Config;
use crate::api::Readers;

impl Config {
    /// What is named and is not there now; it may come later.
    pub fn absent(&self) -> Vec<String> {
        let mut absent = Vec::new();
        if let Some(Readers::Group(name)) = &self.readers
            && matches!(Group::from_name(name), Ok(None))
        {
            absent.push(format!("readers = {name}: there is no such group, so none but those in control may look"));
        }
        let is_missing =
            |name: &&String| CString::new(name.as_str()).map_or(true, |name| if_nametoindex(name.as_c_str()).is_err());
        let interfaces = self.interface.iter().filter(is_missing);
        absent.extend(interfaces.map(|name| format!("interface = {name}: there is no such interface now")));
        absent
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use crate::config::{Config, Options};

    #[test]
    fn groups_and_interfaces_that_are_not_there_are_named() {
        let absent = |options: &[&str]| {
            let options = Options::parse_from(["anyportd"].iter().chain(options));
            let file = tempfile::NamedTempFile::new().unwrap();
            Config::new(options.settings, Some(file.path())).unwrap().absent()
        };
        assert!(absent(&["--readers", "root", "--interface", "lo"]).is_empty());
        assert!(absent(&["--readers", "all"]).is_empty());
        let told = absent(&["--readers", "no-such-group", "--interface", "lo,no-such0"]);
        assert_eq!(told.len(), 2, "{told:?}");
        assert!(told[0].starts_with("readers = no-such-group:") && told[1].starts_with("interface = no-such0:"));
    }
}
