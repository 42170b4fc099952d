//! Kernel parameters.

use std::{
    fmt, fs, io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

/// The name of a kernel parameter: its path below `/proc/sys`, since names of interfaces may hold dots.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Sysctl(String);

/// Only parameters of the network are ever changed, whatever a file says.
impl TryFrom<String> for Sysctl {
    type Error = String;

    fn try_from(path: String) -> Result<Self, String> {
        let is_below = path.starts_with("net/") && path.split('/').all(|part| !matches!(part, "" | "." | ".."));
        if is_below { Ok(Self(path)) } else { Err(format!("{path} is no parameter of the network")) }
    }
}

impl From<Sysctl> for String {
    fn from(sysctl: Sysctl) -> Self {
        sysctl.0
    }
}

impl Sysctl {
    /// The parameter at this path, such as `net/core/somaxconn`.
    pub fn new(path: impl Into<String>) -> Self {
        Self(path.into())
    }

    /// A parameter of IPv4 that each interface has; the interface `all` is a kind of its own.
    pub fn of_interface(interface: &str, name: &str) -> Self {
        Self(format!("net/ipv4/conf/{interface}/{name}"))
    }

    /// Its value, with `proc` in the place of `/proc`; nothing if the kernel does not have it.
    ///
    /// # Errors
    /// The file can't be read.
    pub fn read(&self, proc: &Path) -> io::Result<Option<String>> {
        match fs::read_to_string(self.file(proc)) {
            Ok(value) => Ok(Some(value.trim_end().to_owned())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Sets its value.
    ///
    /// # Errors
    /// The kernel's error.
    pub fn write(&self, value: &str) -> io::Result<()> {
        fs::write(self.file(Path::new("/proc")), value)
    }

    fn file(&self, proc: &Path) -> PathBuf {
        proc.join("sys").join(&self.0)
    }
}

/// As sysctl(8) takes it.
impl fmt::Display for Sysctl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.contains('.') { f.write_str(&self.0) } else { f.write_str(&self.0.replace('/', ".")) }
    }
}

#[cfg(test)]
mod tests {
    use super::Sysctl;

    #[test]
    fn dots_in_names_of_interfaces_are_kept() {
        assert_eq!(Sysctl::new("net/core/somaxconn").to_string(), "net.core.somaxconn");
        let vlan = Sysctl::of_interface("eth0.100", "rp_filter");
        assert_eq!(vlan.to_string(), "net/ipv4/conf/eth0.100/rp_filter");
    }

    #[test]
    fn files_name_parameters_of_the_network_only() {
        for (path, is_taken) in [
            ("net/core/somaxconn", true),
            ("kernel/core_pattern", false),
            ("net/../kernel/core_pattern", false),
            ("net//", false),
        ] {
            let read: Result<Sysctl, _> = serde_json::from_value(path.into());
            assert_eq!(read.is_ok(), is_taken, "{path}");
        }
    }
}
