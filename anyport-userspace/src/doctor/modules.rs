//! Which modules a kernel has, as far as its files tell.

use std::{collections::HashSet, fs, path::Path};

/// The names of modules that are loaded, built in, or can be loaded.
#[derive(Clone, Debug)]
pub(super) struct Modules(HashSet<String>);

impl Modules {
    /// Those of a release of the kernel; nothing where its index can't be read, such as in most containers.
    pub(super) fn read(proc: &Path, directory: &Path, release: &str) -> Option<Self> {
        let index = |file: &str| fs::read_to_string(directory.join(release).join(file)).ok();
        // Lines such as `kernel/net/netfilter/xt_TPROXY.ko.xz: kernel/…`; those of modules.dep name what the module needs.
        let all = [index("modules.dep")?, index("modules.builtin")?].concat();
        let file_of = |line: &str| -> Option<String> {
            let name = line.split(':').next()?.rsplit('/').next()?.split(".ko").next()?;
            // The kernel's own names have no hyphens.
            Some(name.replace('-', "_"))
        };
        let mut names: HashSet<String> = all.lines().filter_map(file_of).collect();
        let loaded = fs::read_to_string(proc.join("modules")).unwrap_or_default();
        names.extend(loaded.lines().filter_map(|line| line.split(' ').next().map(ToOwned::to_owned)));
        Some(Self(names))
    }

    /// Those of these that there are not.
    pub(super) fn missing<'a>(&self, names: &[&'a str]) -> Vec<&'a str> {
        names.iter().copied().filter(|name| !self.0.contains(*name)).collect()
    }
}
