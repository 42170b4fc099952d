//! Reading, merging, and what reload changes.

use super::{Choice, Config, LogLevel, Settings};

const EXAMPLE: &str = r#"
        [daemon]
        steering = "tc"
        workers = 3
        interface = ["lo"]

        [[service]]
        name = "trap"
        handler = "discard"
        banner = "220 ready\r\n"

        [[rule]]
        prefix = "192.0.2.0/24"
        ports = "1-65535"
        except = "22,179"
        service = "trap"

        [[rule]]
        prefix = "2001:db8::/64"
        protocol = "both"
        route = false
    "#;

#[test]
fn options_win_over_the_file() {
    let options = Settings { steering: Some(Choice::Tproxy), ..Settings::default() };
    let config = Config::parse(&options, EXAMPLE).unwrap();
    assert_eq!(config.steering, Choice::Tproxy);
    assert_eq!((config.workers.get(), config.log_level), (3, LogLevel::Info));
    assert_eq!(config.interface, ["lo"]);
    let rules: Vec<String> = config.rules.iter().map(|it| it.to_rule().to_string()).collect();
    assert_eq!(
        rules,
        ["192.0.2.0/24 tcp ports 1-65535 except 22,179 -> trap", "2001:db8::/64 both ports 1-65535 -> default"]
    );
}

#[test]
fn tells_what_can_change_from_what_takes_a_restart() {
    let parse = |text: &str| Config::parse(&Settings::default(), text).unwrap();
    let previous = parse("[daemon]\nworkers = 2\nsteering = \"tc\"");
    let text = "[daemon]\nworkers = 3\nmend = false\ndrain-timeout = \"1m\"\nmax-connections = 7\ninterface = [\"lo\"]";
    let mut now = parse(text);
    let (live, fixed) = now.differences(&previous);
    assert_eq!(live, ["drain-timeout: 10m -> 1m", "mend: true -> false"]);
    let expected = ["steering: tc -> auto", "interface: all -> lo", "workers: 2 -> 3", "max-connections: none -> 7"];
    assert_eq!(fixed, expected);
    now.take_live(&previous);
    assert_eq!(now.differences(&previous).0, [""; 0]);
}

#[test]
fn what_is_announced_can_change_and_where_takes_a_restart() {
    let parse = |text: &str| Config::parse(&Settings::default(), text).unwrap();
    let previous = parse("[announce]\nprefixes = [\"192.0.2.0/24\"]");
    let text = "[announce]\nfile = \"/run/a\"\nformat = \"list\"\nrules-within = [\"2001:db8::/32\"]\nneeds = \"any\"\n\
                hold-down = \"3s\"";
    let now = parse(text);
    let (live, fixed) = now.differences(&previous);
    let expected = [
        "announce.prefixes: 192.0.2.0/24 -> nothing",
        "announce.rules-within: nothing -> 2001:db8::/32",
        "announce.needs: all -> any",
        "announce.hold-down: 10s -> 3s",
    ];
    assert_eq!(live, expected);
    assert_eq!(fixed, ["announce.file: /run/anyport/announced.conf -> /run/a", "announce.format: bird -> list"]);
    let mut taken = previous.clone();
    taken.take_live(&now);
    assert_eq!(now.differences(&taken).0, [""; 0]);
    assert_eq!(previous.differences(&taken).1, [""; 0]);
    let mut none = parse("");
    none.take_live(&now);
    assert!(none.announce.is_none());
}

#[test]
fn says_where_and_what() {
    for (text, wanted) in [
        ("[daemon]\nworkers = 0", ["line 2", "from 1 on"]),
        ("[daemon]\nworkers = 9999", ["line 2, column 11: workers = 9999", "1024"]),
        ("[daemon]\nmetrics = \"localhost:9464\"", ["line 2", "such as 127.0.0.1"]),
        ("[daemon]\nworker = 1", ["line 2, column 1", "worker"]),
        ("[daemon]\nsteering = \"ebpf\"", ["line 2", "sk-lookup"]),
        ("[daemons]", ["line 1", "daemons"]),
        ("[[rule]]\nport = \"1\"", ["line 2", "port"]),
        ("[[rule]]\nports = \"1\"", ["line 1", "prefix"]),
        ("[[rule]]\nprefix = \"192.0.2.1/24\"", ["line 2", "did you mean 192.0.2.0/24"]),
        ("[[rule]]\nprefix = \"192.0.2.0/24\"\nports = \"0\"", ["line 3", "not a port"]),
        ("[[rule]]\nprefix = \"192.0.2.0/24\"\nports = \"\"", ["line 1", "no ports"]),
        ("[[rule]]\nprefix = \"192.0.2.0/24\"\nprotocol = \"sctp\"", ["line 3", "udp"]),
        ("[[rule]]\nprefix = \"192.0.2.0/24\"\nservice = \"x\"", ["line 1", "no [[service]]"]),
        ("[[service]]\nname = \"X\"\nhandler = \"echo\"", ["line 2", "lower-case"]),
        ("[[service]]\nname = \"x\"\nhandler = \"nope\"", ["line 3", "discard"]),
        ("[[service]]\nname = \"x\"\nhandler = \"echo\"\nbanner = \"y\"", ["line 1", "banner"]),
        ("[[rule]]\nprefix = 7", ["line 2", "string"]),
        (
            "[daemon]\nmax-rules = 0\n[[rule]]\nprefix = \"192.0.2.0/24\"",
            ["line 2, column 13: there are 1 rules", "max-rules"],
        ),
        ("[[service]]\nname = \"x\"\nhandler = \"registered\"\nfallback = \"y\"", ["line 1", "no [[service]]"]),
        ("prefix", ["line 1", "="]),
        ("[announce]", ["line 1, column 1", "names nothing to announce"]),
        ("[announce]\nprefix = [\"192.0.2.0/24\"]", ["line 2, column 1", "prefix"]),
        ("[announce]\nprefixes = [\"192.0.2.1/24\"]", ["line 2, column 12", "did you mean 192.0.2.0/24"]),
        ("[announce]\nprefixes = [\"192.0.2.0/24\"]\nhold-down = 10", ["line 3, column 13", "string"]),
        ("[announce]\nprefixes = [\"192.0.2.0/24\"]\nfile = \"x\"", ["line 1, column 1", "announce.file"]),
        ("[announce]\nprefixes = [\"192.0.2.0/24\"]\nneeds = \"most\"", ["line 3, column 9", "any"]),
        (
            "[announce]\nprefixes = [\"192.0.2.0/24\"]\nformat = \"list\"\nreload = \"/run/bird/bird.ctl\"",
            ["line 1, column 1", "format = \"bird\""],
        ),
    ] {
        let error = format!("{:#}", Config::parse(&Settings::default(), text).unwrap_err());
        for word in wanted {
            assert!(error.contains(word), "{text:?} lacks {word:?}: {error}");
        }
    }
    let registered = |name, fallback| {
        format!("[[service]]\nname = \"{name}\"\nhandler = \"registered\"\nfallback = \"{fallback}\"\n")
    };
    let problems =
        "[[rule]]\nprefix = \"192.0.2.0/24\"\nservice = \"x\"\n[[rule]]\nprefix = \"192.0.2.0/24\"\nports = \"\"";
    let error = format!("{:#}", Config::parse(&Settings::default(), problems).unwrap_err());
    assert!(error.contains("line 1, column 1: there is no") && error.contains("line 4, column 1"), "{error}");
    let chained = registered("x", "y") + &registered("y", "default");
    let error = format!("{:#}", Config::parse(&Settings::default(), &chained).unwrap_err());
    assert!(error.contains("line 1") && error.contains("y has the handler registered itself"), "{error}");
    let rule = |service| format!("[[rule]]\nprefix = \"192.0.2.0/24\"\nservice = \"{service}\"\n");
    let twice = format!("[[service]]\nname = \"a\"\nhandler = \"echo\"\n{}{}", rule("a"), rule("default"));
    let error = format!("{:#}", Config::parse(&Settings::default(), &twice).unwrap_err());
    assert!(error.contains("line 7") && error.contains("contradicts"), "{error}");
}
