//! The file that the router reads.

use std::{
    fmt::Write as _,
    fs,
    io::{self, Write as _},
    path::Path,
};

use super::{Announce, Format};
use crate::{rules::Prefix, store::create_new};

const HEAD: &str = "# What this node serves at the moment. anyportd writes this file again whenever that changes.\n";
/// What follows a prefix in BIRD's static routes. Nothing is sent there: local routes come before those of routers.
const BLACKHOLE: &str = " blackhole;";

/// The file that announces these.
pub(super) fn text(announce: &Announce, announced: &[Prefix]) -> String {
    let mut text = HEAD.to_owned();
    match announce.format {
        Format::List => {
            for prefix in announced {
                // Writing to a string does not fail.
                writeln!(text, "{prefix}").ok();
            }
        }
        Format::Bird => {
            for (family, channel, is_ipv4) in [(4, "ipv4", true), (6, "ipv6", false)] {
                write!(text, "protocol static {}{family} {{\n\t{channel};\n", announce.protocol).ok();
                for prefix in announced.iter().filter(|prefix| prefix.is_ipv4() == is_ipv4) {
                    writeln!(text, "\troute {prefix}{BLACKHOLE}").ok();
                }
                text.push_str("}\n");
            }
        }
    }
    text
}

/// What a file announces that was written by [`text`]. Lines that are not understood announce nothing.
pub(super) fn announced(text: &str) -> impl Iterator<Item = Prefix> {
    text.lines().filter_map(|line| {
        let line = line.trim();
        let route = line.strip_prefix("route ").and_then(|it| it.strip_suffix(BLACKHOLE));
        route.unwrap_or(line).parse().ok()
    })
}

/// Replaces the content of the file by this text. Programs that read it see either the previous text or this one, whole.
pub(super) fn replace(path: &Path, text: &str) -> io::Result<()> {
    let mut aside = path.as_os_str().to_owned();
    aside.push(".new");
    let written =
        // Where servers can write, a link or a pipe may have this name, and the keeper writes here too.
        create_new(aside.as_ref()).and_then(|mut file| {
            // The unit's umask would keep the router from reading it.
            file.set_permissions(std::os::unix::fs::PermissionsExt::from_mode(0o644))?;
            file.write_all(text.as_bytes())?;
            fs::rename(&aside, path)
        });
    if written.is_err() {
        fs::remove_file(&aside).ok();
    }
    written
}

#[cfg(test)]
mod tests {
    use super::{Announce, Format, announced, replace, text};
    use crate::rules::Prefix;

    fn in_format(format: Format) -> Announce {
        Announce { format, ..Announce::default() }
    }

    #[test]
    fn what_is_written_is_read_again() {
        let prefixes: Vec<Prefix> =
            ["192.0.2.0/24", "203.0.113.7/32", "2001:db8:a::/48"].map(|it| it.parse().unwrap()).to_vec();
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("announced.conf");
        for format in [Format::Bird, Format::List] {
            replace(&path, &text(&in_format(format), &prefixes)).unwrap();
            let written = std::fs::read_to_string(&path).unwrap();
            assert_eq!(announced(&written).collect::<Vec<_>>(), prefixes, "{written}");
            assert_eq!(announced(&text(&in_format(format), &[])).count(), 0);
        }
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1, "nothing is left beside it");
        replace(&directory.path().join("none/there"), "").unwrap_err();
    }

    #[test]
    fn each_family_has_its_protocol() {
        let prefixes: Vec<Prefix> = ["192.0.2.0/24", "2001:db8:a::/48"].map(|it| it.parse().unwrap()).to_vec();
        let text = text(&in_format(Format::Bird), &prefixes);
        let (_, protocols) = text.split_once('\n').unwrap();
        assert_eq!(
            protocols,
            "protocol static anyport4 {\n\tipv4;\n\troute 192.0.2.0/24 blackhole;\n}\n\
             protocol static anyport6 {\n\tipv6;\n\troute 2001:db8:a::/48 blackhole;\n}\n"
        );
    }
}
