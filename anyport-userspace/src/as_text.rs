//! Types that stand in JSON, TOML and queries as the text that they display, and that are read from it.

/// Has serde write a type as what it displays, and read it by [`FromStr`](std::str::FromStr). With an example, descriptions of the
/// control API have it as a text such as that.
macro_rules! as_text {
    ($type:ty, such as $example:literal) => {
        $crate::as_text::as_text!($type);

        #[cfg(feature = "daemon")]
        impl schemars::JsonSchema for $type {
            fn schema_name() -> std::borrow::Cow<'static, str> {
                stringify!($type).into()
            }

            fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
                schemars::json_schema!({"type": "string", "examples": [$example]})
            }
        }
    };
    ($type:ty) => {
        impl serde::Serialize for $type {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> serde::Deserialize<'de> for $type {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = <String as serde::Deserialize>::deserialize(deserializer)?;
                text.parse().map_err(<D::Error as serde::de::Error>::custom)
            }
        }
    };
}

pub(crate) use as_text;

/// Expects a type to be the same JSON before and after, for each of some texts.
#[cfg(test)]
#[cfg(feature = "daemon")]
pub(crate) fn expect_same_json<T: serde::Serialize + serde::de::DeserializeOwned>(texts: &[&str]) {
    for text in texts {
        let json = format!("\"{text}\"");
        let value: T = serde_json::from_str(&json).unwrap_or_else(|error| panic!("{json}: {error}"));
        assert_eq!(serde_json::to_string(&value).unwrap(), json);
        assert_eq!(serde_json::to_value(&value).unwrap(), serde_json::Value::from(*text));
    }
    for json in ["7", "null", "[\"\"]"] {
        let error = serde_json::from_str::<T>(json).err().unwrap_or_else(|| panic!("{json} was taken")).to_string();
        assert!(error.contains("expected a string"), "{json}: {error}");
    }
}
