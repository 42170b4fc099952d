//! What libraries say of a wrong value, in the words of people who use the programs rather than of those who write them.

use std::borrow::Cow;

/// What serde, toml, `serde_json` and Rust's own types say, and what is said instead. Longer ones come before those that they contain.
const SAID: [(&str, &str); 31] = [
    // What was expected.
    ("expected a nonzero u8", "expected a whole number from 1 to 255"),
    ("expected a nonzero u16", "expected a whole number from 1 to 65535"),
    ("expected a nonzero u32", "expected a whole number from 1 to 4294967295"),
    ("expected a nonzero u64", "expected a whole number from 1 on"),
    ("expected a nonzero usize", "expected a whole number from 1 on"),
    ("expected u8", "expected a whole number from 0 to 255"),
    ("expected u16", "expected a whole number from 0 to 65535"),
    ("expected u32", "expected a whole number from 0 to 4294967295"),
    ("expected u64", "expected a whole number from 0 on"),
    ("expected usize", "expected a whole number from 0 on"),
    ("expected i64", "expected a whole number"),
    ("expected a boolean", "expected true or false, without quotes"),
    ("expected a sequence", "expected a list"),
    ("expected a map", "expected a table"),
    ("expected a borrowed string", "expected a string"),
    (
        "string values must be quoted, expected literal string",
        "a string must stand in quotes; true, false and numbers stand without",
    ),
    // What was found.
    ("invalid type: integer", "wrong kind of value: the number"),
    ("invalid type: floating point", "wrong kind of value: the number"),
    ("invalid type: boolean", "wrong kind of value:"),
    ("invalid type: string", "wrong kind of value: the string"),
    ("invalid type: sequence", "wrong kind of value: a list"),
    ("invalid type: map", "wrong kind of value: a table"),
    ("invalid type: null", "wrong kind of value: null"),
    ("invalid value: integer", "wrong value: the number"),
    ("invalid value: string", "wrong value: the string"),
    ("unknown variant", "unknown value"),
    // Texts that are no numbers.
    ("number would be zero for non-zero type", "it must be a whole number from 1 on"),
    ("invalid digit found in string", "it must be a whole number"),
    ("cannot parse integer from empty string", "a number is missing"),
    ("number too large to fit in target type", "the number is too large"),
    ("invalid socket address syntax", "it must be an address and a port, such as 127.0.0.1:9100 or [::1]:9100"),
];

/// A message about a wrong value, in plain words.
pub(crate) fn plain(message: &str) -> Cow<'_, str> {
    SAID.iter().fold(Cow::Borrowed(message), |text, (said, instead)| {
        if text.contains(said) { Cow::Owned(text.replace(said, instead)) } else { text }
    })
}

#[cfg(test)]
mod tests {
    use std::{
        fmt::Display,
        net::SocketAddr,
        num::{NonZeroU8, NonZeroU16, NonZeroU32, NonZeroU64, NonZeroUsize},
    };

    use serde::de::DeserializeOwned;

    use super::plain;

    /// What only people know who write Rust.
    const FOREIGN: [&str; 11] =
        ["u8", "u16", "u32", "u64", "usize", "zero", "digit", "target type", "boolean", "sequence", "variant"];

    fn read<T: DeserializeOwned>(texts: &[&str]) {
        for text in texts {
            let json = serde_json::from_str::<T>(text).err().map(|error| error.to_string());
            let toml = toml::from_str::<std::collections::BTreeMap<String, T>>(&format!("of = {text}"));
            for message in [json, toml.err().map(|error| error.to_string())].into_iter().flatten() {
                let shown = plain(&message);
                assert!(!FOREIGN.iter().any(|it| shown.contains(it)), "{message}: {shown}");
            }
        }
    }

    #[test]
    fn wrong_values_are_told_without_the_names_of_types() {
        let values = ["0", "-1", "1.5", "true", "\"3\"", "[]", "99999999999999999999", "{}"];
        read::<NonZeroU8>(&values);
        read::<NonZeroU16>(&values);
        read::<NonZeroU32>(&values);
        read::<NonZeroU64>(&values);
        read::<NonZeroUsize>(&values);
        read::<u16>(&values);
        read::<u32>(&values);
        read::<u64>(&values);
        read::<bool>(&values);
        read::<String>(&values);
        read::<Vec<bool>>(&values);
        let said = |error: &dyn Display| plain(&error.to_string()).into_owned();
        assert_eq!(said(&"0".parse::<NonZeroUsize>().unwrap_err()), "it must be a whole number from 1 on");
        assert_eq!(said(&"abc".parse::<u32>().unwrap_err()), "it must be a whole number");
        assert_eq!(said(&"99999999999".parse::<u32>().unwrap_err()), "the number is too large");
        assert!(said(&"foo".parse::<SocketAddr>().unwrap_err()).contains("127.0.0.1:9100"));
        let kept = "unknown field `workers`, expected one of `daemon`, `fleet`";
        assert_eq!(plain(kept), kept);
    }
}
