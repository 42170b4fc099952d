//! The pages of the configuration file and of files of rules, made of the declarations that the daemon itself reads them by.

use std::sync::Arc;

use anyhow::{Context as _, anyhow};
use anyport::{
    cli::Cli,
    config::{Announce, ChangesBy, ConfigTable, DaemonConfig, Options, Setting},
    rule_file::RuleFile,
    rules::RuleText,
    service::ServiceConfig,
};
use clap::{Arg, CommandFactory as _};
use schemars::{JsonSchema, generate::SchemaSettings};
use serde_json::Value;

use crate::roff::Page;

/// Where the packages have the documents.
const DOCUMENTS: &str = "/usr/share/doc/anyport/docs";

const CONFIGURATION: &str = "\
[[service]]
name = \"trap\"
handler = \"discard\"
banner = \"220 ready\\r\\n\"

[[rule]]
prefix = \"192.0.2.0/24\"
except = \"22,179\"
service = \"trap\"
";

/// What the parser of lines takes.
const LINE: &str = "PREFIX [tcp|udp|both] [PORTS] [except=PORTS] [source=CIDR] [service=NAME] [route=no]";

const LINES: &str = "\
# A comment.
192.0.2.0/24
198.51.100.0/24 tcp 80,443,8000-8999 except=8080 service=trap
2001:db8::/48 both source=2001:db8:c::/48
";

/// anyport.toml(5).
pub(crate) fn configuration() -> anyhow::Result<String> {
    let mut page = Page::of_file("anyport.toml", "configuration of anyportd");
    page.section("SYNOPSIS");
    page.lines("/etc/anyport/anyport.toml");
    page.section("DESCRIPTION");
    page.text(
        "What anyportd reads when it starts, and again by `anyportctl reload`: a file in TOML, which may be absent. Unknown keys, \
         and anything else that is wrong, are errors that name line and column. `anyportd --check` says whether a file is right, \
         and changes nothing.",
    );
    page.text("Times are such as `500ms`, `3s` or `5m`.");
    page.section("THE DAEMON");
    page.text(
        "The settings of the table `[daemon]`. The command line goes before the environment, and that before the file.",
    );
    settings::<DaemonConfig>(&mut page);
    page.section("SERVICES");
    page.text(
        "Each table `[[service]]` is a service, which receives what rules steer to it. A service `default` with the handler \
         `hello` is there unless the file has one of that name.",
    );
    keys::<ServiceConfig>(&mut page);
    page.section("RULES");
    page.text(
        "Each table `[[rule]]` steers a prefix to a service. Which of several rules decides: see anyport-rules(5).",
    );
    keys::<RuleText>(&mut page);
    page.section("ANNOUNCING");
    page.text(
        "The settings of the table `[announce]`: which prefixes the site's router announces while they are served.",
    );
    settings::<Announce>(&mut page);
    #[cfg(feature = "fleet")]
    {
        page.section("FLEET");
        page.text("The settings of the table `[fleet]`, with which a node takes rules and services from etcd, too.");
        settings::<anyport::config::FleetSettings>(&mut page);
    }
    page.section("EXAMPLES");
    page.lines(checked(CONFIGURATION)?);
    page.section("FILES");
    page.item(&format!("{DOCUMENTS}/anyport.toml"), "A sample with all settings, to begin with.");
    page.item(&format!("{DOCUMENTS}/configuration.md"), "More about all of this.");
    page.see_also(&[
        ("anyport-rules", "5"),
        ("anyportctl", "8"),
        ("anyportctl-apply", "8"),
        ("anyportctl-reload", "8"),
        ("anyportd", "8"),
    ]);
    Ok(page.into_text())
}

/// anyport-rules(5).
pub(crate) fn rules() -> anyhow::Result<String> {
    let cli = Cli::command();
    let apply = cli.find_subcommand("apply").context("find the verb apply")?;
    let formats = apply.get_arguments().find(|it| it.get_id() == "format").context("find its option --format")?;
    let mut page = Page::of_file("anyport-rules", "files of rules for anyport");
    page.section("SYNOPSIS");
    page.lines(LINE);
    page.section("DESCRIPTION");
    page.text(
        "What `anyportctl apply` and, for a fleet, `anyportctl fleet publish` read: a rule a line, with the words in this order. \
         Empty lines mean nothing, nor does what follows a `#`. A file may also have the tables `[[service]]` and `[[rule]]` of \
         anyport.toml(5): then services come, change and go with it.",
    );
    page.text(
        "Files may be compressed by gzip, and have a byte order mark or be UTF-16. A mistake is named with file, line and column; \
         nothing has changed then.",
    );
    page.section("WORDS");
    page.text("As the keys of the table `[[rule]]`:");
    keys::<RuleText>(&mut page);
    page.section("PRECEDENCE");
    page.text(
        "The order of rules does not matter. The longest prefix with a rule that matches protocol, port and client decides; if it \
         has none, the next shorter one is asked. Within one prefix the rule with fewer ports decides, then the one with the longer \
         source. Two rules that differ in neither and disagree about a port contradict each other, and the file is refused. An \
         exception is a match: those ports are left to the host, and shorter prefixes are not asked. `anyportctl explain` shows \
         for any packet which rule decides.",
    );
    page.section("FORMATS");
    page.text("Lists as others publish them are read, too. Which kind it is is found out, or `--format` says it:");
    for format in formats.get_possible_values() {
        page.item(format.get_name(), &(format.get_help().map(ToString::to_string).unwrap_or_default() + "."));
    }
    page.section("EXAMPLES");
    page.lines(checked(LINES)?);
    page.section("FILES");
    page.item(&format!("{DOCUMENTS}/configuration.md"), "More about rules, and about all of these formats.");
    page.see_also(&[
        ("anyport.toml", "5"),
        ("anyportctl", "8"),
        ("anyportctl-add-prefix", "8"),
        ("anyportctl-apply", "8"),
        ("anyportctl-explain", "8"),
    ]);
    Ok(page.into_text())
}

/// An example, which must be one.
fn checked(example: &str) -> anyhow::Result<&str> {
    let read = RuleFile::parse(example, Arc::new).map_err(|error| anyhow!("read {example:?}: {error}"))?;
    anyhow::ensure!(!read.rules.is_empty(), "there is no rule in {example:?}");
    Ok(example)
}

fn settings<T: ConfigTable>(page: &mut Page) {
    let options = Options::command();
    for setting in T::SETTINGS {
        // Other tables have settings of the same names.
        let option = options.get_arguments().find(|it| T::PREFIX.is_empty() && it.get_long() == Some(setting.name));
        page.item(&format!("{} = {}", setting.name, setting.sample), &about(setting, option));
    }
}

fn about<T>(setting: &Setting<T>, option: Option<&Arg>) -> String {
    let words = option.map(Arg::get_possible_values).unwrap_or_default();
    let words: Vec<_> = words.iter().map(|it| it.get_name().to_owned()).collect();
    let changes_by = match setting.changes_by {
        ChangesBy::Reload => "`anyportctl reload`",
        ChangesBy::Restart => "a restart",
    };
    let given = option.and_then(|it| Some((it.get_long()?, it.get_env()?.to_str()?)));
    let document = setting.see.and_then(|it| it.split_once("](")?.1.split(['#', ')']).next());
    let document = document.map(|it| if it.is_empty() { "configuration.md" } else { it });
    let sentences = [
        Some(format!("{}.", for_file(setting.help))),
        (!words.is_empty()).then(|| format!("One of: {}.", words.join(", "))),
        Some(format!("Default: {}.", (setting.default)())),
        Some(format!("A change takes {changes_by}.")),
        given.map(|(name, variable)| format!("Also `--{name}` and `{variable}`.")),
        document.map(|it| format!("See {DOCUMENTS}/{it}.")),
    ];
    sentences.into_iter().flatten().collect::<Vec<_>>().join(" ")
}

/// The keys of a table that is read as this type, the needed ones first.
fn keys<T: JsonSchema>(page: &mut Page) {
    let schema = SchemaSettings::draft2020_12().for_deserialize().into_generator().into_root_schema_for::<T>();
    let schema = schema.as_value();
    let is_needed = |name: &str| schema["required"].as_array().is_some_and(|all| all.iter().any(|it| it == name));
    let mut keys: Vec<_> = schema["properties"].as_object().into_iter().flatten().collect();
    keys.sort_by_key(|(name, _)| !is_needed(name));
    for (name, key) in keys {
        let help = for_file(key["description"].as_str().unwrap_or_default());
        let more = match &key["default"] {
            Value::String(default) if !default.is_empty() => format!(" Default: {default}."),
            Value::Bool(default) => format!(" Default: {default}."),
            _ if is_needed(name) => " Needed.".to_owned(),
            _ => String::new(),
        };
        let text = format!("{}.{more}", help.trim_end_matches('.'));
        page.item(&format!("{name} = {}", value(schema, key)), &text);
    }
}

/// A help of the command line, as it fits a file.
fn for_file(help: &str) -> String {
    let help = help.replace("; may be repeated", "").replace(" --", " ").replace('\n', " ");
    help.replace(" [default: ", ". Default: ").replace(']', "")
}

/// What a value of a schema looks like in TOML.
fn value(root: &Value, schema: &Value) -> String {
    if let Some(reference) = schema["$ref"].as_str() {
        return root.pointer(reference.trim_start_matches('#')).map_or_else(String::new, |it| value(root, it));
    }
    if let Some(choices) = schema["anyOf"].as_array() {
        return choices.first().map_or_else(String::new, |it| value(root, it));
    }
    if let Some(words) = schema["oneOf"].as_array() {
        return words.iter().map(|it| it["const"].to_string()).collect::<Vec<_>>().join(" | ");
    }
    if let Some(words) = schema["enum"].as_array() {
        return words.iter().map(ToString::to_string).collect::<Vec<_>>().join(" | ");
    }
    let kind = schema["type"].as_str().or_else(|| schema["type"][0].as_str()).unwrap_or_default();
    match kind {
        "boolean" => "true | false".to_owned(),
        "integer" => "N".to_owned(),
        "array" => format!("[{}, ...]", value(root, &schema["items"])),
        "object" => {
            let keys = schema["properties"].as_object().into_iter().flatten();
            let keys: Vec<_> = keys.map(|(name, key)| format!("{name} = {}", default_or_value(root, key))).collect();
            format!("{{ {} }}", keys.join(", "))
        }
        _ => schema["examples"][0].as_str().map_or_else(|| "\"TEXT\"".to_owned(), |it| format!("{it:?}")),
    }
}

fn default_or_value(root: &Value, schema: &Value) -> String {
    match &schema["default"] {
        Value::Null => value(root, schema),
        default => default.to_string(),
    }
}
