//! How the settings of a table of the configuration file are declared: once, with all that is made of the declaration.
//!
//! [`table!`] makes the struct that the settings end up in and their descriptions, [`ConfigTable::SETTINGS`]. Reload, the checks, the sample
//! file and the tables of the documents go by the descriptions. [`defaults!`] and [`overlay!`] make of the same declaration what holds
//! where nothing is given, and what the command line, the environment and the file may give.
//!
//! For each setting there are, in this order:
//!
//! - its help, as a comment; its name, and the type that it is given as, and kept as if that differs;
//! - `value`: what its value is called in the help of the command line; needed by [`overlay!`];
//! - `default`: the value unless one is given, where none has to be; needed by [`defaults!`] and [`overlay!`];
//! - `in_words`: the default in words, where it does not speak for itself;
//! - `empty`: what it is shown as where it is none, or an empty list;
//! - `changes_by`: a variant of [`ChangesBy`];
//! - `check`: what is wrong with a value, if something can be;
//! - `sample` and `see`: as in [`Setting`];
//! - `arg`: what else clap has to know.

use std::{
    net::SocketAddr,
    num::{NonZeroU8, NonZeroU32, NonZeroUsize},
    path::PathBuf,
    time::Duration,
};

use crate::{api::Readers, human_duration::HumanDuration, privileges::User, rules::Prefix};

/// How a setting that has changed in the file gets to a daemon that runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChangesBy {
    /// By `anyportctl reload`.
    Reload,
    /// By a restart only.
    Restart,
}

/// A table of the configuration file.
pub trait ConfigTable: Sized + 'static {
    /// What its settings have before their names in messages.
    const PREFIX: &'static str;
    /// What each of them is shown as where there is no such table.
    const ABSENT: &'static str;
    /// Its settings.
    const SETTINGS: &'static [Setting<Self>];
}

/// A setting of a table.
#[derive(Debug)]
pub struct Setting<T> {
    /// What it is called in the file, and with `--` before it on the command line.
    pub name: &'static str,
    /// What it is, in one sentence.
    pub help: &'static str,
    /// What holds unless it is given, in words.
    pub default: fn() -> String,
    /// How a change gets to a daemon that runs.
    pub changes_by: ChangesBy,
    /// A value, as TOML: the default where that can be written down.
    pub sample: &'static str,
    /// A link to more about it, from `docs/`, in Markdown.
    pub see: Option<&'static str>,
    pub(super) show: fn(&T) -> String,
    pub(super) check: fn(&T) -> Result<(), String>,
    pub(super) take: fn(&mut T, &T),
}

impl<T> Setting<T> {
    /// Help and default. That a switch is off by default goes without saying.
    pub fn help_text(&self) -> String {
        match (self.default)().as_str() {
            "false" => self.help.to_owned(),
            default => format!("{} [default: {default}]", self.help),
        }
    }

    /// What is wrong with its value, if something is.
    pub(super) fn problem(&self, of: &T) -> Option<String> {
        let why = (self.check)(of).err()?;
        Some(format!("{} = {}: {why}", self.name, (self.show)(of)))
    }
}

/// The help of a setting on the command line.
pub(super) fn help_of<T: ConfigTable>(name: &str) -> String {
    T::SETTINGS.iter().find(|it| it.name == name).map(Setting::help_text).unwrap_or_default()
}

/// A number that must not be larger than another one.
pub(super) fn at_most(value: usize, limit: usize) -> Result<(), String> {
    if value > limit { Err(format!("the limit is {limit}")) } else { Ok(()) }
}

/// A value as messages show it; empty if there is none.
pub(super) trait Shown {
    fn shown(&self) -> String;
}

/// Types that are shown as they display.
macro_rules! shown_as_text {
    ($($type:ty),+ $(,)?) => { $(
        impl $crate::config::declare::Shown for $type {
            fn shown(&self) -> String {
                self.to_string()
            }
        }
    )+ };
}

shown_as_text!(NonZeroU8, NonZeroU32, NonZeroUsize, Readers, SocketAddr, HumanDuration, String, User, bool, usize);

impl Shown for PathBuf {
    fn shown(&self) -> String {
        self.display().to_string()
    }
}

impl Shown for Duration {
    fn shown(&self) -> String {
        humantime::format_duration(*self).to_string()
    }
}

impl<T: Shown> Shown for Option<T> {
    fn shown(&self) -> String {
        self.as_ref().map(Shown::shown).unwrap_or_default()
    }
}

impl Shown for Vec<String> {
    fn shown(&self) -> String {
        self.join(", ")
    }
}

impl Shown for Vec<Prefix> {
    fn shown(&self) -> String {
        self.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")
    }
}

// What follows is for the macros. What may be left out of a declaration comes as a slice with nothing or one thing in it.

pub(super) fn show(value: &impl Shown, empty: &[&str]) -> String {
    let text = value.shown();
    if text.is_empty() { empty.concat() } else { text }
}

pub(super) fn default_text(words: &[&str], values: &[impl Shown], empty: &[&str]) -> String {
    let in_words = words.first().map(ToString::to_string);
    in_words.or_else(|| values.first().map(|value| show(value, empty))).unwrap_or_default()
}

pub(super) const fn optional(text: &[&'static str]) -> Option<&'static str> {
    if text.is_empty() { None } else { Some(text[0]) }
}

pub(super) type Check<V> = fn(&V) -> Result<(), String>;

pub(super) fn check<V>(value: &V, checks: &[Check<V>]) -> Result<(), String> {
    checks.iter().try_for_each(|check| check(value))
}

/// The text with hyphens for underscores (`max-rules` for `max_rules`).
pub(super) const fn hyphenated<const N: usize>(text: &str) -> [u8; N] {
    let mut bytes = copied::<N>(text);
    let mut at = 0;
    while at < N {
        if bytes[at] == b'_' {
            bytes[at] = b'-';
        }
        at += 1;
    }
    bytes
}

/// The text in upper case (`ANYPORT_MAX_RULES` for `ANYPORT_max_rules`).
pub(super) const fn upper_case<const N: usize>(text: &str) -> [u8; N] {
    let mut bytes = copied::<N>(text);
    bytes.make_ascii_uppercase();
    bytes
}

const fn copied<const N: usize>(text: &str) -> [u8; N] {
    let mut bytes = [0; N];
    bytes.copy_from_slice(text.as_bytes());
    bytes
}

pub(super) const fn as_text(bytes: &'static [u8]) -> &'static str {
    match str::from_utf8(bytes) {
        Ok(text) => text,
        Err(_) => panic!("not UTF-8"),
    }
}

/// A text that a function on bytes makes of another one while this is compiled.
macro_rules! made_of {
    ($function:ident, $text:expr) => {{
        const TEXT: &str = $text;
        const BYTES: [u8; TEXT.len()] = $crate::config::declare::$function(TEXT);
        const MADE: &str = $crate::config::declare::as_text(&BYTES);
        MADE
    }};
}

/// What a setting is called in the file.
macro_rules! name {
    ($name:ident) => {
        $crate::config::declare::made_of!(hyphenated, stringify!($name))
    };
}

/// What a setting is called in the environment.
macro_rules! environment {
    ($name:ident) => {
        $crate::config::declare::made_of!(upper_case, concat!("ANYPORT_", stringify!($name)))
    };
}

/// The type that a value is kept as: the one that it is given as, unless another one is named.
macro_rules! kept {
    ($given:ty) => {
        $given
    };
    ($given:ty, $kept:ty) => {
        $kept
    };
}

/// Makes the struct of a table and its descriptions.
macro_rules! table {
    (
        $(#[$meta:meta])*
        $vis:vis struct $table:ident ($prefix:literal, $absent:literal) {
            $(
                $(#[doc = $help:literal])+
                $name:ident: $given:ty $(as $kept:ty)? {
                    $(value: $value:literal,)?
                    $(default: $default:expr,)?
                    $(in_words: $words:literal,)?
                    $(empty: $empty:literal,)?
                    changes_by: $changes_by:ident,
                    $(check: $check:expr,)?
                    sample: $sample:literal,
                    $(see: $see:literal,)?
                    $(arg: [$($arg:tt)*],)?
                }
            )+
        }
    ) => {
        $(#[$meta])*
        $vis struct $table {
            $(
                $(#[doc = $help])+
                $vis $name: $crate::config::declare::kept!($given $(, $kept)?),
            )+
        }

        impl $crate::config::declare::ConfigTable for $table {
            const PREFIX: &'static str = $prefix;
            const ABSENT: &'static str = $absent;
            const SETTINGS: &'static [$crate::config::declare::Setting<Self>] = &[$(
                $crate::config::declare::Setting {
                    name: $crate::config::declare::name!($name),
                    help: concat!($($help),+).trim_ascii_start(),
                    default: || {
                        type Kept = $crate::config::declare::kept!($given $(, $kept)?);
                        let values: &[Kept] = &[$($default)?];
                        $crate::config::declare::default_text(&[$($words)?], values, &[$($empty)?])
                    },
                    changes_by: $crate::config::declare::ChangesBy::$changes_by,
                    sample: $sample,
                    see: $crate::config::declare::optional(&[$($see)?]),
                    show: |it| $crate::config::declare::show(&it.$name, &[$($empty)?]),
                    check: |it| $crate::config::declare::check(&it.$name, &[$($check)?]),
                    take: |it, other| it.$name.clone_from(&other.$name),
                },
            )+];
        }
    };
}

/// Makes what holds of a table where nothing is given.
macro_rules! defaults {
    ($table:ident {
        $(
            $(#[doc = $help:literal])+
            $name:ident: $given:ty $(as $kept:ty)? {
                $(value: $value:literal,)?
                default: $default:expr,
                $($more:tt)*
            }
        )+
    }) => {
        impl Default for $table {
            fn default() -> Self {
                Self { $($name: $default,)+ }
            }
        }
    };
}

/// Makes a struct of what the command line, the environment and the file may give of a table.
macro_rules! overlay {
    (
        $(#[$meta:meta])*
        $vis:vis struct $overlay:ident of $table:ident {
            $(
                $(#[doc = $help:literal])+
                $name:ident: $given:ty $(as $kept:ty)? {
                    value: $value:literal,
                    default: $default:expr,
                    $(in_words: $words:literal,)?
                    $(empty: $empty:literal,)?
                    changes_by: $changes_by:ident,
                    $(check: $check:expr,)?
                    sample: $sample:literal,
                    $(see: $see:literal,)?
                    $(arg: [$($arg:tt)*],)?
                }
            )+
        }
    ) => {
        $(#[$meta])*
        #[derive(Clone, Debug, Default, serde::Deserialize, clap::Args)]
        #[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
        $vis struct $overlay {
            $(
                $(#[doc = $help])+
                #[arg(
                    long,
                    env = $crate::config::declare::environment!($name),
                    value_name = $value,
                    help = $crate::config::declare::help_of::<$table>($crate::config::declare::name!($name)),
                    $($($arg)*)?
                )]
                $vis $name: Option<$given>,
            )+
        }

        impl $overlay {
            /// Puts what is given in the place of what is there.
            pub(super) fn put_into(self, table: &mut $table) {
                $(
                    if let Some(value) = self.$name {
                        table.$name = value.into();
                    }
                )+
            }

            /// Whether a setting is given here.
            pub(super) fn gives(&self, name: &str) -> bool {
                $((name == $crate::config::declare::name!($name) && self.$name.is_some()))||+
            }
        }
    };
}

pub(super) use {defaults, environment, kept, made_of, name, overlay, shown_as_text, table};

#[cfg(test)]
mod tests {
    use clap::Args as _;

    use super::{ChangesBy, ConfigTable, at_most};

    macro_rules! shop {
        ($settings:tt) => {
            table! {
                /// A table.
                struct Shop ("shop.", "nothing") $settings
            }
            defaults! { Shop $settings }
            overlay! {
                /// What may be given of it.
                struct Given of Shop $settings
            }
        };
    }

    // Nothing but this declares the two settings.
    shop! {{
        /// How many clerks
        /// there are
        most_clerks: usize {
            value: "N",
            default: 3,
            changes_by: Reload,
            check: |it| at_most(*it, 9),
            sample: "3",
        }

        /// What the shop is called
        name: String as Option<String> {
            value: "NAME",
            default: None,
            in_words: "what the owner is called",
            empty: "nameless",
            changes_by: Restart,
            sample: r#""Corner""#,
            see: "[Names](names.md)",
        }
    }}

    #[test]
    fn a_setting_is_declared_once() {
        let [clerks, name] = Shop::SETTINGS else { panic!("two settings") };
        assert_eq!((clerks.name, clerks.changes_by), ("most-clerks", ChangesBy::Reload));
        assert_eq!(clerks.help_text(), "How many clerks there are [default: 3]");
        assert_eq!(name.help_text(), "What the shop is called [default: what the owner is called]");
        assert_eq!((name.sample, name.see), ("\"Corner\"", Some("[Names](names.md)")));

        let file: Given = toml::from_str("most-clerks = 7\nname = \"File\"").unwrap();
        assert!(toml::from_str::<Given>("clerks = 7").is_err());
        let mut shop = Shop::default();
        file.put_into(&mut shop);
        let options = Given { most_clerks: Some(12), name: None };
        assert_eq!(["most-clerks", "name"].map(|name| options.gives(name)), [true, false]);
        options.put_into(&mut shop);
        assert_eq!((shop.most_clerks, shop.name.as_deref()), (12, Some("File")));
        assert_eq!(clerks.problem(&shop).unwrap(), "most-clerks = 12: the limit is 9");
        assert_eq!((name.problem(&shop), (name.show)(&Shop::default()).as_str()), (None, "nameless"));
        (clerks.take)(&mut shop, &Shop::default());
        assert_eq!((clerks.show)(&shop), "3");

        let command = Given::augment_args(clap::Command::new("shop"));
        let arg = command.get_arguments().next().unwrap();
        assert_eq!(
            (arg.get_long(), arg.get_env().unwrap().to_str()),
            (Some("most-clerks"), Some("ANYPORT_MOST_CLERKS"))
        );
        assert_eq!(arg.get_help().unwrap().to_string(), clerks.help_text());
    }
}
