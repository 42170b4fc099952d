//! What a configuration names and this host lacks.

use std::{ffi::CString, io::ErrorKind, net::UdpSocket};

use nix::{net::if_::if_nametoindex, unistd::Group};

use super::Config;
use crate::api::Readers;

impl Config {
    /// What is named and nobody has: an error where a person is there to see it, and no reason for a server not to go on.
    pub fn unknown(&self) -> Vec<String> {
        let mut unknown = Vec::new();
        if let Some(Readers::Group(name)) = &self.readers
            && matches!(Group::from_name(name), Ok(None))
        {
            unknown.push(format!("readers = {name}: there is no such group; `groupadd --system {name}` makes one"));
        }
        if let Some(metrics) = self.metrics.filter(|it| !it.ip().is_loopback())
            // Another port: only the address is in question.
            && UdpSocket::bind((metrics.ip(), 0)).is_err_and(|error| error.kind() == ErrorKind::AddrNotAvailable)
        {
            unknown.push(format!(
                "metrics = {metrics}: this host has no such address; ip address lists those that it has"
            ));
        }
        unknown.extend(self.services.iter().filter_map(|it| it.expect_owners().err()).map(|error| error.to_string()));
        unknown
    }

    /// What is named and is not there now; it may come later.
    pub fn absent(&self) -> Vec<String> {
        let is_missing =
            |name: &&String| CString::new(name.as_str()).map_or(true, |name| if_nametoindex(name.as_c_str()).is_err());
        let interfaces = self.interface.iter().filter(is_missing);
        interfaces.map(|name| format!("interface = {name}: there is no such interface now")).collect()
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use crate::config::{Config, Options};

    #[test]
    fn what_is_not_there_is_named() {
        let told = |options: &[&str], owner: &str| {
            let options = Options::parse_from(["anyportd"].iter().chain(options));
            let file = tempfile::NamedTempFile::new().unwrap();
            let text = format!("[[service]]\nname = \"app\"\nhandler = \"registered\"\nowners = [\"{owner}\"]\n");
            std::fs::write(file.path(), text).unwrap();
            let config = Config::new(options.settings, Some(file.path())).unwrap();
            (config.unknown(), config.absent())
        };
        let nothing = (Vec::new(), Vec::new());
        let known = ["--readers", "root", "--interface", "lo", "--metrics", "127.0.0.1:9464"];
        assert_eq!(told(&known, "user:root"), nothing);
        assert_eq!(told(&["--readers", "all", "--metrics", "[::]:9464"], "group:4711"), nothing);
        let options = ["--readers", "no-such-group", "--interface", "lo,no-such0", "--metrics", "192.0.2.77:9464"];
        let (unknown, absent) = told(&options, "user:nobody-of-this-name");
        assert!(unknown[0].starts_with("readers = no-such-group:"), "{unknown:?}");
        assert!(unknown[1].starts_with("metrics = 192.0.2.77:9464: this host has no such address"), "{unknown:?}");
        assert!(unknown[2].starts_with("service app: there is no user:nobody-of-this-name"), "{unknown:?}");
        assert!(absent.len() == 1 && absent[0].starts_with("interface = no-such0:"), "{absent:?}");
    }
}
