//! How to reach etcd.

use std::{
    fmt, fs,
    path::{Path, PathBuf},
};

use serde::Deserialize;
use tonic::transport::{Certificate, ClientTlsConfig, Identity};

use super::{
    etcd::client::Options,
    layout::{DEFAULT_PREFIX, Keys},
};
use crate::{
    api::{Problem, ProblemKind},
    rules::InvalidText,
};

/// Declares the settings by which etcd is reached, once: hands them, in the form that `config/declare.rs` describes, to the macro `$then`,
/// between other tokens.
macro_rules! connection_settings {
    ($then:ident, [$($before:tt)*], [$($behind:tt)*]) => {
        $then! { $($before)* {
            /// Client URLs of etcd, all with https:// or all with http://
            etcd: Vec<String> {
                value: "URL",
                in_words: "none; needed",
                changes_by: Restart,
                sample: r#"["https://192.0.2.11:2379", "https://192.0.2.12:2379", "https://192.0.2.13:2379"]"#,
                arg: [env = "ANYPORT_ETCD", value_delimiter = ','],
            }

            /// What all keys begin with
            prefix: Option<String> {
                value: "KEY",
                in_words: "/anyport/",
                empty: "/anyport/",
                changes_by: Restart,
                sample: r#""/anyport/""#,
                arg: [env = "ANYPORT_ETCD_PREFIX"],
            }

            /// Certificates by which to know etcd, in PEM
            ca: Option<PathBuf> {
                value: "FILE",
                in_words: "those that the system trusts",
                empty: "none",
                changes_by: Restart,
                sample: r#""/etc/anyport/etcd-ca.pem""#,
                arg: [env = "ANYPORT_ETCD_CA"],
            }

            /// Certificate to show to etcd, in PEM
            certificate: Option<PathBuf> {
                value: "FILE",
                in_words: "none",
                empty: "none",
                changes_by: Restart,
                sample: r#""/etc/anyport/node.pem""#,
                arg: [env = "ANYPORT_ETCD_CERTIFICATE"],
            }

            /// Private key of that certificate, in PEM
            key: Option<PathBuf> {
                value: "FILE",
                in_words: "none",
                empty: "none",
                changes_by: Restart,
                sample: r#""/etc/anyport/node.key""#,
                arg: [env = "ANYPORT_ETCD_KEY"],
            }

            /// User of etcd
            user: Option<String> {
                value: "NAME",
                in_words: "none",
                empty: "none",
                changes_by: Restart,
                sample: r#""node""#,
                arg: [env = "ANYPORT_ETCD_USER"],
            }

            /// File with the password of that user
            password_file: Option<PathBuf> {
                value: "FILE",
                in_words: "none",
                empty: "none",
                changes_by: Restart,
                sample: r#""/etc/anyport/etcd-password""#,
                arg: [env = "ANYPORT_ETCD_PASSWORD_FILE"],
            }

            $($behind)*
        } }
    };
}
pub(crate) use connection_settings;

/// Makes the options of the client, which may stand in the table `[fleet]`, too.
macro_rules! options {
    ({
        $(
            $(#[doc = $help:literal])+
            $name:ident: $type:ty {
                value: $value:literal,
                in_words: $words:literal,
                $(empty: $empty:literal,)?
                changes_by: $changes_by:ident,
                sample: $sample:literal,
                arg: [$($arg:tt)*],
            }
        )+
    }) => {
        /// How to reach etcd, from options of the client or the table `[fleet]`.
        #[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, clap::Args)]
        #[serde(rename_all = "kebab-case", default)]
        pub struct ConnectionSettings {
            $(
                $(#[doc = $help])+
                #[arg(long, global = true, value_name = $value, help = help_text(concat!($($help),+), $words), $($arg)*)]
                pub $name: $type,
            )+
        }

        impl ConnectionSettings {
            /// What is given here, and else what is given there.
            #[must_use]
            pub fn or(self, other: Self) -> Self {
                let none = Self::default();
                Self { $($name: if self.$name == none.$name { other.$name } else { self.$name },)+ }
            }
        }
    };
}

connection_settings!(options, [], []);

fn help_text(help: &str, default: &str) -> String {
    let help = help.trim_start();
    if default.starts_with("none") { help.to_owned() } else { format!("{help} [default: {default}]") }
}

impl ConnectionSettings {
    /// Checks what the types leave open, and reads no file.
    ///
    /// # Errors
    /// There is no URL or one that is none, or half of a pair is missing.
    pub fn validate(&self) -> Result<(), InvalidText> {
        let wrong = |why: String| Err(InvalidText(why));
        if self.etcd.is_empty() {
            return wrong("no etcd is named; etcd = [\"https://…:2379\"] in [fleet], or --etcd, names one".into());
        }
        let has = |scheme: &str| self.etcd.iter().any(|url| url.starts_with(scheme));
        for url in &self.etcd {
            let host = url.strip_prefix("https://").or(url.strip_prefix("http://"));
            if host.is_none_or(|host| host.is_empty() || host.contains(['/', '@', ' '])) {
                return wrong(format!("etcd {url:?}: use http://HOST:PORT or https://HOST:PORT"));
            }
        }
        if has("http://") && has("https://") {
            return wrong("etcd: use https:// with all of the URLs, or with none".into());
        }
        if self.certificate.is_some() != self.key.is_some() {
            return wrong("a certificate and its key are of use together only; name both".into());
        }
        if self.user.is_some() != self.password_file.is_some() {
            return wrong("a user and a file with the password are of use together only; name both".into());
        }
        Ok(())
    }

    /// Reads certificates, key and password.
    ///
    /// # Errors
    /// As [`Self::validate`]; or a file can't be read.
    pub fn read(&self) -> Result<Endpoints, Problem> {
        self.validate().map_err(|error| Problem::new(ProblemKind::Invalid, error.to_string()))?;
        let mut options = Options::default();
        if self.etcd.iter().any(|url| url.starts_with("https://")) {
            let mut tls = ClientTlsConfig::new();
            tls = match &self.ca {
                Some(ca) => tls.ca_certificate(Certificate::from_pem(read(ca)?)),
                None => tls.with_native_roots(),
            };
            if let (Some(certificate), Some(key)) = (&self.certificate, &self.key) {
                tls = tls.identity(Identity::from_pem(read(certificate)?, read(key)?));
            }
            options.tls = Some(tls);
        }
        if let (Some(user), Some(file)) = (&self.user, &self.password_file) {
            let password = String::from_utf8_lossy(&read(file)?).trim_end_matches(['\r', '\n']).to_owned();
            options.user = Some((user.clone(), password));
        }
        let prefix = self.prefix.as_deref().unwrap_or(DEFAULT_PREFIX);
        Ok(Endpoints { urls: self.etcd.clone(), keys: Keys::new(prefix), options })
    }
}

fn read(file: &Path) -> Result<Vec<u8>, Problem> {
    fs::read(file).map_err(|error| Problem::new(ProblemKind::Invalid, format!("read {}: {error}", file.display())))
}

/// All that a connection takes.
#[derive(Clone)]
pub struct Endpoints {
    pub(super) urls: Vec<String>,
    pub(super) keys: Keys,
    pub(super) options: Options,
}

/// Without password and key.
impl fmt::Debug for Endpoints {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Endpoints").field("urls", &self.urls).field("keys", &self.keys).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::ConnectionSettings;

    fn read(text: &str) -> ConnectionSettings {
        toml::from_str(text).unwrap()
    }

    #[test]
    fn what_can_not_work_is_told() {
        for (text, wanted) in [
            ("", "no etcd is named"),
            ("etcd = [\"192.0.2.1:2379\"]", "https://HOST:PORT"),
            ("etcd = [\"http://\"]", "https://HOST:PORT"),
            ("etcd = [\"http://a:1/x\"]", "https://HOST:PORT"),
            ("etcd = [\"http://u:p@a:1\"]", "https://HOST:PORT"),
            ("etcd = [\"http://a:1\", \"https://b:1\"]", "all of the URLs"),
            ("etcd = [\"https://a:1\"]\ncertificate = \"c\"", "its key"),
            ("etcd = [\"https://a:1\"]\nuser = \"u\"", "the password"),
        ] {
            let error = read(text).validate().unwrap_err().to_string();
            assert!(error.contains(wanted), "{text:?}: {error}");
        }
    }

    #[test]
    fn options_go_before_the_file() {
        let file = read("etcd = [\"http://a:1\"]\nprefix = \"/p\"\n");
        let options = read("etcd = [\"http://b:1\", \"http://c:1\"]");
        let both = options.or(file);
        assert_eq!((both.etcd.len(), both.prefix.as_deref()), (2, Some("/p")));
        let error = read("etcd = [\"https://a:1\"]\nca = \"/nonexistent\"").read().unwrap_err().to_string();
        assert!(error.contains("/nonexistent"), "{error}");
    }
}
