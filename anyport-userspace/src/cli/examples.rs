//! What one types: examples for the help of each verb and for its manual page.

/// What the program ends with.
pub(super) const EXIT_STATUS: &str = "\
Exit status: 0 done; 1 failed; 2 wrong usage or invalid input; 3 no daemon answers; 4 not permitted; 5 refused for safety (the message \
     names the flag that overrides); 6 degraded (status --exit-code).";

pub(super) const ADD_PREFIX: &str = "\
Examples:
  anyportctl add-prefix 192.0.2.0/24
  anyportctl add-prefix 192.0.2.0/24 2001:db8::/64 --except 22,179
  anyportctl add-prefix 198.51.100.7 --protocol udp --ports 53 --service dns
  anyportctl add-prefix - --service blocked < list.txt";
pub(super) const REMOVE_PREFIX: &str = "\
Examples:
  anyportctl remove-prefix 192.0.2.0/24
  anyportctl remove-prefix 192.0.2.0/24 --protocol udp";
pub(super) const PREFIXES: &str = "\
Examples:
  anyportctl prefixes
  anyportctl prefixes --within 192.0.2.0/24 --port 443
  anyportctl prefixes -o name";
pub(super) const APPLY: &str = "\
Examples:
  anyportctl apply rules.txt --dry-run
  anyportctl apply rules.txt --confirm 1m
  anyportctl apply - < rules.txt";
pub(super) const CONFIRM: &str = "\
Examples:
  anyportctl confirm";
pub(super) const RELOAD: &str = "\
Examples:
  anyportctl reload --dry-run
  anyportctl reload";
pub(super) const ADD_SERVICE: &str = "\
Examples:
  anyportctl add-service echo --handler echo
  anyportctl add-service web --handler forward --upstream 203.0.113.7:*
  anyportctl add-service games --handler registered --owner user:games";
pub(super) const REMOVE_SERVICE: &str = "\
Examples:
  anyportctl remove-service echo";
pub(super) const SERVICES: &str = "\
Examples:
  anyportctl services
  anyportctl services -o wide
  anyportctl services --json";
pub(super) const REGISTER: &str = "\
Examples:
  anyportctl register web --pid 1234 --fd 3
  anyportctl register web --pid 1234 --listen tcp:127.0.0.1:8080";
pub(super) const UNREGISTER: &str = "\
Examples:
  anyportctl unregister web
  anyportctl unregister web --protocol tcp";
pub(super) const DRAIN: &str = "\
Examples:
  anyportctl drain
  anyportctl drain --service web --wait 2m
  anyportctl drain 192.0.2.0/24 --wait 0s";
pub(super) const UNDRAIN: &str = "\
Examples:
  anyportctl undrain
  anyportctl undrain --service web";
pub(super) const EXPLAIN: &str = "\
Examples:
  anyportctl explain 192.0.2.7:443
  anyportctl explain udp '[2001:db8::7]:53' --from '[2001:db8:1::9]:40000'";
pub(super) const EVENTS: &str = "\
Examples:
  anyportctl events
  anyportctl events --service web --count 10
  anyportctl events --json";
pub(super) const STATUS: &str = "\
Examples:
  anyportctl status
  anyportctl status --exit-code > /dev/null
  anyportctl status --json";
pub(super) const TOP: &str = "\
Examples:
  anyportctl top
  anyportctl top --sort dropped --interval 5s
  anyportctl top --once --json";
pub(super) const DOCTOR: &str = "\
Examples:
  anyportctl doctor
  anyportctl doctor --fix
  anyportctl doctor --undo

Exit status: 1 if something is broken.";

#[cfg(test)]
mod tests {
    use clap::{Command, CommandFactory as _, Parser as _};

    use crate::cli::Cli;

    /// The words of a line, as a shell splits the ones that are here.
    fn words(line: &str) -> Vec<String> {
        let line = line.split(['<', '>']).next().unwrap_or_default();
        let mut words = Vec::new();
        for (at, part) in line.split('\'').enumerate() {
            // Every second part stands in quotes.
            match at % 2 {
                0 => words.extend(part.split_whitespace().map(str::to_owned)),
                _ => words.push(part.to_owned()),
            }
        }
        words
    }

    fn expect_examples(verb: &Command, name: &str) {
        let help = verb.get_after_help().map(ToString::to_string).unwrap_or_default();
        let lines: Vec<&str> = help.lines().filter_map(|line| line.strip_prefix("  ")).collect();
        assert!(!lines.is_empty(), "{name} has no examples");
        for line in lines {
            assert!(line.starts_with(&format!("anyportctl {name}")), "an example of {name}: {line}");
            Cli::try_parse_from(words(line)).unwrap_or_else(|error| panic!("{line}: {error}"));
        }
    }

    #[test]
    fn each_verb_has_examples_that_are_right() {
        let cli = Cli::command();
        for verb in cli.get_subcommands() {
            if verb.get_subcommands().next().is_none() {
                expect_examples(verb, verb.get_name());
            }
            for below in verb.get_subcommands() {
                expect_examples(below, &format!("{} {}", verb.get_name(), below.get_name()));
            }
        }
    }
}
